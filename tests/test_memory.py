"""Estimates of memory beside what a step allocates, and the one line that refuses a run."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

from onnx_autoglm import UserError, optimize, request
from onnx_autoglm.consumers import find_consumers
from onnx_autoglm.cut import analyse
from onnx_autoglm.memory import (
    Need,
    available_bytes,
    copied_bytes,
    needs_of_data,
    needs_of_quality,
    needs_of_repair,
    needs_of_trials,
    refuse_too_much,
)
from onnx_autoglm.passes.repair_weights import repair_weights
from onnx_autoglm.passes.score_obs import score_obs
from onnx_autoglm.statistics import observe

WIDE, OUT = 600, 300
TEXT = f"g (float[n,20] x) => (float[n,{OUT}] y) <float[20,{WIDE}] a, float[{WIDE},{OUT}] c> "
TEXT += "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"


def setup():
    source = model(TEXT)
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "ffn-channel" and not s.pins]
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((40, 20)).astype(np.float32)} for _ in range(10)]
    consumers = [c for c in find_consumers(found) if c.initializer.name == "c"]
    return source, found, structure, consumers, feeds


def peak(function) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_estimates_are_near_what_is_allocated() -> None:
    source, found, structure, consumers, feeds = setup()
    observing, scoring = needs_of_data([structure], consumers, criterion="obs")
    contractions = [consumer.contraction for consumer in consumers]
    assert peak(lambda: observe(source, contractions, feeds)) == pytest.approx(observing.bytes, rel=0.35)
    observed = observe(source, contractions, feeds)
    assert peak(lambda: score_obs([structure], consumers, observed)) == pytest.approx(scoring.bytes, rel=0.35)

    from onnx_autoglm.axes.selection import Selection
    from onnx_autoglm.cut import apply_selection

    (repairing,) = needs_of_repair([structure], consumers, {"ffn-channel": 0.25})
    selection = Selection()
    selection.keep(structure.atom, (), np.arange(WIDE) % 4 > 0)
    cut = apply_selection(found, selection)
    pairs = [(feed, feed) for feed in feeds]
    used = peak(lambda: repair_weights(source, cut.model, selection, consumers, pairs, "affine"))
    assert used == pytest.approx(repairing.bytes, rel=0.35)


def test_a_convolution_is_repaired_by_its_patches() -> None:
    source = model(
        "g (float[n,3,8,8] x) => (float[n,4,8,8] y) <float[10,3,1,1] a, float[4,10,3,3] c> "
        "{ h = Conv(x, a) r = Relu(h) y = Conv<pads=[1,1,1,1]>(r, c) }"
    )
    found = analyse(source.clone())
    consumers = [c for c in find_consumers(found) if c.initializer.name == "c"]
    (need,) = needs_of_repair([], consumers, {})
    assert need.bytes == 40 * 90**2 + 71 * 90 * 4
    (observing,) = needs_of_data([], consumers, criterion="wanda")
    assert observing.bytes == 24 * 10**2


def test_sessions_copy_weights_of_products() -> None:
    source, _, _, consumers, _ = setup()
    copied = 4 * (20 * WIDE + WIDE * OUT)
    assert copied_bytes(source) == copied
    assert needs_of_quality(source)[0].bytes == 2 * copied
    assert needs_of_trials(source, consumers)[0].bytes == copied + 4 * WIDE * OUT


def test_only_the_largest_need_is_named() -> None:
    needs = [Need(5 << 30, "scoring a", "use b"), Need(7 << 30, "repairing c", "use d")]
    with pytest.raises(
        UserError, match=r"^repairing c needs about 7.5 GB of memory, and 500 MB are available: use d$"
    ):
        refuse_too_much(needs, 500_000_000)
    refuse_too_much(needs, 8 << 30)
    refuse_too_much(needs, None)
    refuse_too_much([], 0)


def test_what_is_available_is_read_from_the_system(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:    1024 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 1 << 20
    (tmp_path / "odd").write_text("MemAvailable:\n")
    assert available_bytes(tmp_path / "odd") is None
    assert available_bytes(tmp_path / "none") is None


def test_optimize_refuses_before_it_observes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _, _, feeds = setup()
    ir.save(source, tmp_path / "model.onnx")
    (tmp_path / "calib").mkdir()
    for number, feed in enumerate(feeds):
        np.savez(tmp_path / "calib" / f"{number}.npz", **feed)
    monkeypatch.setattr(request, "available_bytes", lambda: 1 << 20)
    steps: list[str] = []
    given = {"calib": tmp_path / "calib", "prune": {"ffn-channel": 0.5}}
    with pytest.raises(UserError, match=r"scoring a needs about 14 MB .* 1 MB are available: .*wanda"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", **given, progress=steps.append)
    given |= {"prune": {"ffn-channel": 0.25}, "criterion": "wanda"}
    with pytest.raises(UserError, match=r"repairing what c reads \(600 columns\) needs .*--repair bias"):
        optimize(tmp_path / "model.onnx", tmp_path / "out", **given, progress=steps.append)
    assert "observe" not in steps and not (tmp_path / "out").exists()
    optimize(
        tmp_path / "model.onnx", tmp_path / "out", prune={"ffn-channel": 0.5}, criterion="l2", calib="none"
    )
