"""Tokens to text, one at a time: never half a character, and never past a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what decoders write for bytes that are no character (yet)


class TextStream:
    """Turns tokens into text as they come.

    A token may end within a character; its text is held back until the character is whole, and dropped if it never
    is. With `stops`, text ends before the first of them, and what may be the start of one is held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        """`decode` turns a list of tokens into text."""
        self._decode, self._stops = decode, tuple(stops)
        self._tokens: list[int] = []
        self._told = 0  # tokens whose text is out
        self._before = 0  # where the context starts that the next text is decoded with
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is sure with this token."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        # A token's text may depend on the tokens before it (spaces), so some are decoded along and cut off again.
        context = self._decode(self._tokens[self._before : self._told])
        text = self._decode(self._tokens[self._before :])
        if len(text) <= len(context) or text.endswith(BROKEN):
            return ""
        self._before, self._told = self._told, len(self._tokens)
        return self._until_stop(text[len(context) :])

    def finish(self) -> str:
        """What was held back, without half a character."""
        if self.stopped:
            return ""
        context = self._decode(self._tokens[self._before : self._told])
        rest = self._decode(self._tokens[self._before :])[len(context) :].rstrip(BROKEN)
        text = self._until_stop(rest) + self._held
        self._held = ""
        return text

    def _until_stop(self, fresh: str) -> str:
        text = self._held + fresh
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that is a start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
