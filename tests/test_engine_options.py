"""Options of `build`: ranges, names, and the command line that gives them back."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from onnx_autoglm import UserError
from onnx_autoglm.engine_options import EngineOptions, Range, command_line, engine_options, parse_settings
from onnx_autoglm.options import collect, flags


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("1:128:2048", Range(1, 128, 2048)),
        ("4", Range(4, 4, 4)),
        (7, Range(7, 7, 7)),
        ((1, 2, 3), Range(1, 2, 3)),
    ],
)
def test_ranges(given: Any, expected: Range) -> None:
    assert engine_options({"batch": given}).batch == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"batch": "3:2:1"}, ["--batch", "rise"]),
        ({"batch": "0:1:2"}, ["--batch", "smallest size is 1"]),
        ({"past": "many"}, ["--past", "MIN:OPT:MAX"]),
        ({"sequence": "1:2"}, ["--sequence", "MIN:OPT:MAX"]),
        ({"shape": "height"}, ["--shape", "NAME="]),
        ({"compute_capability": "89"}, ["--compute-capability", "8.9"]),
        ({"backend": "cuda"}, ["--backend"]),
        ({"precision": "fp16"}, ["unknown option 'precision'"]),
    ],
)
def test_what_is_not_allowed_is_said(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        engine_options(given)
    assert all(word in str(error.value) for word in words)
    assert len(str(error.value).splitlines()) == 1


def test_the_command_line_gives_the_same_options() -> None:
    given = {
        "backend": "rtx",
        "batch": "1:4:8",
        "shape": {"height": 224, "width": (1, 2, 3)},
        "workspace": "1GiB",
        "refit": True,
        "prepare": False,
        "compute_capability": ("8.6", "8.9"),
    }
    options = engine_options(given)
    words = command_line(options)
    assert words[:2] == ["--backend", "rtx"] and "--no-prepare" in words and "--refit" in words
    assert command_line(EngineOptions()) == []
    # Read by the real parser, the words mean the same.
    from onnx_autoglm.cli import cli

    build = cli.commands["build"]  # type: ignore[attr-defined]
    parsed = build.make_context("build", ["m.onnx", *words]).params
    parsed = {name: value for name, value in parsed.items() if name not in ("model", "output", "quiet")}
    assert engine_options(parsed) == options


def test_every_option_says_what_it_does_and_has_its_own_name() -> None:
    found = list(flags(EngineOptions))
    assert len({flag.name for flag in found}) == len(found)
    assert all(flag.field.description for flag in found)


def test_the_options_of_the_stage_in_optimize() -> None:
    assert parse_settings(["past=1:2:3", "shape=a=1", "shape=b=2", "--refit", "prepare=false"]) == {
        "past": "1:2:3",
        "shape": ("a=1", "b=2"),
        "refit": True,
        "prepare": False,
    }
    options = collect({"engine": "auto", "engine_option": {"past": "1:2:3", "refit": True}})
    assert options.engine.options == ("past=1:2:3", "refit=true")
    with pytest.raises(UserError, match="rise"):
        collect({"engine_option": ("past=3:2:1",)})
    with pytest.raises(UserError, match="value of --engine"):
        collect({"engine_option": ("backend=rtx",)})
    with pytest.raises(UserError, match="NAME=VALUE"):
        collect({"engine_option": ("past",)})


def test_help_needs_no_backend() -> None:
    code = (
        "import sys; from onnx_autoglm.cli import main; sys.argv = ['onnx-autoglm', 'build', '--help']\n"
        "try: main()\n"
        "finally: print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text, loaded = done.stdout.rsplit("LOADED", 1)
    assert "--weight-streaming" in text
    assert not {"tensorrt", "tensorrt_rtx", "polygraphy", "onnx", "numpy"} & set(loaded.split())
