"""`/predict`: any model, one run per request, JSON arrays by input name."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_sizes import fed_inputs
from onnx_autoglm.runtime import Session
from onnx_autoglm.serve_errors import HttpError
from onnx_autoglm.upcast import needs_upcast, upcast


class Predictor:
    """A model that is run one request at a time; `queue` more may wait."""

    def __init__(self, model: ir.Model, *, threads: int | None = None, queue: int = 64) -> None:
        """Loads the model; 16-bit graphs compute in float32. Raises UserError if it does not load."""
        ready = upcast(model) if needs_upcast(model) else model
        self._inputs = {value.name or "": value for value in fed_inputs(ready)}
        self._session = Session(ready, optimize=True, threads=threads)
        self._one, self._room = threading.Lock(), threading.BoundedSemaphore(1 + queue)

    def predict(self, data: Any) -> dict[str, Any]:
        """The outputs as nested lists by name; NaN and infinity, which JSON has not, become null.

        Raises HttpError: 400 for inputs that do not fit, 429 where too many wait.
        """
        feeds = self._feeds(data)
        if not self._room.acquire(blocking=False):
            raise HttpError(429, "too many requests wait", headers={"Retry-After": "1"})
        try:
            with self._one:
                found = self._session.run(feeds)
        except UserError as error:
            raise HttpError(400, str(error)) from error
        finally:
            self._room.release()
        return {"outputs": {name: _as_lists(array) for name, array in found.items()}}

    def _feeds(self, data: Any) -> dict[str, np.ndarray]:
        given = data.get("inputs") if isinstance(data, dict) else None
        if not isinstance(given, dict):
            raise HttpError(400, 'the body must be {"inputs": {name: array, ...}}', param="inputs")
        missing, unknown = sorted(set(self._inputs) - set(given)), sorted(set(given) - set(self._inputs))
        if missing or unknown:
            what = f"there is no input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise HttpError(400, f"{what}; inputs are {', '.join(self._inputs)}", param="inputs")
        return {name: _array(value, given[name]) for name, value in self._inputs.items()}


def _array(value: ir.Value, given: Any) -> np.ndarray:
    """One input. Raises HttpError where its numbers or its shape do not fit."""
    assert value.dtype is not None
    name, param = value.name or "", f"inputs.{value.name}"
    try:
        raw = np.asarray(given)
        if value.dtype == ir.DataType.STRING:
            array = raw.astype(object)
        elif raw.dtype.kind not in "biuf":
            raise ValueError
        else:
            array = raw.astype(value.dtype.numpy())
            if value.dtype.is_integer() and not np.array_equal(array, raw):
                raise ValueError
    except (ValueError, TypeError, OverflowError):
        message = f"input {name!r} must be an even array of {value.dtype.name.lower()}"
        raise HttpError(400, message, param=param) from None
    if value.shape is not None:
        fixed = [dim if isinstance(dim, int) else None for dim in value.shape]
        fits = len(fixed) == array.ndim and all(
            want in (None, size) for want, size in zip(fixed, array.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in fixed)
            message = f"input {name!r} has shape {list(array.shape)}, the model takes [{wanted}]"
            raise HttpError(400, message, param=param)
    return array


def _as_lists(array: np.ndarray) -> Any:
    plain = array.astype(np.float64) if array.dtype.kind == "V" else array
    if plain.dtype.kind == "f" and not np.isfinite(plain).all():
        return _without_nan(plain.tolist())
    return plain.tolist()


def _without_nan(data: Any) -> Any:
    if isinstance(data, list):
        return [_without_nan(item) for item in data]
    return data if math.isfinite(data) else None
