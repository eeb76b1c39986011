"""Samples as arrays: `.npz` files, a folder of `.npy` files, and polygraphy's JSON; with labels or without."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.dataset import Arrays, Dataset, Labels, hash_of
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_files import fit_feeds, read_npz
from onnx_autoglm.feed_sizes import fed_inputs

LABELS = ("labels", "y")
MAX_BATCH = 32
_RUNS = 20  # statistics hold some runs out, so few samples are not put into one


def load_arrays(path: Path, files: list[Path], model: ir.Model) -> Dataset:
    """Reads samples: each file (or each entry of a JSON file) is one run or, with labels, many samples.

    Args:
        path: what the user named.
        files: `.npz`, `.json` files, or the `.npy` files of one folder.
        model: the model whose inputs the arrays are.

    Raises:
        UserError: a file cannot be read, or its arrays do not fit the inputs.
    """
    if files[0].suffix == ".npy":
        sets = [_read_folder(path, files)] if path.is_dir() else [(str(path), read_npz(path))]
    elif files[0].suffix == ".json":
        sets = [entry for file in files for entry in _read_json(file)]
    else:
        sets = [(str(file), read_npz(file)) for file in files]
    taken = {value.name for value in model.graph.inputs}
    feeds: list[Arrays] = []
    labels: list[Labels] = []
    samples: list[str] = []
    rows, labelled = 0, [_label_name(arrays, taken) is not None for _, arrays in sets]
    if any(labelled) != all(labelled):
        raise UserError(
            f"{path}: some samples have labels and some have none; give all of them labels, or none"
        )
    for where, arrays in sets:
        name = _label_name(arrays, taken)
        own = None if name is None else _as_labels(where, arrays[name])
        inputs = {key: array for key, array in arrays.items() if key != name}
        batches, targets, count = _batches(where, inputs, own, model)
        feeds += [fit_feeds(where, batch, model) for batch in batches]
        labels += targets
        samples += _hashes(inputs, own)
        rows += count
    digest = hashlib.sha256("".join(map(hash_of, feeds)).encode() + b"".join(one.tobytes() for one in labels))
    return Dataset(
        path.name,
        digest.hexdigest(),
        rows,
        tuple(feeds),
        labels=tuple(labels) if all(labelled) else None,
        samples=frozenset(samples),
    )


def _label_name(arrays: Arrays, taken: set[str | None]) -> str | None:
    return next((name for name in LABELS if name in arrays and name not in taken), None)


def _as_labels(where: str, array: np.ndarray) -> Labels:
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else np.atleast_1d(array)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(
            f"{where}: labels are {array.dtype} of shape {list(array.shape)}; expected one integer per sample"
        )
    if array.size and array.min() < 0:
        raise UserError(f"{where}: label {array.min()} is negative; labels count from 0")
    return array.astype(np.int64)


def _batches(
    where: str, inputs: Arrays, labels: Labels | None, model: ir.Model
) -> tuple[list[Arrays], list[Labels], int]:
    """The arrays cut along axis 0 into runs, the labels of each run, and the number of samples."""
    fixed, count = fixed_batch(model), _sample_count(inputs)
    if labels is not None and count != len(labels):
        have = {name: list(array.shape) for name, array in inputs.items()}
        raise UserError(
            f"{where}: {len(labels)} labels, but the inputs have shapes {have}: one label per sample"
        )
    if count is None:
        first = next(iter(inputs.values()), np.zeros(0))
        return [inputs], [], first.shape[0] if first.ndim else 1
    is_one_run = count < _RUNS or not has_open_batch(model) if fixed is None else count <= fixed
    if labels is None and is_one_run:
        return [inputs], [], count  # as the file has it
    batch = fixed or batch_size(count)
    if labels is None and fixed is not None and count % batch:
        raise UserError(
            f"{where} has {count} samples and the model takes batches of {batch}: pass a multiple of {batch}"
        )
    runs, targets = [], []
    for start in range(0, count, batch):
        rows = np.arange(start, start + batch)
        real = rows < count
        if fixed is None:
            rows, real = rows[real], real[real]
        rows = np.minimum(rows, count - 1)
        runs.append({name: array[rows] for name, array in inputs.items()})
        if labels is not None:
            targets.append(np.where(real, labels[rows], -1))
    return runs, targets, count


def batch_size(count: int) -> int:
    """How many of `count` samples to run at once where the model leaves it open."""
    return max(1, min(MAX_BATCH, count // _RUNS))


def fixed_batch(model: ir.Model) -> int | None:
    """The declared batch if all inputs have the same number as axis 0, else None."""
    sizes = {
        value.shape[0] if value.shape is not None and len(value.shape) else None
        for value in fed_inputs(model)
    }
    size = next(iter(sizes)) if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def has_open_batch(model: ir.Model) -> bool:
    """Whether all inputs share one symbol as axis 0."""
    sizes = {
        str(value.shape[0]) if value.shape is not None and len(value.shape) else ""
        for value in fed_inputs(model)
        if value.shape is None or not len(value.shape) or not isinstance(value.shape[0], int)
    }
    return len(sizes) == 1 and not sizes & {"", "None"} and fixed_batch(model) is None


def _sample_count(inputs: Arrays) -> int | None:
    """The common size of axis 0, or None if there is none."""
    sizes = {array.shape[0] if array.ndim else None for array in inputs.values()}
    return sizes.pop() if len(sizes) == 1 else None


def _hashes(inputs: Arrays, labels: Labels | None) -> list[str]:
    count = _sample_count(inputs)
    whole = [hash_of(inputs)]
    if count is None or (labels is None and count == 1):
        return whole
    return whole + [hash_of({name: array[row] for name, array in inputs.items()}) for row in range(count)]


def _read_folder(path: Path, files: list[Path]) -> tuple[str, Arrays]:
    """One array per input, each in a file of its name. Raises UserError."""
    arrays = {}
    for file in files:
        try:
            arrays[file.stem] = np.load(file, allow_pickle=False)
        except Exception as error:  # numpy raises many kinds
            raise UserError(f"{file} is not a readable .npy file: write it with numpy.save") from error
    return f"{path}/*.npy", arrays


def _read_json(file: Path) -> list[tuple[str, Arrays]]:
    """The feeds that polygraphy saved (`--save-inputs`, or `save_json` of a list of feeds). Raises UserError."""
    try:
        from polygraphy.json import load_json
    except ImportError as error:
        raise UserError(
            f"reading {file} needs polygraphy: pip install 'onnx-autoglm[polygraphy]'; or save the samples as .npz"
        ) from error
    try:
        content = load_json(str(file))
    except Exception as error:  # whatever its decoder makes of a foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} is not JSON that polygraphy reads ({reason})") from error
    fits = isinstance(content, list) and all(
        isinstance(feed, dict) and all(isinstance(array, np.ndarray) for array in feed.values())
        for feed in content
    )
    if not fits or not content:
        raise UserError(
            f"{file} holds no list of feeds: write it with polygraphy run --save-inputs, or with "
            "polygraphy.json.save_json([{input: array}, ...], path)"
        )
    return [(f"{file}, feed {number}", dict(feed)) for number, feed in enumerate(content)]
