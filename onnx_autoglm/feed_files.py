"""Sample inputs from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_sizes import fed_inputs

Arrays = dict[str, np.ndarray]


def load_feeds(path: Path, model: ir.Model) -> Arrays:
    """The arrays of an .npz file, one per graph input.

    A bfloat16 input, which numpy cannot store, may also be float32, uint16 (its bits) or raw two-byte values.

    Raises:
        UserError: the file cannot be read, or its arrays do not fit the model's inputs.
    """
    return fit_feeds(str(path), read_npz(path), model)


def fit_feeds(where: str, arrays: Arrays, model: ir.Model) -> Arrays:
    """The arrays, one per graph input, in the types of the inputs; `where` is named in errors.

    Raises UserError if an input is missing, or a name, type, rank or static size does not fit.
    """
    inputs = {value.name or "": value for value in fed_inputs(model)}
    optional = {value.name or "" for value in model.graph.inputs} - inputs.keys()
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise UserError(
            f"{where} has no array for input {missing[0]!r}. The model needs: {', '.join(inputs)}."
        )
    unknown = sorted(arrays.keys() - inputs.keys() - optional)
    if unknown:
        raise UserError(
            f"{where} has an array {unknown[0]!r}, which is no input. Remove it; the model's inputs are: "
            f"{', '.join(inputs)}."
        )
    declared = {value.name or "": value for value in model.graph.inputs}
    return {name: _fitting(where, array, declared[name]) for name, array in arrays.items()}


def read_npz(path: Path) -> Arrays:
    """All arrays of an .npz file. Raises UserError if it cannot be read."""
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.lib.npyio.NpzFile):
            with data:
                return {name: data[name] for name in data.files}
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except Exception as error:  # numpy and zipfile raise many kinds
        raise UserError(
            f"{path} is not a readable .npz file: write it with numpy.savez, without object arrays."
        ) from error
    raise UserError(f"{path} holds a single array: write it with numpy.savez(path, input_name=array).")


def _fitting(source: str, array: np.ndarray, value: ir.Value) -> np.ndarray:
    """The array, if its type, rank and static sizes are those of the input."""
    where = f"{source}: input {value.name!r}"
    array = _typed(where, array, value)
    if value.shape is None:
        return array
    declared = f"[{', '.join(str(dim) for dim in value.shape)}]"
    if array.ndim != len(value.shape):
        raise UserError(f"{where} has shape {list(array.shape)}, the model wants {declared}: reshape it.")
    for axis, (size, dim) in enumerate(zip(array.shape, value.shape, strict=True)):
        if isinstance(dim, int) and size != dim:
            raise UserError(
                f"{where} has shape {list(array.shape)}, the model wants {declared}:"
                f" axis {axis} must be {dim}."
            )
    return array


def _typed(where: str, array: np.ndarray, value: ir.Value) -> np.ndarray:
    assert value.dtype is not None
    if value.dtype == ir.DataType.STRING:
        if array.dtype.kind in "US":
            return array.astype(object)
        raise UserError(f"{where} is {array.dtype}, the model wants strings.")
    wanted = np.dtype(value.dtype.numpy())
    if array.dtype == wanted:
        return array
    if value.dtype == ir.DataType.BFLOAT16:
        if array.dtype == np.float32:
            return array.astype(wanted)
        if array.dtype == np.uint16 or array.dtype.str[1:] == "V2":
            return array.view(wanted)
    raise UserError(
        f"{where} is {array.dtype}, the model wants {wanted}: save it with .astype({str(wanted)!r})."
    )
