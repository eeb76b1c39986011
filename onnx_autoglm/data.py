"""Calibration and evaluation data as feeds of a model.

A text (or a folder of texts) with a tokenizer, or arrays in `.npz` files. What else a language model wants
beside its tokens (mask, positions, an empty cache) is made from the graph's own signature.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_files import load_feeds
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.feeds import generate_feeds

Arrays = dict[str, np.ndarray]

RUNS = 20  # a batch is split into about as many: statistics hold some runs out
RUN_BYTES = 16 << 20  # of inputs, at most


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Feeds of one model, in order; iterate it as often as needed.

    `rows` counts tokens of a text, or samples of arrays. `sha256` is that of the data as used.
    """

    name: str
    sha256: str
    rows: int
    feeds: tuple[Arrays, ...]
    token_input: str | None = None

    def windows(self) -> set[str]:
        """A hash of each feed, to tell whether two sets share any."""
        return {
            hashlib.sha256(
                b"".join(np.ascontiguousarray(feed[name]).tobytes() for name in sorted(feed))
            ).hexdigest()
            for feed in self.feeds
        }

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self.feeds)


def load_dataset(
    path: Path, model: ir.Model, *, tokenizer: Path | None = None, window: int = 512, limit: int = 16384
) -> Dataset:
    """Reads data for a model.

    Args:
        path: a `.txt` file, a folder of them, or a `.npz` file (or a folder of them) with one array per input.
        model: the model that the feeds are for.
        tokenizer: `tokenizer.json` for texts.
        window: tokens per run of the model.
        limit: at most this many tokens of all texts together.

    Raises:
        UserError: nothing readable, a tokenizer that does not fit the vocabulary, or too little text.
    """
    files = _files(path)
    if files[0].suffix in (".npz", ".npy"):
        return _arrays(path, files, model)
    return _texts(path, files, model, tokenizer, window, limit)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        texts, samples = sorted(path.glob("*.txt")), sorted(path.glob("*.npz"))
        if bool(texts) == bool(samples):
            what = "both .txt and .npz files" if texts else "neither .txt nor .npz files"
            raise UserError(f"{path} holds {what}: pass a folder of one kind")
        return texts or samples
    if not path.is_file():
        raise UserError(f"{path} does not exist: pass a text file, a folder of texts, or .npz samples")
    return [path]


def _arrays(path: Path, files: list[Path], model: ir.Model) -> Dataset:
    pieces = -(-RUNS // len(files))
    feeds = tuple(feed for file in files for feed in _split(load_feeds(file, model), model, pieces))
    digest = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            digest.update(np.ascontiguousarray(feed[name]).tobytes())
    rows = sum(next(iter(feed.values())).shape[0] for feed in feeds if feed)
    return Dataset(path.name, digest.hexdigest(), rows, feeds)


def _split(feed: Arrays, model: ir.Model, pieces: int) -> list[Arrays]:
    """A large batch as several, if all inputs share a symbolic first axis; else the feed as it is."""
    declared = {value.name: value.shape for value in model.graph.inputs}
    shapes = [declared.get(name) for name in feed]
    batches = {str(shape[0]) if shape and not isinstance(shape[0], int) else None for shape in shapes}
    counts = {array.shape[0] if array.ndim else 0 for array in feed.values()}
    if len(batches) != 1 or batches & {None, "None"} or len(counts) != 1:
        return [feed]
    (count,) = counts
    row = sum(array.nbytes for array in feed.values()) / max(count, 1)
    size = max(1, min(-(-count // pieces), int(RUN_BYTES / max(row, 1))))
    return [
        {name: array[start : start + size] for name, array in feed.items()}
        for start in range(0, max(count, 1), size)
    ]


def _texts(
    path: Path, files: list[Path], model: ir.Model, tokenizer: Path | None, window: int, limit: int
) -> Dataset:
    tokens = np.array(_encode(files, tokenizer, limit), dtype=np.int64)
    roles = token_roles(model)
    if roles is None:
        raise UserError(f"{path} is text, but the model has no token input: pass .npz samples")
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
    feeds = tuple(_token_feed(model, roles.tokens, row[None]) for row in rows)
    digest = hashlib.sha256(np.concatenate(rows).tobytes()).hexdigest()
    return Dataset(path.name, digest, len(rows) * window, feeds, roles.tokens)


def _encode(files: list[Path], tokenizer: Path | None, limit: int) -> list[int]:
    if tokenizer is None or not tokenizer.is_file():
        where = "beside the model" if tokenizer is None else str(tokenizer)
        raise UserError(f"texts need a tokenizer.json and there is none ({where}): pass --tokenizer")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(
            "reading text needs the package tokenizers: pip install 'onnx-autoglm[text]'"
        ) from error
    try:
        encoder = Tokenizer.from_file(str(tokenizer))
    except Exception as error:
        raise UserError(f"cannot read the tokenizer {tokenizer}: {error}") from error
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


def _token_feed(model: ir.Model, name: str, tokens: np.ndarray) -> Arrays:
    """A feed around `[batch, window]` tokens: ones for masks, 0, 1, 2 ... for positions, empty caches."""
    roles = token_roles(model)
    assert roles is not None
    batch, window = tokens.shape
    sizes = {symbol: 0 for symbol in roles.past_symbols}
    sizes |= {roles.sequence_symbol: window} if roles.sequence_symbol else {}
    feed = generate_feeds(model, sizes=sizes, batch=batch)
    feed[name] = tokens.astype(feed[name].dtype)
    for other in roles.positions:
        counted = np.broadcast_to(np.arange(window), feed[other].shape)
        feed[other] = counted.astype(feed[other].dtype)
    for other in roles.masks:
        # The length of a mask is often a symbol of its own; with an empty cache it is the window.
        shape = tokens.shape if feed[other].ndim == 2 else feed[other].shape
        feed[other] = np.ones(shape, feed[other].dtype)
    return feed
