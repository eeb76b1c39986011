"""From a request to pieces of text: submits it to the scheduler, follows its events, cancels what nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial

from onnx_autoglm.chat_template import Refusal, Render
from onnx_autoglm.detokenize import TextStream
from onnx_autoglm.errors import UserError
from onnx_autoglm.generate import Generator
from onnx_autoglm.serve_errors import HttpError
from onnx_autoglm.serve_metrics import Metrics
from onnx_autoglm.serve_options import ServeOptions
from onnx_autoglm.serve_protocol import Drawing, Message, Text
from onnx_autoglm.serve_scheduler import Closed, Event, Refused, Request, Scheduler, Ticket


@dataclasses.dataclass
class Language:
    """A language model that is served."""

    generator: Generator
    scheduler: Scheduler
    template: Render | None
    options: ServeOptions

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a chat. Raises HttpError 400 without a template, or if that refuses the messages."""
        if self.template is None:
            raise HttpError(
                400,
                "the model has no chat template: put chat_template.jinja or tokenizer_config.json beside it, or use "
                "/v1/completions",
                code="no_chat_template",
            )
        try:
            text = self.template([message.model_dump() for message in messages])
        except Refusal as error:
            raise HttpError(
                400, f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._tokens(text, special=False)

    def prompt(self, text: Text) -> list[int]:
        """The tokens of a prompt. Raises HttpError 400 for a text without a tokenizer."""
        return self._tokens(text, special=True) if isinstance(text, str) else text

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        try:
            # A template writes special tokens itself.
            return self.generator.encode(text, special=special)
        except UserError as error:
            raise HttpError(400, str(error), param="prompt") from error


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of one choice. `finish` says why the choice ended, with its last piece."""

    index: int
    text: str
    finish: str | None
    tokens: int


class Texts:
    """The choices of one request: each prompt `n` times."""

    def __init__(
        self, language: Language, prompts: Sequence[list[int]], drawing: Drawing, metrics: Metrics
    ) -> None:
        """Submits them.

        Raises HttpError: 400 for prompts that do not fit, 429 where the queue is full, 503 where the server leaves.
        """
        self.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.choices = len(prompts) * drawing.n
        self._language, self._metrics, self._started = language, metrics, time.perf_counter()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._check(prompts, drawing)
        generator = language.generator
        has_text = generator.tokenizer is not None
        self._streams = [
            TextStream(generator.decode if has_text else _numbers, drawing.stop) for _ in range(self.choices)
        ]
        self._tickets = self._submit(prompts, drawing)

    def _check(self, prompts: Sequence[list[int]], drawing: Drawing) -> None:
        options, context = self._language.options, self._language.generator.context
        most = min(options.choices, options.slots + options.queue)
        if self.choices > most:
            raise HttpError(400, f"at most {most} continuations per request", param="n")
        if drawing.max_tokens > options.max_tokens:
            raise HttpError(
                400, f"max_tokens must be {options.max_tokens} or less on this server", param="max_tokens"
            )
        longest = max(map(len, prompts), default=0)
        if not longest:
            raise HttpError(400, "a prompt must have at least one token", param="prompt")
        if longest + drawing.max_tokens > context:
            raise HttpError(
                400,
                f"a prompt of {longest} tokens and {drawing.max_tokens} more are longer than the context of {context} "
                "tokens",
                param="prompt",
                code="context_length_exceeded",
            )

    def _submit(self, prompts: Sequence[list[int]], drawing: Drawing) -> list[Ticket]:
        seed, timeout = drawing.first_seed(), self._language.options.timeout
        ends = frozenset() if drawing.ignore_eos else self._language.generator.ends
        requests = [
            Request(
                tuple(prompt),
                drawing.max_tokens,
                partial(self._emit, index * drawing.n + copy),
                drawing.sampling,
                (seed, index * drawing.n + copy),
                ends,
                timeout,
            )
            for index, prompt in enumerate(prompts)
            for copy in range(drawing.n)
        ]
        try:
            return self._language.scheduler.submit(requests)
        except Refused as error:
            raise HttpError(
                429,
                "the server is busy; come back later",
                code="queue_full",
                headers={"Retry-After": str(error.retry_after)},
            ) from error
        except Closed as error:
            raise HttpError(503, "the server is shutting down") from error
        except UserError as error:
            raise HttpError(400, str(error), param="prompt") from error

    def _emit(self, index: int, event: Event) -> None:
        """From the thread of the scheduler into the loop, if that still runs."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes. When nobody goes on reading, everything that still runs is cancelled.

        Raises HttpError: 504 after the timeout, 503 where the server stops, 500 where the model fails.
        """
        going = set(range(self.choices))
        first = True
        try:
            while going:
                index, event = await self._events.get()
                if index not in going:
                    continue  # of a choice that a stop text has ended
                if first and event.token is not None:
                    self._metrics.first_token(time.perf_counter() - self._started)
                    first = False
                piece = self._piece(index, event)
                if piece.finish:
                    going.discard(index)
                yield piece
        finally:
            self.cancel()

    def cancel(self) -> None:
        for ticket in self._tickets:
            ticket.cancel()

    def _piece(self, index: int, event: Event) -> Piece:
        stream = self._streams[index]
        if event.token is not None:
            text = stream.push(event.token)
            if stream.stopped:
                self._tickets[index].cancel()
            return Piece(index, text, "stop" if stream.stopped else None, 1)
        if event.finish == "timeout":
            seconds = self._language.options.timeout
            raise HttpError(504, f"not done after {seconds:g} seconds", code="timeout")
        if event.finish == "cancelled":
            raise HttpError(503, "the server is shutting down")
        if event.finish == "error":
            raise HttpError(500, event.error)
        return Piece(index, stream.finish(), event.finish, 0)


def _numbers(tokens: list[int]) -> str:
    """The text of a model without a tokenizer."""
    return "".join(f"{token} " for token in tokens)
