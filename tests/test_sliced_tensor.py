"""Selections, against numpy's own."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_autoglm.mapped_tensor import MappedFile, MappedTensor
from onnx_autoglm.sliced_tensor import SlicedTensor

DTYPES = [
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    ml_dtypes.float8_e4m3fn,
    np.int64,
    np.int8,
    np.complex128,
]


def _source(shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    values = np.random.default_rng(0).integers(-100, 100, size=shape)
    return values.astype(np.float32).astype(dtype)


def _mapped(array: np.ndarray, path, offset: int) -> MappedTensor:
    path.write_bytes(b"x" * offset + array.tobytes())
    dtype = ir.DataType.from_numpy(array.dtype)
    shape = ir.Shape(array.shape)
    described = ir.ExternalTensor("", offset, array.nbytes, dtype, shape=shape, name="w")
    return MappedTensor(MappedFile.open(path), offset, described)


def _expected(array: np.ndarray, kept: dict, outer: dict) -> np.ndarray:
    """The definition: result[i, j, ...] = array[source(i), source(j), ...], one element at a time."""
    shape = [kept[a].shape[-1] if a in kept else n for a, n in enumerate(array.shape)]
    result = np.empty(shape, dtype=array.dtype)
    for index in np.ndindex(*shape):
        at = [int(kept[a][i]) if a in kept and a not in outer else i for a, i in enumerate(index)]
        for axis, along in outer.items():
            at[axis] = int(kept[axis][at[along]][index[axis]])
        result[index] = array[tuple(at)]
    return result


@st.composite
def selections(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    kept: dict[int, np.ndarray] = {}
    outer: dict[int, int] = {}

    def indices(size: int, count: int) -> list[int]:
        return sorted(draw(st.permutations(range(size)))[:count])

    for axis in draw(st.lists(st.integers(0, len(shape) - 1), unique=True)):
        kept[axis] = np.array(indices(shape[axis], draw(st.integers(0, shape[axis]))), dtype=np.int64)
    for axis in sorted(set(range(len(shape))) - set(kept)):
        others = [a for a in range(len(shape)) if a != axis and a not in outer and axis not in outer.values()]
        if others and draw(st.booleans()):
            outer[axis] = draw(st.sampled_from(others))
            count = draw(st.integers(1, shape[axis]))
            rows = [indices(shape[axis], count) for _ in range(shape[outer[axis]])]
            kept[axis] = np.array(rows, dtype=np.int64)
    return shape, kept, outer


@settings(max_examples=300, deadline=None)
@given(selections(), st.sampled_from(DTYPES), st.sampled_from([1, 16, 64, 1 << 20]))
def test_equals_the_definition(selection, dtype, max_bytes):
    shape, kept, outer = selection
    array = _source(shape, dtype)
    tensor = SlicedTensor(ir.Tensor(array, name="w"), kept, outer)
    expected = _expected(array, kept, outer)
    assert tensor.name == "w" and tensor.dtype == ir.DataType.from_numpy(array.dtype)
    assert tuple(tensor.shape) == expected.shape and tensor.nbytes == expected.nbytes
    assert tensor.numpy().dtype == array.dtype
    np.testing.assert_array_equal(tensor.numpy(), expected)
    assert b"".join(chunk.tobytes() for chunk in tensor.chunks(max_bytes)) == expected.tobytes()
    assert all(chunk.ndim == len(shape) for chunk in tensor.chunks(max_bytes))
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == tensor.tobytes() == expected.tobytes()


@settings(max_examples=100, deadline=None)
@given(selections(), st.data())
def test_a_selection_of_a_selection_reads_the_first_source(selection, data):
    shape, kept, outer = selection
    array = _source(shape)
    first = SlicedTensor(ir.Tensor(array), kept, outer)
    sizes = tuple(first.shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    chosen = sorted(data.draw(st.permutations(range(sizes[axis])))[: data.draw(st.integers(0, sizes[axis]))])
    second = SlicedTensor(first, {axis: np.array(chosen, dtype=np.int64)})
    assert second.source is first.source
    np.testing.assert_array_equal(second.numpy(), np.take(first.numpy(), np.array(chosen, int), axis=axis))


def test_a_varying_selection_of_a_selection():
    array = _source((4, 6))
    first = SlicedTensor(ir.Tensor(array), {0: np.array([1, 3])})
    rows = np.array([[0, 5], [2, 3]])
    second = SlicedTensor(first, {1: rows}, {1: 0})
    np.testing.assert_array_equal(second.numpy(), np.take_along_axis(array[[1, 3]], rows, axis=1))


@pytest.mark.parametrize("offset", [0, 3, 64])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int64])
def test_a_mapped_source_at_any_offset(tmp_path, dtype, offset):
    array = _source((20, 3, 8), dtype)
    kept = {0: np.array([0, 1, 4, 19]), 2: np.array([1, 2, 7])}
    tensor = SlicedTensor(_mapped(array, tmp_path / "data", offset), kept)
    np.testing.assert_array_equal(tensor.numpy(), array[[0, 1, 4, 19]][:, :, [1, 2, 7]])


def test_a_row_that_is_larger_than_a_chunk_is_cut():
    array = _source((2, 64, 64))
    tensor = SlicedTensor(ir.Tensor(array), {1: np.arange(0, 64, 2)})
    chunks = list(tensor.chunks(max_bytes=1024))
    assert max(chunk.nbytes for chunk in chunks) <= 1024
    assert b"".join(chunk.tobytes() for chunk in chunks) == array[:, ::2].tobytes()


def test_its_serialized_form_is_plain():
    array = _source((4, 6))
    proto = ir.serde.serialize_tensor(SlicedTensor(ir.Tensor(array, name="w"), {1: np.array([0, 2])}))
    assert proto.name == "w" and list(proto.dims) == [4, 2] and proto.raw_data == array[:, [0, 2]].tobytes()


@pytest.mark.parametrize(
    ("kept", "outer", "message"),
    [
        ({2: [0]}, {}, "no axis 2"),
        ({0: [0, 4]}, {}, "outside 0..3"),
        ({0: [-1]}, {}, "outside 0..3"),
        ({0: [1, 1]}, {}, "do not ascend"),
        ({1: [[0], [1]]}, {}, "varies"),
        ({1: [[0], [1]]}, {1: 0}, "2 selections, but axis 0 has 4"),
        ({1: [[0], [1]]}, {1: 1}, "cannot vary"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(kept, outer, message):
    with pytest.raises(ValueError, match=message):
        SlicedTensor(ir.Tensor(_source((4, 6))), {a: np.array(i) for a, i in kept.items()}, outer)


def test_packed_and_text_tensors_are_refused():
    packed = ir.Tensor(np.zeros(4, dtype=ml_dtypes.int4), name="q")
    with pytest.raises(NotImplementedError, match="INT4 tensor 'q'"):
        SlicedTensor(packed, {0: np.array([0])})
    text = ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]), name="s")
    with pytest.raises(NotImplementedError, match="STRING tensor 's'"):
        SlicedTensor(text, {0: np.array([0])})
