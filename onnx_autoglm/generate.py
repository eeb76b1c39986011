"""Text from any exported causal language model, with or without a KV cache."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnx_autoglm import modelfile
from onnx_autoglm.data_text import open_tokenizer
from onnx_autoglm.decode import Decoder
from onnx_autoglm.detokenize import TextStream
from onnx_autoglm.errors import UserError
from onnx_autoglm.model_folder import ModelFolder, parse_ends
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.rows import RowEngine
from onnx_autoglm.sampling import GREEDY, Sampling
from onnx_autoglm.serve_scheduler import Event, Finish, Request, Scheduler

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 2048  # where nothing says how many tokens a model was made for


@dataclasses.dataclass
class Generated:
    """One continuation: its text and tokens (without the one that ended it), and why it ended."""

    text: str
    tokens: list[int]
    finish: Finish


class Generator:
    """Continues prompts: several at a time where the graph allows it, with the tokens that each gets alone."""

    def __init__(
        self,
        engine: RowEngine,
        tokenizer: Tokenizer | None = None,
        *,
        ends: frozenset[int] = frozenset(),
        context: int = CONTEXT,
        rows: int = 8,
    ) -> None:
        """
        Args:
            engine: the model.
            tokenizer: to read prompts and write text; without one only `tokens` works.
            ends: tokens that end a text.
            context: the most tokens of a prompt and its continuation together.
            rows: prompts to continue at once.
        """
        self.engine, self.tokenizer, self.ends = engine, tokenizer, ends
        self.context, self._rows = context, rows

    @classmethod
    def open(
        cls,
        model: Path | str,
        *,
        tokenizer: Path | str | None = None,
        eos: Sequence[str] = (),
        context: int | None = None,
        rows: int = 8,
        threads: int | None = None,
    ) -> Generator:
        """Loads a model and what lies beside it.

        Args:
            model: the ONNX file.
            tokenizer: tokenizer.json; by default the one beside the model, if there is one.
            eos: tokens that end a text, by number or text; by default what the files beside the model say.
            context: the most tokens of a prompt and its continuation; by default what config.json says, or 2048.
            rows: prompts to continue at once.
            threads: worker threads of ONNX Runtime; by default its own choice.

        Raises:
            UserError: a file that cannot be read, or a model that cannot write, with the reason.
        """
        folder = ModelFolder(Path(model), None if tokenizer is None else Path(tokenizer))
        words = None if folder.tokenizer is None else open_tokenizer(folder.tokenizer)
        ends = parse_ends(eos, words) or folder.ends(words)[0]
        decoder = Decoder(canonicalize(modelfile.open_model(model)), threads=threads)
        return cls(
            RowEngine(decoder), words, ends=ends, context=context or folder.context() or CONTEXT, rows=rows
        )

    def tokens(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[tuple[int, Event]]:
        """Each token of each row as it is written, with the row's index; then how the row ended.

        Row `i` draws from a stream of its own, which `seed` and `i` start.

        Raises UserError for a prompt without tokens, beyond the vocabulary or longer than the context, or if the model
        does not run.
        """
        yield from self._run(prompts, max_tokens, sampling, seed)[1]

    def stream(
        self,
        prompts: Sequence[str],
        max_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[int, str]]:
        """Text of each row as it is written, with the row's index: whole characters, and nothing from a `stop` on.

        Raises UserError as `tokens`, or without a tokenizer.
        """
        for row, text, _ in self._texts(prompts, max_tokens, sampling, seed, stop):
            if text:
                yield row, text

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[Generated]:
        """All continuations, when they are done. Raises UserError as `stream`."""
        found = [Generated("", [], "length") for _ in prompts]
        for row, text, event in self._texts(prompts, max_tokens, sampling, seed, stop):
            found[row].text += text
            if event.token is not None:
                found[row].tokens.append(event.token)
            found[row].finish = event.finish or found[row].finish
        return found

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a prompt, with those that the tokenizer adds if `special`. Raises UserError without one."""
        return list(self._words.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: list[int]) -> str:
        return str(self._words.decode(tokens, skip_special_tokens=True))

    @property
    def _words(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UserError("there is no tokenizer.json beside the model: pass --tokenizer PATH")
        return self.tokenizer

    def _texts(
        self, prompts: Sequence[str], max_tokens: int, sampling: Sampling, seed: int, stop: Sequence[str]
    ) -> Iterator[tuple[int, str, Event]]:
        encoded = [self.encode(prompt) for prompt in prompts]
        streams = [TextStream(self.decode, stop) for _ in prompts]
        cancel, events = self._run(encoded, max_tokens, sampling, seed)
        for row, event in events:
            if event.token is not None:
                yield row, streams[row].push(event.token), event
                if streams[row].stopped:
                    cancel(row)
            else:
                finish: Finish | None = "stop" if streams[row].stopped else event.finish
                yield row, streams[row].finish(), dataclasses.replace(event, finish=finish)

    def _run(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, sampling: Sampling, seed: int
    ) -> tuple[partial[None], Iterator[tuple[int, Event]]]:
        """A way to cancel a row, and the events of all rows in the order in which they come."""
        for prompt in prompts:
            if len(prompt) + max_tokens > self.context:
                raise UserError(
                    f"a prompt of {len(prompt)} tokens and {max_tokens} more are longer than the context of "
                    f"{self.context} tokens: ask for fewer, or pass --context if the model takes more"
                )
        events: deque[tuple[int, Event]] = deque()
        scheduler = Scheduler(self.engine, slots=self._rows, queue=len(prompts))
        tickets = scheduler.submit(
            [
                Request(
                    tuple(prompt),
                    max_tokens,
                    partial(lambda row, event: events.append((row, event)), row),
                    sampling,
                    (seed, row),
                    self.ends,
                )
                for row, prompt in enumerate(prompts)
            ]
        )
        return partial(lambda row: tickets[row].cancel()), _drained(scheduler, events)


def _drained(scheduler: Scheduler, events: deque[tuple[int, Event]]) -> Iterator[tuple[int, Event]]:
    """Steps on while events are asked for. Raises UserError where a row failed."""
    going = True
    while going or events:
        if not events:
            going = scheduler.step()
        while events:
            row, event = events.popleft()
            if event.finish == "error":
                raise UserError(event.error)
            yield row, event
