"""Model files: opened with the weights left on disk, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import google.protobuf.message
import onnx
import onnx_ir as ir

from onnx_autoglm import wire
from onnx_autoglm.errors import UserError
from onnx_autoglm.mapped_tensor import MappedFile, MappedTensor
from onnx_autoglm.sliced_tensor import root_source
from onnx_autoglm.tensor_slots import Slot, identity, parameters, tensor_slots, weight_bytes

__all__ = [
    "check_output_path",
    "data_path",
    "has_external_data",
    "open_model",
    "parameters",
    "save_model",
    "source_files",
    "weight_bytes",
]

logger = logging.getLogger(__name__)

SMALL_BYTES = 1 << 10  # tensors up to this size are read into memory, and written into the model file
EXTERNAL_BYTES = 1 << 30  # models with more weights than this get a data file
_PROTOBUF_LIMIT = (1 << 31) - 1
_LARGE_BYTES, _LARGE_ALIGNMENT, _ALIGNMENT = 1 << 20, 4096, 64
_SOURCE = "autoglm.source"

Progress = Callable[[int, int], None]

# --- opening -----------------------------------------------------------------------------------------------


def open_model(path: Path | str) -> ir.Model:
    """Open a model of any size. Every weight of more than 1 KiB stays in its file, mapped into memory.

    Raises UserError if the file is not a whole ONNX model, or if its external data is missing, short, or
    outside its folder.
    """
    path = Path(path)
    file = _map_model_file(path)
    proto = _parse(path, file)
    try:
        model = ir.serde.deserialize_model(proto)
        slots = tensor_slots(model)
        for slot in slots:
            _check_tensor(slot.tensor)
    except Exception as error:  # whatever onnx-ir makes of a damaged file
        raise UserError(f"{path}: not a valid ONNX model ({error}); export it again") from error
    files: dict[Path, MappedFile] = {}
    for slot in slots:
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.put(_map_tensor(path, file, files, slot.tensor))
    model.meta[_SOURCE] = file.path
    opset = model.opset_imports.get("", 0)
    if 0 < opset < 11:
        logger.warning("%s: opset %d is older than 11, the oldest that is supported", path, opset)
    return model


def source_files(model: ir.Model) -> list[Path]:
    """The files that an opened model reads from: the model file first, then its external data."""
    source = model.meta.get(_SOURCE)
    files = [] if source is None else [source]
    for slot in tensor_slots(model):
        tensor = root_source(slot.tensor)
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path) not in files:
            files.append(Path(tensor.path))
    return files


def has_external_data(model: ir.Model) -> bool:
    """Whether the model was opened from a model file with external data."""
    return len(source_files(model)) > 1


def _map_model_file(path: Path) -> MappedFile:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the path of the .onnx file in it")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; export or copy the model again")
        return MappedFile.open(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(path: Path, file: MappedFile) -> onnx.ModelProto:
    start = file.data[:200]
    if start.startswith(b"version ") and b"git-lfs" in start:
        raise UserError(f"{path} is a Git LFS pointer, not the model itself; run `git lfs pull` first")
    try:
        proto = onnx.ModelProto.FromString(wire.detach_weights(file.data, SMALL_BYTES))
    except (wire.WireError, google.protobuf.message.DecodeError) as error:
        if not _starts_like_a_model(start):
            raise UserError(f"{path} is not an ONNX file") from error
        raise UserError(f"{path} is truncated or damaged ({error}); export or copy it again") from error
    if not proto.HasField("graph"):
        if not _starts_like_a_model(start):
            raise UserError(f"{path} is not an ONNX file")
        raise UserError(f"{path} holds no graph; it is truncated or was not exported as a model")
    if proto.graph.sparse_initializer:
        raise UserError(
            f"{path} has sparse initializers, which are not supported; export it with dense weights"
        )
    return proto


def _starts_like_a_model(start: bytes) -> bool:
    """Whether the bytes begin with a plausible IR version: field 1, a small number."""
    return len(start) > 1 and start[0] == 0x08 and 0 < start[1] < 0x80


def _check_tensor(tensor: ir.TensorProtocol) -> None:
    """Raise if a tensor has no usable type or shape, or holds other data than those say."""
    if min(tensor.shape.numpy(), default=0) < 0:
        raise ValueError(f"tensor {tensor.name!r} has shape {tensor.shape}")
    if not isinstance(tensor, ir.ExternalTensor):
        tensor.numpy()
    elif tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth == 0:
        raise ValueError(f"tensor {tensor.name!r} of type {tensor.dtype.name} is external")


def _map_tensor(
    path: Path, model_file: MappedFile, files: dict[Path, MappedFile], tensor: ir.ExternalTensor
) -> MappedTensor:
    inside = tensor.location == wire.INSIDE
    where = f"weight {tensor.name!r} of {path}"
    needed = tensor.nbytes
    if tensor.length is not None and tensor.length < needed:
        raise UserError(f"{where} needs {needed} bytes but has {tensor.length}; export the model again")
    file = model_file if inside else _external_file(path, files, os.fsdecode(tensor.location))
    offset = tensor.offset or 0
    missing = offset + needed - len(file.data)
    if missing > 0:
        raise UserError(
            f"{tensor.location}, the external data of {path}, is {missing} bytes too short; copy it again"
        )
    return MappedTensor(file, offset, tensor)


def _external_file(path: Path, files: dict[Path, MappedFile], location: str) -> MappedFile:
    data = path.parent / location
    if data in files:
        return files[data]
    normal = os.path.normpath(location)
    # Where the model file is a link into a store (as download caches have it), its data may be there too.
    folders = {path.parent.resolve(), path.resolve().parent}
    try:
        target = data.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, links in a circle, a zero byte
        raise UserError(f"{path} refers to external data at {location!r}: {error}") from error
    if os.path.isabs(location) or normal.split(os.sep)[0] == os.pardir or folders.isdisjoint(target.parents):
        raise UserError(
            f"{path} refers to external data outside its folder: {location!r}; move the data beside it"
        )
    if not data.is_file():
        raise UserError(f"{data} is missing: {path.name} keeps its weights there; put it beside the model")
    try:
        files[data] = MappedFile.open(data)
    except ValueError as error:  # nothing to map
        raise UserError(f"{data}, the external data of {path}, is empty; copy it again") from error
    except OSError as error:
        raise UserError(f"{data} cannot be read: {error.strerror or error}") from error
    return files[data]


# --- saving ------------------------------------------------------------------------------------------------


def check_output_path(source: ir.Model | Path | str, out: Path | str) -> None:
    """Raise UserError unless a model can be written to `out` without touching any file of `source`."""
    out = Path(out)
    model = source if isinstance(source, ir.Model) else open_model(source)
    _refuse_to_overwrite(source_files(model), out)
    if out.is_dir():
        raise UserError(f"{out} is a folder; give the path of a file to write")
    folder = out.absolute().parent
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"cannot write {out}: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write {out}: no permission to write in {folder}; choose another output folder"
        )


def data_path(path: Path) -> Path:
    """The external data file of a model file."""
    return path.with_name(path.name + ".data")


def save_model(
    model: ir.Model, path: Path | str, *, external: bool | None = None, progress: Progress | None = None
) -> None:
    """Write a model whole or not at all, one tensor at a time; the model is unchanged.

    Args:
        model: The model; its tensors may be in files, in memory, or lazy.
        path: The model file. External data goes beside it, to the same name with `.data` added.
        external: Whether to write external data; by default for more than 1 GB of weights.
        progress: Called with the bytes written so far and in all.
    """
    path = Path(path)
    _refuse_to_overwrite(source_files(model), path)
    if external is None:
        external = weight_bytes(model) > EXTERNAL_BYTES
    layout = _lay_out(model, data_path(path).name if external else None)
    needed = layout.data_bytes + wire.total_bytes(layout.segments)
    if needed - layout.data_bytes > _PROTOBUF_LIMIT:
        raise UserError(f"{path} would exceed the 2 GB that an ONNX file can hold; write external data")
    meter = _Meter(progress, needed)
    with (
        _new_folder(path.parent),
        _explained(path.parent, needed),
        _replacing(path, layout) as (model_part, data_part),
    ):
        if data_part is not None:
            with data_part.open("wb") as file:
                for offset, tensor in layout.data:
                    file.seek(offset)
                    _write_tensor(tensor, file, meter)
        with model_part.open("wb") as file:
            for segment in layout.segments:
                if isinstance(segment, wire.Payload):
                    _write_tensor(layout.inline[segment.index], file, meter)
                else:
                    file.write(segment)


@dataclass
class _Layout:
    """Where each byte of the output goes."""

    segments: list[wire.Segment]  # the model file
    inline: list[ir.TensorProtocol]  # the tensors that its payloads stand for
    data: list[tuple[int, ir.TensorProtocol]]  # the data file: tensors by offset
    data_bytes: int


def _lay_out(model: ir.Model, data_name: str | None) -> _Layout:
    """Serialize the model with references in place of its tensors, and say where the tensors go.

    Tensors of node attributes stay inside the model file: few runtimes look for them elsewhere.
    """
    layout = _Layout([], [], [], 0)
    offsets: dict[object, int] = {}
    changed: list[Slot] = []
    try:
        for slot in tensor_slots(model):
            tensor = slot.tensor
            if not _is_streamed(tensor):
                continue
            if data_name is not None and slot.is_initializer and tensor.nbytes > SMALL_BYTES:
                location = data_name
                offset = offsets.setdefault(identity(tensor), _aligned(layout.data_bytes, tensor.nbytes))
                if offset >= layout.data_bytes:
                    layout.data.append((offset, tensor))
                    layout.data_bytes = offset + tensor.nbytes
            else:
                location, offset = wire.INSIDE, len(layout.inline)
                layout.inline.append(tensor)
            changed.append(slot)
            slot.put(_reference(slot, location, offset))
        skeleton = ir.serde.serialize_model(model).SerializeToString()
    finally:
        for slot in changed:
            slot.put(slot.tensor)
    layout.segments = wire.attach_weights(skeleton)
    return layout


def _is_streamed(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor's bytes bypass the serializer. All that are not plainly in memory must."""
    if tensor.dtype == ir.DataType.STRING:
        return False
    return tensor.nbytes > SMALL_BYTES or isinstance(tensor, ir.ExternalTensor | ir.LazyTensor)


def _reference(slot: Slot, location: str, offset: int) -> ir.ExternalTensor:
    tensor = slot.tensor
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=slot.name or tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _aligned(offset: int, nbytes: int) -> int:
    alignment = _LARGE_ALIGNMENT if nbytes >= _LARGE_BYTES else _ALIGNMENT
    return -(-offset // alignment) * alignment


@dataclass
class _Meter:
    """Counts the bytes that were written."""

    report: Progress | None
    total: int
    done: int = 0

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.report is not None:
            self.report(self.done, self.total)


def _write_tensor(tensor: ir.TensorProtocol, file: BinaryIO, meter: _Meter) -> None:
    start = file.tell()
    if hasattr(tensor, "tofile"):  # not every tensor type has it
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    written = file.tell() - start
    if written != tensor.nbytes:
        raise RuntimeError(f"tensor {tensor.name!r} has {tensor.nbytes} bytes, but wrote {written}")
    meter.add(written)


def _refuse_to_overwrite(inputs: list[Path], out: Path) -> None:
    for target in (out, data_path(out)):
        for file in inputs:
            # Also by another name: a link of either kind, or another spelling.
            if target.exists() and file.exists() and target.samefile(file):
                raise UserError(f"{target} is an input file ({file}); choose another output path")


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Create a folder and its parents; remove those again, where empty, if the block fails."""
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the folder {folder}: {error.strerror or error}") from error
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in created:
                parent.rmdir()
        raise


@contextlib.contextmanager
def _explained(folder: Path, needed: int) -> Iterator[None]:
    """Turn the file-system errors that a user can fix into UserErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder).free
            raise UserError(
                f"no room in {folder}: the model needs {needed} bytes and {free} are free; nothing was written"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write in {folder}; choose another output folder") from error
        raise


@contextlib.contextmanager
def _replacing(path: Path, layout: _Layout) -> Iterator[tuple[Path, Path | None]]:
    """Temporary files beside the outputs, which take their place if the block succeeds and vanish if not."""
    mark = f".{os.getpid()}.tmp"
    model_part = path.with_name(f".{path.name}{mark}")
    data = data_path(path)
    data_part = data.with_name(f".{data.name}{mark}") if layout.data else None
    try:
        yield model_part, data_part
        # The model last: once it is there, all that it refers to is there.
        if data_part is not None:
            data_part.replace(data)
        model_part.replace(path)
    finally:
        for part in (model_part, data_part):
            if part is not None:
                part.unlink(missing_ok=True)
