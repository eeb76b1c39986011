"""What lies beside a language model and says how to use it: tokenizer, tokens that end a text, context, chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx_autoglm.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How tokenizers write the token that ends a text. Only special tokens count.
END_MARKS = frozenset(
    {
        "</s>",
        "<eos>",
        "<|end_of_text|>",
        "<|end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|user|>",
        "<end_of_turn>",
        "<eop>",
    }
)


class ModelFolder:
    """The files beside a model, and beside its tokenizer where that lies elsewhere."""

    def __init__(self, model: Path, tokenizer: Path | None = None) -> None:
        """`tokenizer` is a tokenizer.json; by default the one beside the model."""
        beside = model.with_name("tokenizer.json")
        self.tokenizer = tokenizer or (beside if beside.is_file() else None)
        folders = [model.parent] + ([self.tokenizer.parent] if self.tokenizer else [])
        self._folders = list(dict.fromkeys(folder.resolve() for folder in folders))

    def find(self, name: str) -> Path | None:
        return next((folder / name for folder in self._folders if (folder / name).is_file()), None)

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object beside the model; empty if there is none. Raises UserError if it is broken."""
        path = self.find(name)
        if path is None:
            return {}
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}; mend it, or move it away") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} holds no JSON object; mend it, or move it away")
        return data

    def context(self) -> int | None:
        """How many tokens the model was made for, as config.json says."""
        found = self.read("config.json").get("max_position_embeddings")
        return found if isinstance(found, int) and found > 0 else None

    def ends(self, tokenizer: Tokenizer | None) -> tuple[frozenset[int], str]:
        """The tokens that end a text, and the file that says so (empty if none does)."""
        for name in ("generation_config.json", "config.json"):
            found = self.read(name).get("eos_token_id")
            tokens = [found] if isinstance(found, int) else found
            if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
                return frozenset(tokens), name
        if tokenizer is None:
            return frozenset(), ""
        mark = token_text(self.read("tokenizer_config.json").get("eos_token"))
        named = None if mark is None else tokenizer.token_to_id(mark)
        if named is not None:
            return frozenset([named]), "tokenizer_config.json"
        added = tokenizer.get_added_tokens_decoder().items()
        marks = frozenset(number for number, token in added if token.special and token.content in END_MARKS)
        return marks, "tokenizer.json" if marks else ""


def token_text(entry: Any) -> str | None:
    """The text of a token in tokenizer_config.json: plain, or in an object."""
    found = entry.get("content") if isinstance(entry, dict) else entry
    return found if isinstance(found, str) else None


def parse_ends(given: Sequence[str], tokenizer: Tokenizer | None) -> frozenset[int]:
    """Tokens given as numbers or as text. Raises UserError for a text that is no token."""
    tokens = set()
    for word in given:
        if word.isdecimal():
            tokens.add(int(word))
            continue
        number = None if tokenizer is None else tokenizer.token_to_id(word)
        if number is None:
            raise UserError(f"--eos {word}: the tokenizer has no such token; give its number")
        tokens.add(number)
    return frozenset(tokens)
