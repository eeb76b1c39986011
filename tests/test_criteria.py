"""Criteria: the user's own from Python and from the command line, and what is refused; Minitron's by numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from helpers import model

import onnx_autoglm
from onnx_autoglm import UserError, optimize
from onnx_autoglm.consumers import consumers_of, find_consumers
from onnx_autoglm.criteria import find_criterion
from onnx_autoglm.cut import analyse
from onnx_autoglm.passes.score_activation import score_activation
from onnx_autoglm.statistics import observe

MLP = "g (float[n,6] x) => (float[n,4] y) <float[6,12] a, float[12,4] c> "
MLP += "{ h = MatMul(x, a) r = Relu(h) y = MatMul(r, c) }"
FFN = {"prune": {"ffn-channel": 0.5}, "repair": "none", "calib": "none"}
MODULE = """
import numpy as np

class Last:
    name = "last"
    needs_data = False

    def __call__(self, structures, evidence):
        return {s: np.broadcast_to(np.arange(s.size), s.shape) for s in structures}

def bare(structures, evidence):
    return {}

NUMBER = 5
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    ir.save(model(MLP), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def last(structures, evidence):
    """The last channels count most."""
    return {s: np.broadcast_to(np.arange(s.size), s.shape) for s in structures}


def kept(folder: Path) -> list[int]:
    from onnx_autoglm.plan import Plan

    (entry,) = Plan.read(folder / "plan.json").structures
    return entry["kept"]


def test_a_callable_of_the_users_own(source: Path, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", **FFN, criterion=last)
    assert kept(tmp_path / "out") == list(range(6, 12))
    assert report.options["pruning"]["algorithm"] == f"{__name__}:last"


def test_what_it_leaves_out_is_scored_by_norm_and_said(source: Path, tmp_path: Path) -> None:
    report = optimize(source, tmp_path / "out", **FFN, criterion=lambda structures, evidence: {})
    assert any("1 x ffn-channel scored by norm" in note for note in report.notes)
    optimize(source, tmp_path / "l2", **FFN, criterion="l2")
    assert kept(tmp_path / "out") == kept(tmp_path / "l2")


def test_it_may_look_at_what_consumers_read(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.standard_normal((2000, 6)).astype(np.float32))

    def by_variance(structures, evidence):
        result = {}
        for structure in structures:
            total = np.zeros(structure.shape)
            for reads in evidence.reads(structure):
                np.add.at(total.reshape(-1), reads.index, np.diag(reads.moments.covariance))
            result[structure] = total
        return result

    by_variance.needs_data = True
    with pytest.raises(UserError, match="by_variance needs calibration data"):
        optimize(source, tmp_path / "out", **FFN, criterion=by_variance)
    (tmp_path / "calib").mkdir()
    for number in range(5):
        np.savez(
            tmp_path / "calib" / f"{number}.npz", x=rng.standard_normal((400, 6)).astype(np.float32) + number
        )
    optimize(source, tmp_path / "out", **{**FFN, "calib": tmp_path / "calib"}, criterion=by_variance)
    weights = ir.load(source).graph.initializers["a"].const_value.numpy()
    data = np.concatenate([np.load(tmp_path / "calib" / f"{n}.npz")["x"] for n in range(5)])
    variance = np.maximum(data @ weights, 0).var(axis=0)
    assert kept(tmp_path / "out") == sorted(np.argsort(variance)[6:].tolist())


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda s: np.zeros(3), r"scores of a have shape \[3\]: expected \[12\]"),
        (lambda s: np.full(12, np.nan), "12 of 12 are not finite"),
        (lambda s: "many", "no array of numbers"),
    ],
)
def test_scores_that_are_none(source: Path, tmp_path: Path, scores, message: str) -> None:
    with pytest.raises(UserError, match=message):
        optimize(
            source,
            tmp_path / "out",
            **FFN,
            criterion=lambda structures, _: {s: scores(s) for s in structures},
        )
    with pytest.raises(UserError, match="expected a dict"):
        optimize(source, tmp_path / "out", **FFN, criterion=lambda structures, _: [1])
    assert not (tmp_path / "out").exists()


def command(folder: Path, criterion: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(onnx_autoglm.__file__).parents[1])
    words = ["--prune", "ffn-channel=0.5", "--calib", "none", "--criterion", criterion]
    # As the installed command does it: the current folder is not among those that Python looks in.
    program = "import sys; sys.path.remove(''); from onnx_autoglm.cli import main; main()"
    environment = {"PYTHONPATH": root, "PATH": ""}
    return subprocess.run(
        [sys.executable, "-c", program, "optimize", "model.onnx", "-o", "out", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment,
    )


def test_the_command_line_imports_it(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    done = command(tmp_path, "mine:Last")
    assert done.returncode == 0, done.stderr
    assert kept(tmp_path / "out") == list(range(6, 12))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("magic", "unknown criterion 'magic'"),
        ("missing_module:Last", "cannot be imported: ModuleNotFoundError"),
        ("mine:Missing", "cannot be imported: AttributeError"),
        ("mine:NUMBER", "is of type int"),
    ],
)
def test_what_cannot_be_imported_is_one_line(
    source: Path, tmp_path: Path, criterion: str, message: str
) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    done = command(tmp_path, criterion)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_class_that_wants_arguments() -> None:
    class Wants:
        def __init__(self, number: int) -> None: ...

    with pytest.raises(UserError, match="cannot be made without arguments"):
        find_criterion(Wants)


def test_an_installed_package_names_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    point = SimpleNamespace(name="theirs", value=f"{__name__}:last")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[last.__module__])
    assert onnx_autoglm.Options(pruning={"algorithm": "theirs"}).pruning.algorithm == "theirs"
    assert find_criterion("theirs").name == "theirs"


def test_minitron_is_the_norm_over_samples_of_the_mean_over_positions() -> None:
    """A head's score is the L2 norm of those of its channels."""
    text = MLP.replace("float[n,6]", "float[n,s,6]").replace("float[n,4]", "float[n,s,4]")
    source = model(text)
    found = analyse(source.clone())
    (structure,) = [s for s in found if s.kind == "ffn-channel" and not s.pins]
    consumers = consumers_of(structure, find_consumers(found))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((3, 7, 6)).astype(np.float32)} for _ in range(5)]
    observed = observe(source, [c.contraction for c in consumers], feeds)
    weights = source.graph.initializers["a"].const_value.numpy()
    hidden = np.concatenate([np.maximum(feed["x"] @ weights, 0) for feed in feeds])
    expected = np.sqrt(np.square(np.abs(hidden).mean(axis=1)).sum(axis=0))
    scores = score_activation([structure], consumers, observed, "minitron")[structure]
    assert np.allclose(scores, expected, rtol=1e-5)
    # Two readers of one activation are no reason to count it twice.
    twice = score_activation([structure], consumers * 2, observed, "minitron")[structure]
    assert np.allclose(twice, expected, rtol=1e-5)
