"""Writes docs/options.md from the definition of the options: `python tools/options.py > docs/options.md`."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.engine_options import EngineOptions
from onnx_autoglm.generate_options import GenerateOptions
from onnx_autoglm.kinds import KINDS
from onnx_autoglm.options import Flag, flags
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.serve_options import ServeOptions

OTHERS = {
    "quantize": QuantizationOptions,
    "build": EngineOptions,
    "generate": GenerateOptions,
    "serve": ServeOptions,
    "bench": BenchOptions,
}


def main() -> None:
    print(page(), end="")


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
    for command, kind in OTHERS.items():
        lines += [
            "",
            f"# Options of `{command}`",
            "",
            "| command line | default | what it does |",
            "|---|---|---|",
        ]
        lines += [_row(flag, yaml=False) for flag in flags(kind)]
    return "\n".join(lines) + "\n"


def _row(flag: Flag, *, yaml: bool = True) -> str:
    kind, default = flag.field.annotation, flag.field.default
    choices = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""
    value = (flag.metavar or choices).replace("|", "\\|")
    name = f"`{flag.name}`" + (f" {value}" if value else "")
    shown = "" if default in (None, (), {}) else f"`{default}`"
    path = f"| `{'.'.join(flag.path)}` " if yaml else ""
    return f"| {name} {path}| {shown} | {flag.field.description} |"


if __name__ == "__main__":
    main()
