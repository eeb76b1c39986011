"""Options are data: one definition behind command line, Python, configuration and documentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from onnx_autoglm import UserError
from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.engine_options import EngineOptions
from onnx_autoglm.generate_options import GenerateOptions
from onnx_autoglm.options import Options, collect, flags
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.serve_options import ServeOptions

ROOT = Path(__file__).parents[1]


def test_the_documentation_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools/options.py"], capture_output=True, text=True, check=True
    )
    assert done.stdout == (ROOT / "docs/options.md").read_text(), (
        "run: python tools/options.py > docs/options.md"
    )


@pytest.mark.parametrize(
    "kind", [Options, QuantizationOptions, EngineOptions, GenerateOptions, ServeOptions, BenchOptions]
)
def test_every_option_says_what_it_does_and_has_its_own_name(kind: type[BaseModel]) -> None:
    names = [flag.name for flag in flags(kind)]
    assert len(set(names)) == len(names)
    assert all(flag.field.description for flag in flags(kind))


def test_keywords_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("pruning: {algorithm: l1, align: 8}\n")
    options = collect({"criterion": "random", "prune": {"hidden": 0.5}}, config)
    assert (options.pruning.algorithm, options.pruning.align) == ("random", 8)
    assert options.pruning.sparsity_level == {"hidden": 0.5}


def test_no_options_are_the_defaults() -> None:
    assert collect({}) == Options()


@pytest.mark.parametrize(
    ("given", "expected", "path"),
    [
        ("self", "self", None),
        ("none", "none", None),
        (None, "auto", None),
        ("./self", Path("self"), Path("self")),
        ("a.txt", Path("a.txt"), Path("a.txt")),
    ],
)
def test_calibration_is_a_word_or_a_path(given: str | None, expected: object, path: Path | None) -> None:
    data = collect({"calib": given}).data
    assert data.calibration == expected and data.calibration_path == path


def test_one_number_stands_for_the_usual_kinds() -> None:
    assert collect({"prune": 0.3}).pruning.sparsity_level == 0.3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pruning: {sparsity_level: {ffn-channel: 2}}", "between 0 and 1"),
        ("pruning: {speed: 2}", "pruning.speed"),
        ("- a\n- b", "expected sections"),
        ("pruning: 5", "pruning"),
        ("pruning: [", "is not a YAML file"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path: Path, text: str, expected: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(UserError, match=expected):
        collect({"criterion": "l1"}, config)


def test_options_survive_a_round_trip() -> None:
    """A dump has explicit nulls, which must be as good as nothing."""
    from onnx_autoglm.options import make_options

    options = collect({"speedup": 1.5, "max_loss": "2%"})
    assert make_options(options.model_dump(mode="json"), "dump") == options
    assert options.budget.max_loss == 0.02
