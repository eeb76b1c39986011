"""`bench`: what is called a difference, arrivals, load on real servers, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import recipes

from onnx_autoglm import UserError
from onnx_autoglm.bench_load import arrivals
from onnx_autoglm.bench_offline import take_turns
from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.bench_run import bench
from onnx_autoglm.bench_stats import Ratio, Times, paired_ratio
from onnx_autoglm.cli_shared import from_flags

ROOT = Path(__file__).parents[1] / "build" / "models"


def built(name: str) -> Path:
    return recipes.build(name, ROOT) / "model.onnx"


class Sleeper:
    """Takes a known time, and more in every third round."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._rounds = seconds, 0

    def round(self) -> dict[str, list[float]]:
        self._rounds += 1
        time.sleep(self._seconds)
        return {"run": [self._seconds * (3 if self._rounds % 3 == 0 else 1)]}


def test_a_known_ratio() -> None:
    options = BenchOptions(rounds=9)
    (found,) = take_turns((Sleeper(0.004), Sleeper(0.002)), options)
    assert found.ratio == Ratio(2, 2, 2) and found.verdict == "B is faster"
    assert found.a.p50 == pytest.approx(4) and found.a.p99 == pytest.approx(12) and found.a.count == 9
    (same,) = take_turns((Sleeper(0.001), Sleeper(0.001)), options)
    assert same.verdict == "no difference"


def test_percentiles() -> None:
    times = Times.of(np.arange(101) / 1000)
    assert (times.p50, times.p90, times.p99) == pytest.approx((50, 90, 99))


def test_the_interval_holds_what_it_promises() -> None:
    """Of 400 comparisons of a thing with itself about one in twenty sees a difference, when the margin is 0."""
    random = np.random.default_rng(0)
    noise = 0.1 * random.exponential(1, (400, 2, 30)) + 1
    wrong = sum(paired_ratio(a, b).verdict(0) != "no difference" for a, b in noise)
    assert 0.01 < wrong / 400 < 0.10


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (Ratio(1.5, 1.2, 1.8), "B is faster"),
        (Ratio(0.5, 0.4, 0.6), "A is faster"),
        (Ratio(1.5, 0.9, 2.0), "no difference"),
        (Ratio(1.01, 1.005, 1.02), "no difference"),
    ],
)
def test_a_difference_is_sure_and_large_enough(ratio: Ratio, expected: str) -> None:
    assert ratio.verdict(0.02) == expected


def test_arrivals_are_a_poisson_process_that_can_be_repeated() -> None:
    times = arrivals(50, 100, seed=3)
    assert np.array_equal(times, arrivals(50, 100, seed=3))
    assert not np.array_equal(times[:10], arrivals(50, 100, seed=4)[:10])
    gaps = np.diff(times)
    assert 4700 < len(times) < 5300 and times[-1] < 100 and (gaps > 0).all()
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as exponential gaps have it
    assert len(arrivals(0.001, 1, seed=0)) == 1


def test_a_model_against_itself_and_what_is_written(tmp_path: Path) -> None:
    path = built("glm-gqa-op20-kv")
    done = subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", "bench", path, path, "-o", tmp_path / "out"]
        + "--rounds 15 --prompt-tokens 16 --decode-tokens 8 --margin 0.3 --threads 1".split(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no difference") == 2
    data = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [one["name"] for one in data["measures"]] == ["prefill", "decode"]
    assert data["measures"][1]["a"]["count"] == 15 * 8 and data["a"]["sha256"] == data["b"]["sha256"]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_models_without_a_cache_and_without_tokens() -> None:
    options = BenchOptions(rounds=5, prompt_tokens=8)
    plain = built("glm-gqa-op20")
    assert [one.name for one in bench(plain, plain, options).measures] == ["prefill"]
    picture = built("vit-op20")
    assert [one.name for one in bench(picture, picture, options).measures] == ["run"]
    with pytest.raises(UserError, match="compare two models of one task"):
        bench(plain, picture, options)
    with pytest.raises(UserError, match="--load needs language models"):
        bench(picture, picture, options.model_copy(update={"load": True}))


def test_under_load(tmp_path: Path) -> None:
    """A rate that is easy, and one that no server on this machine can take."""
    pytest.importorskip("fastapi")
    path = built("glm-gqa-op20-kv")
    options = BenchOptions(
        rounds=5,
        prompt_tokens=64,
        decode_tokens=200,
        load=True,
        rates=(1.0, 400.0, 800.0),
        seconds=1.0,
        threads=1,
    )
    found = bench(path, path, options, output=tmp_path)
    for points in (found.load_a, found.load_b):
        assert [point.rate for point in points] == [1, 400]  # saturated, so the next is not tried
        assert [point.saturated for point in points] == [False, True]
        easy, hard = points
        assert easy.answered == easy.requests and easy.p99 is not None and easy.first_token_p50 is not None
        assert easy.first_token_p50 < easy.p99 and (easy.rss or 1 << 30) > 1 << 20
        assert hard.refused and hard.answered + hard.refused == hard.requests and not hard.failed
    assert found.load_a[1].requests == found.load_b[1].requests
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_rates_are_numbers_above_zero() -> None:
    assert from_flags(BenchOptions, {"rates": ("2,1", "4")}).rates == (1, 2, 4)
    for wrong in ("0", "x"):
        with pytest.raises(UserError, match="options: rates"):
            from_flags(BenchOptions, {"rates": (wrong,)})
