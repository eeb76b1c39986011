"""Folders of images, read when they are needed. The folder of an image is its class."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import onnx_ir as ir

from onnx_autoglm.data_arrays import batch_size, fixed_batch
from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_sizes import fed_inputs
from onnx_autoglm.preprocess import Preprocess, plan_preprocess

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})


def find_images(folder: Path) -> list[Path]:
    """Images of a flat folder, or of its folders of classes, in order."""
    flat = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return flat or sorted(path for path in folder.glob("*/*") if path.suffix.lower() in SUFFIXES)


def load_images(path: Path, files: list[Path], model: ir.Model, preprocess: str | None) -> Dataset:
    """Images as feeds, decoded on each use, so that a large folder needs no memory.

    Classes count from 0 in the order of the names of their folders; folders that are all named by numbers are
    the classes of these numbers.

    Raises:
        UserError: Pillow is missing, the model takes no images, or `preprocess` does not fit.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise UserError("reading images needs Pillow: pip install 'onnx-autoglm[images]'") from error
    image = _image_input(path, model)
    steps = plan_preprocess(preprocess, image)
    fixed = fixed_batch(model)
    batch = fixed or batch_size(len(files))
    by_class, classes = (None, None) if path.is_file() or files[0].parent == path else _classes(path, files)
    if fixed and by_class is None and len(files) % fixed:
        raise UserError(
            f"{path} has {len(files)} images and the model takes {fixed} at once: pass a multiple"
        )
    groups = [tuple(files[start : start + batch]) for start in range(0, len(files), batch)]
    labels = None
    if by_class is not None:
        numbers = [[by_class[file.parent.name] for file in group] for group in groups]
        padded = [row + [-1] * ((fixed or len(row)) - len(row)) for row in numbers]
        labels = tuple(np.array(row, np.int64) for row in padded)
    hashes = [_hash(file) for file in files]
    digest = hashlib.sha256(repr((steps, hashes, labels)).encode())
    feeds = _Images(image, steps, tuple(groups), fixed)
    return Dataset(path.name, digest.hexdigest(), len(files), feeds, None, labels, classes, frozenset(hashes))


def _image_input(path: Path, model: ir.Model) -> ir.Value:
    inputs = fed_inputs(model)
    if len(inputs) != 1 or inputs[0].shape is None or len(inputs[0].shape) != 4:
        names = ", ".join(value.name or "?" for value in inputs)
        raise UserError(
            f"{path} holds images, but the model does not take one batch of images (its inputs: {names}): "
            "pass .npz samples"
        )
    return inputs[0]


def _classes(path: Path, files: list[Path]) -> tuple[dict[str, int], int | None]:
    """The class of each folder, and how many folders they were counted from (None: named by number)."""
    # A class without images counts too, or all behind it would be off by one.
    names = sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if all(name.isdecimal() for name in names):
        return {name: int(name) for name in names}, None
    return {name: index for index, name in enumerate(names)}, len(names)


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read the image {file}: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Images(Sequence[Arrays]):
    """Feeds of one input; each is made when it is asked for. A `batch` that is not full repeats its last image."""

    image: ir.Value
    steps: Preprocess
    groups: tuple[tuple[Path, ...], ...]
    batch: int | None

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Arrays: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Arrays]: ...
    def __getitem__(self, index: int | slice) -> Arrays | Sequence[Arrays]:
        if isinstance(index, slice):
            return dataclasses.replace(self, groups=self.groups[index])
        arrays = [self.steps(file) for file in self.groups[index]]
        arrays += arrays[-1:] * ((self.batch or len(arrays)) - len(arrays))
        batch = np.stack(arrays)
        dtype = np.dtype(np.float32) if self.image.dtype is None else self.image.dtype.numpy()
        if np.issubdtype(dtype, np.integer):
            limits = np.iinfo(str(dtype))
            batch = np.clip(np.rint(batch), limits.min, limits.max)
        return {self.image.name or "": batch.astype(dtype)}
