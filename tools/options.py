"""Writes docs/options.md (and with `engine` docs/engine-options.md) from the definition of the options: `python tools/options.py > docs/options.md`."""

from __future__ import annotations

import sys
from typing import Literal, get_args, get_origin

from onnx_autoglm.engine_options import EngineOptions
from onnx_autoglm.kinds import KINDS
from onnx_autoglm.options import Flag, flags


def main() -> None:
    print(engine_page() if sys.argv[1:] == ["engine"] else page(), end="")


def engine_page() -> str:
    """The options of `build` as Markdown."""
    lines = [
        "# Options of `build`",
        "",
        "Written by `tools/options.py engine` from `onnx_autoglm/engine_options.py`. `onnx_autoglm.build(...)` takes the",
        "same names without the dashes, and so does `--engine-option NAME=VALUE` of `optimize`.",
        "",
        "| command line | default | what it does |",
        "|---|---|---|",
        *(_row(flag, with_path=False) for flag in flags(EngineOptions)),
    ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page as Markdown."""
    lines = [
        "# Options of `optimize`",
        "",
        "Written by `tools/options.py` from `onnx_autoglm/options.py`. The command line, `onnx_autoglm.optimize(...)`",
        "(names without the dashes) and the YAML file of `--config` take the same options; the command line wins.",
        "",
        "| command line | YAML | default | what it does |",
        "|---|---|---|---|",
        *(_row(flag) for flag in flags()),
        "",
        "## Kinds",
        "",
        "| kind | what |",
        "|---|---|",
        *(f"| `{kind}` | {text} |" for kind, text in KINDS.items()),
        "",
        "## Example",
        "",
        "```yaml",
        "pruning:",
        "  algorithm: obs",
        "  sparsity_level: {query-head: 0.25, ffn-channel: 0.3}",
        '  target_layers: ["layers.*"]',
        "  scope: global",
        "  align: 8",
        "data: {calibration: calib.txt, evaluation: held-out.txt}",
        "repair: affine",
        "check:",
        "  tolerance: 1.0e-4",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _row(flag: Flag, *, with_path: bool = True) -> str:
    kind, default = flag.field.annotation, flag.field.default
    choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    value = (flag.metavar or choices).replace("|", "\\|")
    name = f"`{flag.name}`" + (f" {value}" if value else "")
    shown = "" if default in (None, (), {}) else f"`{default}`"
    path = f" `{'.'.join(flag.path)}` |" if with_path else ""
    return f"| {name} |{path} {shown} | {flag.field.description} |"


if __name__ == "__main__":
    main()
