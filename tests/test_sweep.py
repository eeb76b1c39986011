"""`sweep`: its points, its table, going on where it stopped, and what goes wrong."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model
from test_cli import run, wide_model
from test_quality import CLASSIFIER, labelled

from onnx_autoglm import CheckFailed, UserError, pipeline, sweep
from onnx_autoglm.latency import LatencyMeter
from onnx_autoglm.sweep_points import make_points, parse_vary

LEVELS = {"prune": ["ffn-channel=0.25", "ffn-channel=0.5"]}
NAMES = ["prune-ffn-channel-0.25", "prune-ffn-channel-0.50"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    ir.save(model(CLASSIFIER), tmp_path / "model.onnx")
    data = labelled()
    assert data.labels is not None
    np.savez(tmp_path / "set.npz", x=data.feeds[0]["x"], labels=data.labels[0])
    return tmp_path / "model.onnx"


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that `optimize` is called for, from now on."""
    called: list[str] = []
    real = pipeline.optimize

    def counted(model, output, options, **given):
        called.append(output.name)
        return real(model, output, options, **given)

    monkeypatch.setattr(pipeline, "optimize", counted)
    return called


# --- points


def test_vary_texts() -> None:
    assert parse_vary(["--prune=ffn-channel=0.1+query-head=0.2,qk-pair=0.1", "protect-first=1,2"]) == {
        "prune": ["ffn-channel=0.1+query-head=0.2", "qk-pair=0.1"],
        "protect_first": ["1", "2"],
    }
    for text in ("prune", "=1", "seed=", "seed=1,,2"):
        with pytest.raises(UserError, match="write OPTION=VALUE,VALUE"):
            parse_vary([text])


def test_points_are_all_combinations_with_names_that_tell_them_apart() -> None:
    vary = {"prune": ["ffn-channel=0.1+query-head=0.25", {"ffn-channel": 0.125}], "seed": ["1", 2]}
    points = make_points(vary, {"criterion": "random"}, None)
    assert [point.name for point in points] == [
        "prune-ffn-channel-0.10+query-head-0.25_seed-1",
        "prune-ffn-channel-0.10+query-head-0.25_seed-2",
        "prune-ffn-channel-0.125_seed-1",
        "prune-ffn-channel-0.125_seed-2",
    ]
    assert points[0].options.pruning.sparsity_level == {"ffn-channel": 0.1, "query-head": 0.25}
    assert points[3].options.pruning.seed == 2 and points[3].options.pruning.algorithm == "random"
    (glob,) = make_points({"include": ["layers.*/mlp"]}, {}, None)
    assert "/" not in glob.name and "*" not in glob.name


@pytest.mark.parametrize(
    ("vary", "given", "expected"),
    [
        ({}, {}, "nothing to vary"),
        ({"prune": []}, {}, "nothing to vary"),
        ({"speed": ["1"]}, {}, "unknown option 'speed'"),
        ({"seed": ["x"]}, {}, "pruning.seed"),
        ({"seed": ["1"]}, {"seed": 2}, "seed is both fixed"),
        ({"prune": ["ffn-channel=0.1", "ffn-channel=0.10"]}, {}, "both called prune-ffn-channel-0.10"),
    ],
)
def test_points_that_make_no_sense(vary: dict[str, list[str]], given: dict[str, int], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make_points(vary, given, None)


def test_keep_takes_several_values_after_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    import onnx_autoglm.sweep_run as module
    from onnx_autoglm.cli import cli

    seen: list[dict[str, object]] = []

    def record(model: Path, output: Path, **given: object) -> None:
        seen.append({"model": str(model), **given})
        raise UserError("seen")

    monkeypatch.setattr(module, "sweep", record)
    for words in (
        ["m.onnx", "--keep", "0.9", "0.8", ".7", "-o", "out"],
        ["--keep", "0.9,0.8", ".7", "m.onnx", "-o", "out"],
        ["--keep=0.9,0.8,.7", "-o", "out", "m.onnx"],
        ["--keep", "0.9", "--jobs", "1", "--keep", "0.8", ".7", "-o", "out", "m.onnx"],
    ):
        result = CliRunner().invoke(cli, ["sweep", *words])
        assert isinstance(result.exception, UserError), result.output
        assert seen[-1]["keep"] == ["0.9", "0.8", ".7"] and seen[-1]["model"] == "m.onnx"
    assert CliRunner().invoke(cli, ["sweep", "m.onnx", "--jobs", "0.9", "0.8", "-o", "out"]).exit_code == 2


# --- the table


def test_the_table_is_that_of_the_points(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--vary", "prune=ffn-channel=0.25,ffn-channel=0.5", "--eval", tmp_path / "set.npz"]
    done = run("sweep", source, "-o", out, *words, "--latency-runs", "3")
    assert done.returncode == 0, done.stderr
    assert "prune-ffn-channel-0.50" in done.stdout and "top-1" in done.stdout
    written = {path.name for path in out.iterdir()} - {"sweep.png"}
    assert written == {"sweep.csv", "sweep.json", *NAMES}
    table = json.loads((out / "sweep.json").read_text())
    assert table["format"] == "onnx-autoglm/sweep" and table["latency"]["runs"] == 3
    assert [row["name"] for row in table["rows"]] == ["source", *NAMES]
    for row in table["rows"][1:]:
        report = json.loads((out / row["name"] / "report.json").read_text())
        assert (
            row["parameters"] == report["result"]["parameters"] and row["bytes"] == report["result"]["bytes"]
        )
        assert row["flops_share"] == report["result"]["flops"] / report["source"]["flops"]
        assert row["quality"] == report["quality"]["result"]["top1"] and row["metric"] == "top-1"
        assert row["ratio"] == report["quality"]["ratio"] and row["kl"] == report["quality"]["kl"]
        assert row["speedup"] > 0 and row["source_latency_ms"] > 0 and row["latency_ms"] > 0
        assert row["seconds"] > 0 and not row["error"]
    assert table["rows"][0]["quality"] == report["quality"]["source"]["top1"]
    lines = list(csv.DictReader((out / "sweep.csv").open()))
    assert [line["prune"] for line in lines] == ["", *LEVELS["prune"]]
    assert [float(line["parameters"]) for line in lines] == [row["parameters"] for row in table["rows"]]


def test_the_picture(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep(source, tmp_path / "out", vary=LEVELS, latency_runs=1)
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_picture_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sweep.png").write_text("of an earlier sweep")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = sweep(source, out, vary=LEVELS, latency_runs=0)
    assert found.notes == ["no sweep.png without matplotlib: pip install 'onnx-autoglm[plot]'"]
    assert {path.name for path in out.iterdir()} == {"sweep.csv", "sweep.json", *NAMES}
    assert found.rows[1].latency_ms is None and found.rows[1].metric is None


def test_latency_of_a_language_model_is_that_of_a_prefill(tmp_path: Path) -> None:
    from test_quality import LANGUAGE

    ir.save(model(LANGUAGE), tmp_path / "model.onnx")
    found = LatencyMeter(tmp_path / "model.onnx", runs=3).measure(tmp_path / "model.onnx")
    assert found.shapes == {"ids": [1, 128]} and found.runs == 3 and found.source_ms > 0


def test_latency_is_measured_in_turns(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx_autoglm import latency as module

    meter = LatencyMeter(source, runs=3, sample=labelled().feeds[0])
    ran: list[bool] = []
    real = module._seconds

    def seconds(session, feed):
        ran.append(session is meter._session)
        assert feed["x"].shape == (1, 6)
        return real(session, feed)

    monkeypatch.setattr(module, "_seconds", seconds)
    meter.measure(source)
    assert ran == [True, False] * 3


# --- going on


def test_a_point_that_is_there_is_not_run_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, called = tmp_path / "out", count_runs(monkeypatch)
    given = {"eval": tmp_path / "set.npz", "latency_runs": 0}

    def runs(**changed: object) -> list[str]:
        called.clear()
        sweep(source, out, **{"vary": LEVELS, **given, **changed})  # type: ignore[arg-type]
        return list(called)

    assert runs() == NAMES
    first = (out / "sweep.json").read_text()
    assert runs() == [] and json.loads((out / "sweep.json").read_text())["reused"] == NAMES
    assert json.loads((out / "sweep.json").read_text())["rows"] == json.loads(first)["rows"]
    assert runs(criterion="l1") == NAMES  # other options
    assert runs(criterion="l1", vary={"prune": [*LEVELS["prune"], "ffn-channel=0.75"]}) == [
        "prune-ffn-channel-0.75"
    ]
    (out / NAMES[0] / "report.json").write_text("{")
    assert runs(criterion="l1") == [NAMES[0]]
    data = labelled()
    np.savez(tmp_path / "set.npz", x=data.feeds[0]["x"], labels=np.zeros(40, int))
    assert runs(criterion="l1") == NAMES  # other data under the same name
    ir.save(model(CLASSIFIER, seed=9), source)
    assert runs(criterion="l1") == NAMES  # another source
    report = json.loads((out / NAMES[1] / "report.json").read_text())
    report["versions"]["onnx-autoglm"] = "0.0.1"
    (out / NAMES[1] / "report.json").write_text(json.dumps(report))
    assert runs(criterion="l1") == [NAMES[1]]


def test_changed_external_weights_are_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    path = wide_model(tmp_path, 16, 64)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    called = count_runs(monkeypatch)
    for expected in (NAMES, []):
        called.clear()
        sweep(path, tmp_path / "out", vary=LEVELS, latency_runs=0)
        assert called == expected
    later = time.time() + 60
    os.utime(tmp_path / "weights.bin", (later, later))
    sweep(path, tmp_path / "out", vary=LEVELS, latency_runs=0)
    assert called == NAMES


def test_parallel_points_are_the_same_points(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = count_runs(monkeypatch)
    one = sweep(source, tmp_path / "one", vary=LEVELS, eval=tmp_path / "set.npz", latency_runs=0)
    two = sweep(source, tmp_path / "two", vary=LEVELS, eval=tmp_path / "set.npz", latency_runs=0, jobs=2)
    assert called == NAMES  # of the first sweep alone: the other points ran in processes of their own
    for row in (*one.rows, *two.rows):
        row.seconds = None
    assert one.rows == two.rows
    again = sweep(source, tmp_path / "two", vary=LEVELS, eval=tmp_path / "set.npz", latency_runs=0)
    assert again.reused == NAMES


# --- what goes wrong


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_point_that_fails_leaves_the_others(source: Path, tmp_path: Path, jobs: int) -> None:
    vary = {"prune": ["ffn-channel=0.5", "ffn-channel=0.01", "query-head=0.5"]}
    with pytest.raises(
        UserError, match="2 of 3 points have no result; prune-ffn-channel-0.01: .* removes nothing"
    ):
        sweep(source, tmp_path / "out", vary=vary, latency_runs=1, jobs=jobs)
    rows = json.loads((tmp_path / "out/sweep.json").read_text())["rows"]
    assert [bool(row["error"]) for row in rows] == [False, False, True, True]
    assert "has no query-head" in rows[3]["error"] and rows[2]["parameters"] is None
    assert rows[1]["latency_ms"] > 0


@pytest.mark.parametrize("jobs", [1, 2])
def test_nothing_is_written_if_all_points_fail(tmp_path: Path, jobs: int) -> None:
    path = wide_model(tmp_path, 64, 4096)  # long sums round differently when terms go
    with pytest.raises(CheckFailed, match="2 of 2 points .* differ"):
        sweep(path, tmp_path / "out", vary=LEVELS, tolerance=1e-30, jobs=jobs)
    assert not (tmp_path / "out").exists() and [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-o", "out"], "nothing to vary"),
        (["-o", "out", "--vary", "keep=0.9", "--keep", "0.8"], "keep is given both"),
        (["-o", "out", "--vary", "speed=1"], "unknown option 'speed'"),
        (["-o", "out", "--vary", "seed=1", "--eval", "no.txt"], "no.txt does not exist"),
        (["-o", "out", "--vary", "seed=1", "--jobs", "0"], "the least is 1 job"),
        (["-o", "set.npz", "--vary", "seed=1"], "set.npz is a file"),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(
    source: Path, tmp_path: Path, words: list[str], expected: str
) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("sweep", source, *words, cwd=tmp_path)
    assert done.returncode == 1 and expected in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupt_ends_the_parallel_points_too(tmp_path: Path) -> None:
    path, out = wide_model(tmp_path, 1024, 16384), tmp_path / "out"
    command = [sys.executable, "-m", "onnx_autoglm", "sweep", str(path), "-o", str(out), "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--vary", "prune=ffn-channel=0.25,ffn-channel=0.5"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(out.glob(".*.partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert not out.exists()  # neither point was left to run to its end
