"""Calibration and evaluation data as feeds of a model: texts, arrays or images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from onnx_autoglm.data_arrays import load_arrays
from onnx_autoglm.data_images import SUFFIXES, find_images, load_images
from onnx_autoglm.data_text import load_texts
from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.errors import UserError

__all__ = ["Arrays", "Dataset", "load_dataset", "refuse_idle_preprocess"]

_KINDS = (".txt", ".npz", ".npy", ".json")


def load_dataset(
    path: Path,
    model: ir.Model,
    *,
    tokenizer: Path | None = None,
    window: int = 512,
    limit: int = 16384,
    preprocess: str | None = None,
) -> Dataset:
    """Reads data for a model.

    Args:
        path: a text file; `.npz` samples with one array per input (an array `labels` or `y` that is no input holds
            the classes); polygraphy's `.json`; or a folder of one kind of these. A folder of `.npy` files has one
            per input. A folder of images, or of one folder of images per class.
        model: the model that the feeds are for.
        tokenizer: `tokenizer.json` for texts.
        window: tokens per run of the model.
        limit: at most this many tokens of all texts together.
        preprocess: how images become inputs, such as `size=256,crop=224`; other data is taken as it is.

    Raises:
        UserError: nothing readable, a tokenizer that does not fit the vocabulary, or too little text.
    """
    files = _files(path)
    suffix = files[0].suffix.lower()
    if suffix in SUFFIXES:
        return load_images(path, files, model, preprocess)
    if suffix in (".npz", ".npy", ".json"):
        return load_arrays(path, files, model)
    return load_texts(path, files, model, tokenizer, window, limit)


def refuse_idle_preprocess(preprocess: str | None, paths: Iterable[Path | None]) -> None:
    """Raises UserError if images were to be preprocessed and none of the data is images."""
    given = [path for path in paths if path is not None]
    if preprocess is not None and not any(_files(path)[0].suffix.lower() in SUFFIXES for path in given):
        names = " and ".join(map(str, given)) or "nothing given"
        raise UserError(f"--preprocess is for images, and {names} holds none: leave it out")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = {suffix: sorted(path.glob(f"*{suffix}")) for suffix in _KINDS}
        found["images"] = find_images(path)
        kinds = {suffix: files for suffix, files in found.items() if files}
        if len(kinds) != 1:
            what = f"both {' and '.join(kinds)} files" if kinds else "neither .txt nor .npz files, nor images"
            raise UserError(f"{path} holds {what}: pass a folder of one kind")
        return next(iter(kinds.values()))
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: pass a text file, .npz samples, or a folder of texts or images"
        )
    return [path]
