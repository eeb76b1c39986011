"""Whole exported models: what is found in them, and that every kind of cut is exact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import recipes

from onnx_autoglm import UserError, check, inspect, optimize

ROOT = Path(__file__).parents[1] / "build" / "models"
HALF = ("query-head", "ffn-channel", "expert-channel", "conv-channel")
PLAIN: dict[str, Any] = {"criterion": "l2", "repair": "none"}  # by norms: no text is written to learn from
QUICK = [
    "glm-gqa-op20",
    "glm-gqa-op18-kv",
    "glm-gqa-op23-kv-sdpa",
    "glm-gqa-op17-legacy",
    "glm-mha-bias-op18-kv",
    "chatglm1-op18",
    "chatglm2-op20-kv",
    "glm4moe-gqa-op20-kv",
    "glm4moe-gqa-bias-group2-op23-sdpa",
    "llama-op20",
    "vit-op20",
    "light-resnet50",
    "light-shufflenet",
]


def built(name: str) -> Path:
    return recipes.build(name, ROOT) / "model.onnx"


def free_kinds(model: Path) -> Counter[str]:
    """Kinds of axes; whole blocks are removed by other means."""
    found = inspect(model).structures
    return Counter(entry.kind for entry in found if not entry.pins and entry.kind != "block")


def halve(model: Path, out: Path) -> None:
    kinds = free_kinds(model)
    report = optimize(model, out, prune={kind: 0.5 for kind in HALF if kind in kinds}, **PLAIN)
    assert report.result.parameters < 0.85 * report.source.parameters
    assert report.check["relative_difference"] <= 1e-4
    assert not [note for note in report.notes if "checker" in note]


@pytest.mark.parametrize("name", QUICK)
def test_half_of_the_heads_and_channels(name: str, tmp_path: Path) -> None:
    halve(built(name), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [r.name for r in recipes.recipes() if "timing" not in r.tags and r.name not in QUICK]
)
def test_half_of_every_other_recipe(name: str, tmp_path: Path) -> None:
    halve(built(name), tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["glm-gqa-op18-kv", "glm4moe-gqa-op20-kv", "chatglm2-op20-kv", "light-shufflenet"]
)
def test_every_kind_by_itself(name: str, tmp_path: Path) -> None:
    model = built(name)
    for kind in free_kinds(model):
        out = tmp_path / kind
        report = optimize(model, out, prune={kind: 0.5}, **PLAIN)
        assert report.check["relative_difference"] <= 1e-4, kind
        assert report.result.parameters < report.source.parameters, kind
        check(model, out / "plan.json", out / "model.onnx")


def test_what_is_found_in_a_glm() -> None:
    found = inspect(built("glm-gqa-op20")).structures
    assert Counter(entry.kind for entry in found) == {
        "query-head": 2,
        "kv-group": 2,
        "ffn-channel": 2,
        "value-channel": 2,
        "qk-pair": 3,  # one pair shared by all layers through the rotary table, one pass-through part in each
        "hidden": 1,
        "block": 1,
    }
    assert not [entry for entry in found if entry.pins]
    heads = [entry for entry in found if entry.kind == "query-head"]
    assert [(entry.size, entry.groups) for entry in heads] == [(4, 2), (4, 2)]
    assert {entry.id.split(":")[0] for entry in heads} == {"layers.0.self_attn", "layers.1.self_attn"}


def test_what_is_found_in_a_mixture() -> None:
    kinds = free_kinds(built("glm4moe-gqa-op20-kv"))
    assert kinds["expert"] == 1 and kinds["expert-channel"] == 1 and kinds["ffn-channel"] == 2


def test_the_exporter_does_not_change_what_is_found() -> None:
    expected = free_kinds(built("glm-gqa-op20"))
    for name in ("glm-gqa-op17-legacy", "glm-gqa-op18-kv", "glm-gqa-op23-kv-sdpa"):
        assert free_kinds(built(name)) == expected, name


def test_kv_groups_change_the_cache_and_the_plan_says_so(tmp_path: Path) -> None:
    import onnx

    optimize(built("glm-gqa-op18-kv"), tmp_path / "out", prune={"kv-group": 0.5}, **PLAIN)
    plan = json.loads((tmp_path / "out/plan.json").read_text())
    assert {cut["name"] for cut in plan["interfaces"]} >= {"past_key_values.0.key", "present.1.value"}
    assert all(entry["interface"] for entry in plan["structures"])
    inputs = {value.name: value for value in onnx.load(tmp_path / "out/model.onnx").graph.input}
    assert inputs["past_key_values.0.key"].type.tensor_type.shape.dim[1].dim_value == 1


def test_caches_stay_unless_asked_for(tmp_path: Path) -> None:
    """By default the query heads of an MHA model stay: they are its KV groups as well."""
    report = optimize(built("glm-mha-bias-op18-kv"), tmp_path / "out", **PLAIN)
    heads = [entry for entry in report.structures if entry.kind == "query-head"]
    assert all(entry.kept == entry.size and "ask with --prune query-head" in entry.reason for entry in heads)
    assert any(entry.kept < entry.size for entry in report.structures if entry.kind == "ffn-channel")


def test_residual_streams_of_a_resnet(tmp_path: Path) -> None:
    report = optimize(built("light-resnet50"), tmp_path / "out", prune={"conv-channel": 0.5})
    assert report.result.flops <= 1.1e9
    assert report.source.flops == pytest.approx(4.09e9, rel=0.01)


def test_a_pruned_model_is_not_pruned_by_its_old_plan(tmp_path: Path) -> None:
    model, out = built("glm-gqa-op20"), tmp_path / "out"
    optimize(model, out, prune={"ffn-channel": 0.5}, **PLAIN)
    with pytest.raises(UserError, match="is not the source"):
        check(out / "model.onnx", out / "plan.json", out / "model.onnx")


def test_pruning_twice(tmp_path: Path) -> None:
    """The result is an ordinary model: its own heads and channels are found and cut again."""
    optimize(built("glm-gqa-op20"), tmp_path / "once", prune={"query-head": 0.5, "ffn-channel": 0.5}, **PLAIN)
    report = optimize(
        tmp_path / "once/model.onnx",
        tmp_path / "twice",
        prune={"query-head": 0.5, "ffn-channel": 0.5},
        **PLAIN,
    )
    kept = Counter(
        (entry.kind, entry.size, entry.kept) for entry in report.structures if entry.kept < entry.size
    )
    assert kept == {("query-head", 2, 1): 2, ("ffn-channel", 172, 86): 2}
