"""What each output of a consumer is computed from, as rows: a convolution becomes a matrix product."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Rows = npt.NDArray[np.float32]


def patches(array: np.ndarray, node: ir.Node, kernel: tuple[int, ...], limit: int) -> tuple[Rows, np.ndarray]:
    """The windows `[n, channels * kernel]` that a convolution of one group reads, zeros where it pads.

    Args:
        array: the input `[batch, channels, ...]`.
        kernel: the sizes of the kernel.
        limit: take at most this many, evenly spread.

    Returns:
        The windows, and the flat index over `[batch, ...]` of the output position of each.
    """
    rank = len(kernel)
    strides = _ints(node, "strides", [1] * rank)
    dilations = _ints(node, "dilations", [1] * rank)
    pads = _pads(node, array.shape[2:], kernel, strides, dilations)
    padded = np.pad(array, [(0, 0), (0, 0), *pads])
    spread = tuple(d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spread, axis=tuple(range(2, 2 + rank)))
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    windows = np.moveaxis(windows[(slice(None), slice(None), *steps)], 1, 1 + rank)
    places = windows.shape[: 1 + rank]
    chosen = spread_out(int(np.prod(places)), limit)
    rows = windows[np.unravel_index(chosen, places)]
    return np.ascontiguousarray(rows.reshape(len(chosen), -1), dtype=np.float32), chosen


def spread_out(count: int, limit: int) -> np.ndarray:
    """At most `limit` of the indices below `count`, evenly spread without a period."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, limit, replace=False))


def _ints(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())


def _pads(
    node: ir.Node, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    rank = len(kernel)
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    if automatic == "NOTSET":
        given = _ints(node, "pads", [0] * (2 * rank))
        return [(given[axis], given[axis + rank]) for axis in range(rank)]
    if automatic == "VALID":
        return [(0, 0)] * rank
    result = []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (width - 1) + 1 - size, 0)
        half = total // 2
        result.append((half, total - half) if automatic == "SAME_UPPER" else (total - half, half))
    return result
