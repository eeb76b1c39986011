"""Every small graph of the GLM family becomes an engine, dense and pruned: parsed, its types checked, serialized."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import recipes

import onnx_autoglm

ROOT = Path(__file__).parents[1] / "build" / "models"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the package tensorrt-rtx"
)
# One of each architecture, kind of export and precision; `slow` has the rest.
QUICK = [
    "glm-gqa-op20",
    "glm-gqa-op18-kv",
    "glm-gqa-op23-kv-sdpa",
    "glm-gqa-op17-legacy",
    "glm-gqa-op20-kv-fp16",
    "glm-mha-bias-op18-kv",
    "glm4-gqa-op23-sdpa-fp16",
    "glm4moe-gqa-op20-kv",
    "glm4moe-gqa-bias-group2-op23-sdpa",
    "chatglm1-op18",
    "chatglm2-op20-kv",
]
GLM = ("glm-", "glm4-", "glm4moe-", "chatglm")
SIZES: dict[str, Any] = {"batch": "1:2:4", "sequence": "1:16:64", "past": "1:16:64"}


def engine_bytes(model: Path, out: Path) -> int:
    report = onnx_autoglm.build(model, out / "model.engine", backend="rtx", **SIZES)
    assert report.plan is not None
    return int(report.plan["bytes"])


def check(name: str, tmp_path: Path) -> None:
    """Dense and pruned; the smaller model is the smaller engine."""
    dense = recipes.build(name, ROOT) / "model.onnx"
    onnx_autoglm.optimize(
        dense,
        tmp_path / "pruned",
        prune={"query-head": 0.5, "ffn-channel": 0.5},
        criterion="l2",
        repair="none",
    )
    before = engine_bytes(dense, tmp_path / "dense")
    after = engine_bytes(tmp_path / "pruned/model.onnx", tmp_path / "engine")
    assert 0 < after < before


@pytest.mark.parametrize("name", QUICK)
def test_every_family(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        r.name
        for r in recipes.recipes()
        if r.name.startswith(GLM) and "timing" not in r.tags and r.name not in QUICK
    ],
)
def test_every_other_graph(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)
