"""A data set as feeds of a model: what all loaders return."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Arrays = dict[str, np.ndarray]
Labels = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Feeds of one model, in order; iterate it as often as needed.

    `rows` counts tokens of a text, or samples. `sha256` is that of the data as used, `samples` has a hash of each
    sample (of each window of a text). `token_input` is the input that a text is fed to. `labels` has the class of
    each sample, one `[batch]` array per feed; -1 stands for a sample that only fills up a batch. `classes` is the
    number of folders that labels were counted from.
    """

    name: str
    sha256: str
    rows: int
    feeds: Sequence[Arrays]
    token_input: str | None = None
    labels: tuple[Labels, ...] | None = None
    classes: int | None = None
    samples: frozenset[str] = frozenset()

    @property
    def metric(self) -> Literal["perplexity", "top-1", "agreement"]:
        """What can be measured on this data; without labels two models can only be compared."""
        if self.labels is not None:
            return "top-1"
        return "agreement" if self.token_input is None else "perplexity"

    def targets(self, number: int) -> Labels | None:
        """The right answers `[positions]` of a run: labels, or each token but the first of a window."""
        if self.labels is not None:
            return self.labels[number]
        if self.token_input is None:
            return None
        return self.feeds[number][self.token_input][:, 1:].reshape(-1).astype(np.int64)

    def __iter__(self) -> Iterator[Arrays]:
        return iter(self.feeds)


def hash_of(arrays: Arrays) -> str:
    """A hash of arrays, names aside."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
