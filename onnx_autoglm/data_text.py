"""Texts as windows of tokens.

What else a language model wants beside its tokens (mask, positions, an empty cache) is made from the graph's own
signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays, Dataset, hash_of
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import TokenRoles, token_roles
from onnx_autoglm.feeds import generate_feeds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_texts(
    path: Path, files: list[Path], model: ir.Model, tokenizer: Path | None, window: int, limit: int
) -> Dataset:
    """The first `limit` tokens of all files together, in windows that do not overlap.

    Raises:
        UserError: no tokenizer, one that does not fit the model, or too little text.
    """
    tokens = np.array(_encode(files, tokenizer, limit), dtype=np.int64)
    roles = token_roles(model)
    if roles is None:
        raise UserError(
            f"{path} is text, but the model has no token input: pass .npz samples, or a folder of images"
        )
    if tokens.size < 2:
        raise UserError(f"{path} is too short: it has {tokens.size} tokens")
    if tokens.max() >= roles.vocabulary:
        raise UserError(
            f"the tokenizer {tokenizer} does not fit the model: it made token {tokens.max()}, "
            f"the vocabulary has {roles.vocabulary}"
        )
    if roles.batch not in (None, 1):
        raise UserError(f"the model takes batches of {roles.batch} only: pass .npz samples instead of a text")
    window = min(window, tokens.size) if roles.length is None else roles.length
    if window > tokens.size:
        raise UserError(f"{path} is too short: the model takes {window} tokens at once, it has {tokens.size}")
    rows = [tokens[start : start + window] for start in range(0, tokens.size - window + 1, window)]
    feeds = token_feeds(model, [row[None] for row in rows])
    return Dataset(
        path.name,
        hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest(),
        len(rows) * window,
        feeds,
        roles.tokens,
        samples=frozenset(hash_of({"": row}) for row in rows),
    )


def feeds_for(data: Dataset, model: ir.Model) -> tuple[Arrays, ...] | None:
    """A text as feeds of another model, which may have smaller caches; None for samples, which are as they are.

    Raises UserError if the model takes no tokens.
    """
    if data.token_input is None:
        return None
    return token_feeds(model, [feed[data.token_input] for feed in data.feeds])


def token_feeds(model: ir.Model, batches: Iterable[np.ndarray]) -> tuple[Arrays, ...]:
    """A feed around each batch of `[batch, window]` tokens: ones for masks, 0, 1, 2 ... for positions, empty caches.

    Raises UserError if the model takes no tokens.
    """
    roles = token_roles(model)
    if roles is None:
        raise UserError("a text needs a model with a token input, and this one has none")
    return tuple(token_feed(model, roles, batch) for batch in batches)


def token_feed(model: ir.Model, roles: TokenRoles, tokens: np.ndarray, past: int = 0) -> Arrays:
    """A feed around `[batch, window]` tokens that follow `past` others, whose caches hold noise."""
    batch, window = tokens.shape
    sizes = dict.fromkeys(roles.past_symbols, past)
    sizes |= {roles.sequence_symbol: window} if roles.sequence_symbol else {}
    feed = generate_feeds(model, sizes=sizes, batch=batch)
    feed[roles.tokens] = tokens.astype(feed[roles.tokens].dtype)
    for other in roles.positions:
        counted = np.broadcast_to(past + np.arange(window), feed[other].shape)
        feed[other] = counted.astype(feed[other].dtype)
    for other in roles.masks:
        # The length of a mask is often a symbol of its own; it covers past and window.
        shape = (batch, past + window) if feed[other].ndim == 2 else feed[other].shape
        feed[other] = np.ones(shape, feed[other].dtype)
    return feed


def open_tokenizer(path: Path | None) -> Tokenizer:
    """Opens a tokenizer.json. Raises UserError if there is none or it cannot be read."""
    if path is None or not path.is_file():
        where = "beside the model" if path is None else str(path)
        raise UserError(f"texts need a tokenizer.json and there is none ({where}): pass --tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            "reading text needs the package tokenizers: pip install 'onnx-autoglm[text]'"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"cannot read the tokenizer {path}: {error}") from error


def _encode(files: list[Path], tokenizer: Path | None, limit: int) -> list[int]:
    encoder = open_tokenizer(tokenizer)
    ids: list[int] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the text {file}: {error}") from error
        ids.extend(encoder.encode(text, add_special_tokens=False).ids)
        if len(ids) >= limit:
            break
    return ids[:limit]
