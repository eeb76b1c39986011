"""Rows of different lengths that a language model continues together, joining and leaving between steps.

Rows of one run share caches of one length, so shorter ones are padded at the left; the mask hides the padding, and
positions count from the first real token. Whether a graph computes the same then is tried, not assumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from onnx_autoglm.decode import SAME_SCORES, Decoder, Values
from onnx_autoglm.errors import UserError

TRIED_PADDING = 5


@dataclasses.dataclass(frozen=True)
class Rows:
    """The state of `len(counts)` rows: how many tokens each has read, and the caches that hold them.

    Caches hold `length` tokens, the last `counts[row]` of which are real. Without a cache `text` `[1, length]` holds
    all tokens of the only row.
    """

    past: Values
    counts: tuple[int, ...]
    length: int
    text: np.ndarray | None = None

    @property
    def padding(self) -> np.ndarray:
        return self.length - np.array(self.counts)


class RowEngine:
    """Reads tokens into rows, and joins rows into one run where that does not change what they compute.

    `alone` says why the rows of this graph cannot be joined; it is empty if they can. `in_pieces` says whether a prompt
    may be read piece by piece.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._copies = decoder.roles.inputs.batch or 1  # of a row, in a graph with a fixed batch
        self.alone = self._why_alone()
        self.in_pieces = decoder.cached and (decoder.roles.inputs.length == 1 or self._reads_in_pieces())

    def _why_alone(self) -> str:
        decoder, roles = self.decoder, self.decoder.roles
        if not decoder.cached:
            return "the graph has no KV cache"
        if roles.inputs.batch is not None:
            return f"the graph has a fixed batch of {roles.inputs.batch}"
        if not any(item.masks_the_past for item in decoder.inputs):
            return "the graph has no attention mask over past and new tokens"
        if any(item.kind == "positions" and item.rank == 1 for item in decoder.inputs):
            return "the graph has one row of positions for all rows"
        if any(item.length is not None for item in decoder.inputs):
            return "the graph counts the tokens of all rows together"
        try:
            same = self._computes_the_same_padded()
        except UserError as error:
            return f"the graph does not run with rows of different lengths: {error}"
        return "" if same else "the graph computes other scores with padding on the left"

    def _computes_the_same_padded(self) -> bool:
        tokens = [self.decoder.vocabulary * share // 5 for share in range(1, 5)]
        long, short = tokens * 2, tokens[:2]
        apart = []
        rows = []
        for text in (long, short):
            own, _ = self.extend(self.empty(), np.array([text]))
            rows.append((own, 0))
            apart.append(self.extend(own, np.array([[tokens[3]]]))[1][0])
        # Padding of ones, not zeros, so that a mask that is not heeded is noticed.
        joined = self.merge(rows, least=len(long) + TRIED_PADDING, fill=1.0)
        _, together = self.extend(joined, np.array([[tokens[3]]] * 2))
        return _near(np.stack(apart), together)

    def _reads_in_pieces(self) -> bool:
        """Whether several tokens at once behind a past compute the same as the whole text."""
        tokens = [self.decoder.vocabulary * share // 5 for share in range(1, 5)]
        whole = self.extend(self.empty(), np.array([tokens]))[1]
        try:
            first, _ = self.extend(self.empty(), np.array([tokens[:2]]))
            pieces = self.extend(first, np.array([tokens[2:]]))[1]
        except UserError:
            return False
        return _near(whole, pieces)

    def empty(self) -> Rows:
        """One row that has read nothing."""
        text = None if self.decoder.cached else np.zeros((1, 0), np.int64)
        return Rows(self.decoder.empty(self._copies), (0,), 0, text)

    def extend(self, rows: Rows, tokens: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Reads `[rows, new]` tokens; the scores after the last one are float32 `[rows, vocabulary]`.

        `rows` stays as it is. Raises UserError if the model does not run.
        """
        new = tokens.shape[1]
        counts = tuple(count + new for count in rows.counts)
        if rows.text is not None:
            text = np.concatenate([rows.text, tokens], axis=1)
            scores, _ = self.decoder.run(np.repeat(text, self._copies, axis=0), {}, 0)
            return Rows({}, counts, text.shape[1], text), scores[:1]
        fed = np.repeat(tokens, self._copies, axis=0) if self._copies > 1 else tokens
        padding = rows.padding if rows.padding.any() else None
        scores, past = self.decoder.run(fed, rows.past, rows.length, padding)
        return Rows(past, counts, rows.length + new), scores[: len(tokens)]

    def merge(self, parts: Sequence[tuple[Rows, int]], *, least: int = 0, fill: float = 0.0) -> Rows:
        """Some rows (each of a state, by its index) as one state of the length of the longest, or of `least`."""
        from onnxruntime import OrtValue

        counts = tuple(rows.counts[index] for rows, index in parts)
        length = max(*counts, least)
        past: Values = {}
        for cache in self.decoder.roles.caches:
            axis, batch_axis = cache.shape.index(0), cache.batch_axis
            shape = tuple(length if i == axis else size for i, size in enumerate(cache.empty(len(parts))))
            joined = np.full(shape, fill, cache.dtype.numpy())
            target = np.moveaxis(joined, (batch_axis, axis), (0, 1))
            arrays = {id(rows): rows.past[cache.input].numpy() for rows, _ in parts}
            for row, (rows, index) in enumerate(parts):
                source = np.moveaxis(arrays[id(rows)], (batch_axis, axis), (0, 1))
                target[row, length - counts[row] :] = source[index, rows.length - counts[row] :]
            past[cache.input] = OrtValue.ortvalue_from_numpy(joined)
        return Rows(past, counts, length)


def _near(expected: np.ndarray, actual: np.ndarray) -> bool:
    return bool(np.abs(expected - actual).max(initial=0) <= SAME_SCORES * np.abs(expected).max(initial=0))
