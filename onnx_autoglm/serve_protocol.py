"""Bodies of requests and answers of OpenAI's interface, as far as it is served.

A field that would change the answer and is not served is refused, not ignored.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from onnx_autoglm.sampling import Sampling
from onnx_autoglm.serve_errors import HttpError

# Fields that change nothing in the answer.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# Fields that are not served, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
MOST_STOPS = 16

Text = list[int] | str
Body = TypeVar("Body", bound=BaseModel)


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool = False


class Drawing(BaseModel):
    """What both kinds of request say on how to write. `top_k`, `repetition_penalty` and `ignore_eos` are extensions."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    n: int = Field(default=1, ge=1)
    seed: int | None = None
    stop: list[str] = Field(default=[], max_length=MOST_STOPS)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    ignore_eos: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _not_empty(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("a stop text must not be empty")
        return value

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.repetition_penalty)

    def first_seed(self) -> int:
        """Its own seed as a number from 0, or a new one."""
        return secrets.randbits(63) if self.seed is None else self.seed % (1 << 63)


class CompletionBody(Drawing):
    """`/v1/completions`. A prompt is a text or a list of tokens, or a list of such."""

    prompt: list[int] | list[list[int]] | list[str] | str

    def prompts(self) -> list[Text]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: str
    text: str = ""


class Message(BaseModel):
    """One turn of a chat; its content is text, or a list of texts."""

    model_config = ConfigDict(extra="ignore")

    role: str
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        parts = [_Part.model_validate(part) for part in value]
        if any(part.type != "text" for part in parts):
            raise ValueError("content must be text")
        return "".join(part.text for part in parts)


class ChatBody(Drawing):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)


def parse(kind: type[Body], data: Any) -> Body:
    """The body of a request. Raises HttpError 400, naming the field, never showing what was in it."""
    if not isinstance(data, dict):
        raise HttpError(400, "the body must be a JSON object")
    kept = {name: value for name, value in data.items() if value is not None and name not in IGNORED}
    for name, neutral in NEUTRAL.items():
        if name in kept and any(kept[name] == value for value in neutral):
            del kept[name]
        elif name in kept:
            raise HttpError(400, f"{name} is not supported here", param=name, code="unsupported_parameter")
    if "max_completion_tokens" in kept:
        kept["max_tokens"] = kept.pop("max_completion_tokens")
    try:
        return kind.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise HttpError(400, f"{name}: {message}", param=name) from None


class Answer:
    """Makes the bodies of one answer: whole, or in chunks."""

    def __init__(self, model: str, *, chat: bool) -> None:
        kind = "chatcmpl" if chat else "cmpl"
        self._id, self._created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self._model, self._chat = model, chat

    def whole(self, texts: list[str], finishes: list[str], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            self._choice(index, {"message": {"role": "assistant", "content": text}}, text, finish)
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage}

    def start(self, index: int) -> dict[str, Any] | None:
        """What opens a choice of a stream."""
        return self.chunk(index, "", None, role={"role": "assistant"}) if self._chat else None

    def chunk(
        self, index: int, text: str, finish: str | None, role: dict[str, str] | None = None
    ) -> dict[str, Any]:
        delta = {**(role or {}), **({} if finish and not text else {"content": text})}
        choice = self._choice(index, {"delta": delta}, text, finish)
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def end(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind if self._chat else "text_completion",
            "created": self._created,
            "model": self._model,
        }

    def _choice(self, index: int, chat: dict[str, Any], text: str, finish: str | None) -> dict[str, Any]:
        own = chat if self._chat else {"text": text}
        return {"index": index, **own, "logprobs": None, "finish_reason": finish}


def usage(prompt: int, written: int) -> dict[str, int]:
    """The tokens that were read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
