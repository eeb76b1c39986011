"""The little of protobuf's wire format that lets tensor bytes stay out of memory.

Parsing a ModelProto copies every `raw_data` into it, and serializing one copies them again. Both are avoided
by editing the serialized form: `detach_weights` swaps large payloads for references before parsing, and
`attach_weights` swaps references for payloads, to be streamed by the caller, after serializing.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx

# The `location` of a reference that stands for bytes inside the model file itself.
INSIDE = "*inside-the-model-file*"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_DEPTH = 100  # protobuf's own limit

# TensorProto
_DIMS_DTYPE, _FLOAT_DATA, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 2, 4, 9, 13, 14

# Where tensors live: for each message, the fields that lead to one.
_CHILDREN: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor"},
    "Function": {7: "Node"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph"},
}

Buffer = bytes | mmap.mmap


class WireError(ValueError):
    """The bytes are not a well-formed protobuf message."""


@dataclass(frozen=True)
class Payload:
    """`nbytes` of raw tensor data, to be supplied by the caller from its tensor number `index`."""

    index: int
    nbytes: int


Segment = bytes | Payload


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: where its tag starts, where its content lies, and a varint's value."""

    number: int
    wire_type: int
    tag: int
    start: int
    end: int
    value: int


def fields(buffer: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in `buffer[start:end]`."""
    position = start
    while position < end:
        tag = position
        key, position = _read_varint(buffer, position, end)
        number, wire_type, value = key >> 3, key & 7, 0
        content = position
        if wire_type == _VARINT:
            value, position = _read_varint(buffer, position, end)
        elif wire_type == _BYTES:
            length, content = _read_varint(buffer, position, end)
            position = content + length
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _FIXED64:
            position += 8
        else:
            raise WireError(f"wire type {wire_type} at byte {tag}")
        if number == 0:
            raise WireError(f"field number 0 at byte {tag}")
        if position > end:
            raise WireError(f"field {number} at byte {tag} needs {position - end} more bytes")
        yield Field(number, wire_type, tag, content, position, value)


def detach_weights(buffer: Buffer, threshold: int) -> bytes:
    """A serialized ModelProto with each tensor payload of more than `threshold` bytes made external.

    The references have the location `INSIDE`; offset and length say where in `buffer` the payload is.
    """

    def edit(start: int, end: int) -> list[Segment] | None:
        payload = _payload_of(buffer, start, end)
        if payload is None or payload.end - payload.start <= threshold:
            return None
        entries = {"location": INSIDE, "offset": payload.start, "length": payload.end - payload.start}
        proto = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
        for name, value in entries.items():
            proto.external_data.add(key=name, value=str(value))
        return [buffer[start : payload.tag], proto.SerializeToString(), buffer[payload.end : end]]

    # A message that is shorter than the threshold cannot hold a payload that is longer.
    segments = _rewrite(buffer, "Model", 0, len(buffer), lambda start, end: end - start > threshold, edit)
    return b"".join(segment for segment in segments if isinstance(segment, bytes))


def attach_weights(buffer: bytes) -> list[Segment]:
    """The inverse: replace each reference to `INSIDE` by a payload; its offset is the caller's tensor index."""
    mark = INSIDE.encode()

    def edit(start: int, end: int) -> list[Segment] | None:
        proto = onnx.TensorProto.FromString(buffer[start:end])
        entries = {entry.key: entry.value for entry in proto.external_data}
        if entries.get("location") != INSIDE:
            return None
        proto.ClearField("external_data")
        proto.ClearField("data_location")
        payload = Payload(int(entries["offset"]), int(entries["length"]))
        header = _varint(_RAW_DATA << 3 | _BYTES) + _varint(payload.nbytes)
        return [proto.SerializeToString() + header, payload]

    return _rewrite(
        buffer, "Model", 0, len(buffer), lambda start, end: buffer.find(mark, start, end) >= 0, edit
    )


def total_bytes(segments: Sequence[Segment]) -> int:
    """The length of the message that the segments make up."""
    return sum(len(segment) if isinstance(segment, bytes) else segment.nbytes for segment in segments)


def _payload_of(buffer: Buffer, start: int, end: int) -> Field | None:
    """The one field of a TensorProto that holds its data as plain little-endian bytes, if there is one."""
    candidates = []
    dtype = 0
    for field in fields(buffer, start, end):
        if field.number in (_EXTERNAL_DATA, _DATA_LOCATION):
            return None
        if field.number == _DIMS_DTYPE:
            dtype = field.value
        if field.number in (_RAW_DATA, _FLOAT_DATA) and field.wire_type == _BYTES:
            candidates.append(field)
    if len(candidates) != 1:
        return None
    # A packed `float_data` of a float32 tensor is the same bytes as its `raw_data`.
    is_raw = candidates[0].number == _RAW_DATA or dtype == onnx.TensorProto.FLOAT
    return candidates[0] if is_raw else None


def _rewrite(
    buffer: Buffer,
    kind: str,
    start: int,
    end: int,
    wanted: Callable[[int, int], bool],
    edit: Callable[[int, int], list[Segment] | None],
    depth: int = 0,
) -> list[Segment]:
    """Replace the content of each TensorProto below a message by what `edit` gives (None: leave as is)."""
    if depth > _MAX_DEPTH:
        raise WireError(f"messages nested deeper than {_MAX_DEPTH}")
    children = _CHILDREN[kind]
    segments: list[Segment] = []
    copied = start
    for field in fields(buffer, start, end):
        child = children.get(field.number)
        if child is None or field.wire_type != _BYTES or not wanted(field.start, field.end):
            continue
        if child == "Tensor":
            new = edit(field.start, field.end)
        else:
            new = _rewrite(buffer, child, field.start, field.end, wanted, edit, depth + 1)
        if new is None:
            continue
        header = _varint(field.number << 3 | _BYTES) + _varint(total_bytes(new))
        segments += [buffer[copied : field.tag], header, *new]
        copied = field.end
    return [*segments, buffer[copied:end]]


def _read_varint(buffer: Buffer, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = buffer[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise WireError(f"number cut short at byte {position}")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
