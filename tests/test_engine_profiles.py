"""Profiles from the signature of a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import recipes
from helpers import model

from onnx_autoglm import UserError, modelfile, optimize
from onnx_autoglm.engine_options import engine_options
from onnx_autoglm.engine_profiles import Profile, profiles_for
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.runtime import Session

ROOT = Path(__file__).parents[1] / "build" / "models"

# The embedding makes the tokens; the cache is what a Concat grows; names say nothing.
CACHED = """
g (int64[n,l] i0, int64[n,t] i1, int64[n,l] i2, float[n,2,p,4] i3, float[n,1,p,4] i4)
  => (float[n,l,8] y, float[n,2,q,4] c, float[n,1,q,4] d)
<float[50,8] table, float[4] freq>
{
  y0 = Gather<axis=0>(table, i0) k = Constant<value_floats=[0.0]>()
  pos = Cast<to=1>(i2) axis = Constant<value_ints=[2]>() wide = Unsqueeze(pos, axis) turned = Mul(wide, freq)
  turn = ReduceSum<keepdims=1>(turned, axis) y = Add(y0, turn)
  c = Concat<axis=2>(i3, i3) d = Concat<axis=2>(i4, i4)
  m = Cast<to=9>(i1)
}
"""


def profiles(source: ir.Model, **given: Any) -> dict[str, Profile]:
    return {profile.name: profile for profile in profiles_for(source, engine_options(given))}


def built(name: str) -> ir.Model:
    return canonicalize(modelfile.open_model(recipes.build(name, ROOT) / "model.onnx"))


def test_a_cache_graph_gets_a_prefill_and_a_decode_profile() -> None:
    found = profiles(model(CACHED), batch="1:2:4", sequence="1:16:64", past="1:32:100")
    assert list(found) == ["prefill", "decode"]
    prefill, decode = (profile.shapes for profile in found.values())
    assert prefill["i0"] == prefill["i2"] == ((1, 1), (2, 16), (4, 64))
    assert prefill["i3"] == ((1, 2, 0, 4), (2, 2, 0, 4), (4, 2, 100, 4))
    assert prefill["i4"] == ((1, 1, 0, 4), (2, 1, 0, 4), (4, 1, 100, 4))  # each layer its own heads
    assert prefill["i1"] == ((1, 1), (2, 16), (4, 164))
    assert decode["i0"] == ((1, 1), (2, 1), (4, 1))
    assert decode["i3"] == ((1, 2, 1, 4), (2, 2, 32, 4), (4, 2, 100, 4))
    assert decode["i1"] == ((1, 2), (2, 33), (4, 101))


@pytest.mark.parametrize("name", ["glm-gqa-op20-kv", "llama-op20-kv", "chatglm2-op20-kv"])
def test_every_corner_of_the_profiles_of_a_real_graph_runs(name: str) -> None:
    source = built(name)
    session = Session(source)
    kinds = {value.name: value.dtype.numpy() for value in source.graph.inputs if value.dtype is not None}
    for profile in profiles(source, batch="1:2:3", sequence="1:5:9", past="1:4:7").values():
        for corner in range(3):
            feeds = {n: np.ones(shapes[corner], kinds[n]) for n, shapes in profile.shapes.items()}
            assert session.run(feeds)


def test_a_pruned_cache_has_its_own_sizes(tmp_path: Path) -> None:
    source = recipes.build("glm-gqa-op20-kv", ROOT) / "model.onnx"
    optimize(
        source, tmp_path / "out", prune={"kv-group": 0.5}, criterion="l2", repair="none", include="layers.0*"
    )
    pruned = canonicalize(modelfile.open_model(tmp_path / "out/model.onnx"))
    shapes = profiles(pruned)["decode"].shapes
    assert {name: s[2][1] for name, s in shapes.items() if len(s[2]) == 4} == {
        "past_key_values.0.key": 1,
        "past_key_values.0.value": 1,
        "past_key_values.1.key": 2,
        "past_key_values.1.value": 2,
    }


def test_without_a_cache_there_is_one_profile() -> None:
    found = profiles(built("glm-gqa-op20"), sequence="1:8:32")
    assert list(found) == ["default"]
    assert found["default"].shapes["input_ids"] == ((1, 1), (1, 8), (8, 32))
    assert found["default"].shapes["attention_mask"] == ((1, 1), (1, 8), (8, 32))


def test_what_the_graph_fixes_is_as_declared() -> None:
    shapes = profiles(built("glm-gqa-op20-kv-static"))["default"].shapes
    assert all(low == usual == high for low, usual, high in shapes.values())
    assert shapes["input_ids"][0] == (2, 5)


def test_images_have_a_usual_size() -> None:
    source = model("g (float[n,3,h,w] x) => (float[n,4,i,j] y) <float[4,3,3,3] k> { y = Conv(x, k) }")
    assert profiles(source)["default"].shapes["x"] == ((1, 3, 224, 224), (1, 3, 224, 224), (8, 3, 224, 224))
    shapes = profiles(source, shape={"h": "32:64:96"})["default"].shapes["x"]
    assert shapes == ((1, 3, 32, 224), (1, 3, 64, 224), (8, 3, 96, 224))


def test_a_size_that_cannot_be_told_is_asked_for() -> None:
    source = model("g (float[n,frames,8] x) => (float[n,frames,8] y) { y = Relu(x) }")
    with pytest.raises(UserError, match=r"frames \(input x .*--shape frames=MIN:OPT:MAX"):
        profiles(source)
    assert profiles(source, shape="frames=1:10:20")["default"].shapes["x"][2] == (8, 20, 8)
    with pytest.raises(UserError, match="no input has such a symbol; symbols are n, frames"):
        profiles(source, shape="length=1")


def test_sizes_without_a_name() -> None:
    source = model("g (float[n,k,8] x) => (float[n,k,8] y) { y = Relu(x) }")
    x = source.graph.inputs[0]
    x.shape = ir.Shape([None, None, 8])
    with pytest.raises(UserError, match=r"--shape \?x\[1\]=MIN:OPT:MAX"):
        profiles(source)
    assert profiles(source, shape={"?x[1]": 5})["default"].shapes["x"] == ((1, 5, 8), (1, 5, 8), (8, 5, 8))
