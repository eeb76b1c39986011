"""Masking a source from a plan alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from helpers import initializer, maker, model, prune, replayed

from onnx_autoglm.errors import UserError
from onnx_autoglm.passes.mask import keep_mask, mask
from onnx_autoglm.runtime import Session

FFN = """
g (float[N,6] x) => (float[N,6] y) <float[6,16] w, float[16] b, float[16,6] v>
{ h0 = MatMul(x, w)  h = Add(h0, b)  r = Relu(h)  y = MatMul(r, v) }
"""


def operand(target: ir.Model, output: str) -> np.ndarray:
    """The constant second input of the node that makes `output`."""
    (node,) = [node for node in target.graph if node.outputs[0].name == output]
    value = node.inputs[1]
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def test_what_is_not_kept_is_zero_and_nothing_else_changes() -> None:
    source = model(FFN)
    plan = replayed(prune(source, {"ffn-channel": 0.5}).plan({}))
    kept = next(entry["kept"] for entry in plan.removals if entry["initializer"] == "w")
    masked = mask(source.clone(), plan.removals, plan.lossy)
    expected = np.zeros((6, 16), np.float32)
    expected[:, kept] = initializer(source, "w")[:, kept]
    np.testing.assert_array_equal(operand(masked, "h0"), expected)
    assert np.count_nonzero(operand(masked, "h")) == 8
    assert np.count_nonzero(operand(masked, "y")) == 8 * 6
    np.testing.assert_array_equal(initializer(source, "w") != 0, True)


def test_only_the_named_consumers_see_the_mask() -> None:
    source = model("""
        g (float[N,6] x) => (float[N,6] y) <float[6,16] w0, float[6,16] w1, float[16] b, float[16,6] v0, float[16,6] v1>
        { a0 = MatMul(x, w0)  b0 = Add(a0, b)  c0 = Relu(b0)  d = MatMul(c0, v0)  a1 = MatMul(d, w1)  b1 = Add(a1, b)
          c1 = Relu(b1)  y = MatMul(c1, v1) }
        """)
    plan = replayed(prune(source, {maker(source, "w1"): 0.5}).plan({}))
    masked = mask(source.clone(), plan.removals, plan.lossy)
    assert np.count_nonzero(operand(masked, "b0")) == 16
    assert np.count_nonzero(operand(masked, "b1")) == 8


def test_keep_mask_joins_cuts_of_several_axes() -> None:
    keep = keep_mask((3, 4), [{"axis": 0, "kept": [0, 2]}, {"axis": 1, "kept": [1]}])
    np.testing.assert_array_equal(np.argwhere(keep), [[0, 1], [2, 1]])


@pytest.mark.parametrize(("axis", "outer"), [(1, 0), (0, 1), (2, 0), (0, 2)])
def test_keep_mask_of_a_selection_that_varies(axis: int, outer: int) -> None:
    shape = (3, 3, 3)
    rows = [[0, 1], [1, 2], [0, 2]]
    keep = np.broadcast_to(keep_mask(shape, [{"axis": axis, "outer_axis": outer, "kept": rows}]), shape)
    for index in np.ndindex(shape):
        assert keep[index] == (index[axis] in rows[index[outer]])


def test_a_large_weight_is_masked_in_the_graph_before_all_its_users() -> None:
    """It stays on disk; the product with the mask is computed when the graph runs."""
    source = model("""
        g (float[N,8] x) => (float[N,8] y) <float[8,40000] w, float[40000,8] v>
        { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, v)  d = MatMul(c, w)  e = Relu(d)  y = MatMul(e, v) }
        """)
    plan = replayed(prune(source, {"ffn-channel": 0.5}).plan({}))
    masked = mask(source.clone(), plan.removals, plan.lossy)
    assert [node.op_type for node in masked.graph].count("Mul") == 2
    np.testing.assert_array_equal(initializer(masked, "w"), initializer(source, "w"))
    x = np.ones((2, 8), np.float32)
    small = source.clone()
    for entry in plan.removals:
        value = small.graph.initializers[entry["initializer"]]
        assert value.const_value is not None
        keep = keep_mask(value.const_value.shape.numpy(), [entry])  # type: ignore[union-attr]
        value.const_value = ir.Tensor(value.const_value.numpy() * keep.astype(np.float32), name=value.name)
    expected, actual = Session(small).run({"x": x})["y"], Session(masked).run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_a_plan_of_another_source_is_refused() -> None:
    plan = replayed(prune(model(FFN), {"ffn-channel": 0.5}).plan({}))
    with pytest.raises(
        UserError, match="the plan cuts 'w', which the source does not hold: is it the right source"
    ):
        mask(model(FFN.replace(" w", " other").replace("(x, w)", "(x, other)")), plan.removals, plan.lossy)
    with pytest.raises(
        UserError, match="the plan names 'h0', which the source does not compute: is it the right source"
    ):
        mask(model(FFN.replace("h0", "z0")), plan.removals, plan.lossy)
