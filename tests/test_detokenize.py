"""Text from tokens: whole characters only, and nothing past a stop."""

from __future__ import annotations

import pytest

from onnx_autoglm.detokenize import TextStream

TEXT = "naïve café 😀, done; 中文 end"


def by_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode("utf-8", errors="replace")


def by_words(tokens: list[int]) -> str:
    """As decoders do that drop the space before the first word."""
    return " ".join(f"w{token}" for token in tokens)


def pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def test_bytes_become_whole_characters() -> None:
    said = pieces(TextStream(by_bytes), list(TEXT.encode()))
    assert "".join(said) == TEXT
    assert "😀" in said and not any("\ufffd" in piece for piece in said)


def test_spaces_between_words_survive() -> None:
    assert pieces(TextStream(by_words), [1, 2, 3]) == ["w1", " w2", " w3", ""]


def test_half_a_character_at_the_end_is_dropped() -> None:
    assert "".join(pieces(TextStream(by_bytes), list("ab😀".encode())[:-1])) == "ab"


@pytest.mark.parametrize(
    ("stops", "expected", "stopped"),
    [
        (["done"], "naïve café 😀, ", True),
        (["文 e", "caf"], "naïve ", True),
        (["ende", "end!"], TEXT, False),
        (["😀😀"], TEXT, False),
    ],
)
def test_text_ends_before_a_stop(stops: list[str], expected: str, stopped: bool) -> None:
    stream = TextStream(by_bytes, stops)
    assert "".join(pieces(stream, list(TEXT.encode()))) == expected
    assert stream.stopped is stopped


def test_the_start_of_a_stop_is_held_back() -> None:
    stream = TextStream(by_bytes, ["done"])
    assert [stream.push(token) for token in b"a don"] == ["a", " ", "", "", ""]
    assert stream.push(ord("t")) == "dont"
