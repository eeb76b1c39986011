"""The command line. Options of `optimize` derive from `onnx_autoglm.options`."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import click

from onnx_autoglm.cli_run import bench, generate, serve
from onnx_autoglm.cli_shared import console, option_of, progress_line
from onnx_autoglm.convert_options import ConvertOptions
from onnx_autoglm.engine_options import EngineOptions, engine_options
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.options import TOLERANCE, DataOptions, collect, collect_as, flags
from onnx_autoglm.quantization.options import QuantizationOptions

FIXABLE, FAILED, INTERRUPTED = 1, 3, 130


class _Version(click.Option):
    """`--version`, read from the installed metadata only when asked for."""

    def __init__(self) -> None:
        super().__init__(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=self._show,
            help="Show the version.",
        )

    @staticmethod
    def _show(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value:
            import onnx_autoglm

            click.echo(f"onnx-autoglm {onnx_autoglm.__version__}")
            context.exit()


@click.group(
    params=[_Version()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done; 1 something you can fix, the message says how; 2 wrong usage; 3 a check failed and "
    "nothing was written.",
)
def cli() -> None:
    """Prunes exported language models (and any other ONNX model), and proves every cut.

    \b
    onnx-autoglm inspect model.onnx            what can be cut, and what cannot, and why
    onnx-autoglm optimize model.onnx -o out    a smaller model, a plan and a report
    onnx-autoglm check model.onnx out/plan.json out/model.onnx
    onnx-autoglm eval out/model.onnx --data text.txt --reference model.onnx
    onnx-autoglm build out/model.onnx -o out/model.engine    a TensorRT engine
    onnx-autoglm sweep model.onnx --keep 0.9 0.8 0.7 -o out --eval text.txt
    onnx-autoglm quantize model.onnx -o out --calib text.txt
    onnx-autoglm generate model.onnx --prompt "The capital of France is"
    onnx-autoglm serve model.onnx              an OpenAI-compatible server
    onnx-autoglm bench model.onnx out/model.onnx   how much faster, at what load
    onnx-autoglm convert model.onnx -o out --precision fp16
    """


# --- commands


@cli.command(params=[option_of(flag) for flag in flags()])
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output folder.  [default: MODEL's name + -pruned]",
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with any of these options, in sections."
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def optimize(model: Path, output: Path | None, config: Path | None, quiet: bool, **given: Any) -> None:
    """Remove heads and channels from MODEL, repair shapes, prove the result and write it.

    Writes model.onnx (+ model.onnx.data), plan.json and report.json into the output folder, or nothing.

    \b
    Examples:
      onnx-autoglm optimize model.onnx -o out
      onnx-autoglm optimize model.onnx -o out --prune query-head=0.5,ffn-channel=0.25
      onnx-autoglm optimize model.onnx -o out --prune ffn-channel=0.3 --scope global --align 8
      onnx-autoglm optimize model.onnx -o out --config pruning.yaml
    """
    options = collect({**given, "prune": ",".join(given["prune"])}, config)
    folder = output or model.with_name(f"{model.stem}-pruned")
    from onnx_autoglm import pipeline

    with progress_line(quiet) as progress:
        report = pipeline.optimize(model, folder, options, progress=progress)
    if not quiet:
        report.print(console(sys.stdout))
        click.echo(f"written to {folder}")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
def inspect(model: Path, as_json: bool) -> None:
    """Show what can be pruned in MODEL: layer, kind, count, size, share of parameters, and every pin."""
    from onnx_autoglm import pipeline

    found = pipeline.inspect(model)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
    else:
        found.print(console(sys.stdout))


@cli.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Sample inputs (.npz) instead of generated ones."
)
@click.option(
    "--tolerance", type=float, default=TOLERANCE, show_default=True, help="Relative difference that passes."
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def check(source: Path, plan: Path, pruned: Path, inputs: Path | None, tolerance: float, quiet: bool) -> None:
    """Prove again, from PLAN alone, that PRUNED is SOURCE with exactly the planned parts removed."""
    from onnx_autoglm import pipeline

    with progress_line(quiet) as progress:
        proof = pipeline.check(source, plan, pruned, inputs=inputs, tolerance=tolerance, progress=progress)
    if not quiet:
        click.echo(
            f"masked == pruned: worst relative difference {proof.difference.relative:.1e} (limit {tolerance:.0e})"
        )


@cli.command(
    params=[option_of(flag) for model in (QuantizationOptions, DataOptions) for flag in flags(model)]
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Output folder.  [default: MODEL's name + -quantized]",
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with sections quantization and data."
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def quantize(model: Path, output: Path | None, quiet: bool, **given: Any) -> None:
    """Write MODEL with integers for ONNX Runtime and for TensorRT, as fast as the limit of loss allows.

    Writes model.onnx (unchanged), model.cpu.onnx, model.trt.onnx and quantization.json into the output folder, or
    nothing. The default, auto, learns from what a language model writes itself; text like that of the application is
    better, and --eval measures the result on more of it.

    \b
    Examples:
      onnx-autoglm quantize model.onnx -o out --calib text.txt --eval other-text.txt
      onnx-autoglm quantize model.onnx -o out --quantize w8a8 --max-loss 1% --target cpu --calib text.txt
      onnx-autoglm quantize model.onnx -o out --quantize w4 --target cpu --quantize-regime decode
    """
    folder = output or model.with_name(f"{model.stem}-quantized")
    from onnx_autoglm.quantization.pipeline import quantize as run

    with progress_line(quiet) as progress:
        report = run(model, folder, progress=progress, **given)
    if not quiet:
        report.print(console(sys.stdout))
        click.echo(f"written to {folder}")


@cli.command("eval")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="A text, .npz samples with an array 'labels', images in one folder per class, ... (as optimize --eval).",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Compare with this model (the source of a pruned one): agreement and KL(reference || model).",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="tokenizer.json for texts. By default the one beside MODEL, or beside the reference.",
)
@click.option("--preprocess", metavar="KEY=VALUE,...", help="How images become inputs (see optimize --help).")
@click.option("--tokens", type=int, default=16384, show_default=True, help="Use at most this many tokens.")
@click.option("--window", type=int, default=512, show_default=True, help="Tokens per run of the model.")
@click.option(
    "--generate",
    type=int,
    metavar="N",
    help="Also continue prompts (the first half of a window) by N tokens, greedily, and score that: BLEU-4, ROUGE-L.",
)
@click.option("--prompts", type=int, default=16, show_default=True, help="Continue at most this many.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def evaluate(model: Path, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure the quality of MODEL on data, alone or beside a reference. Writes no files.

    Language models: perplexity and the share of next tokens ranked first. Classifiers: top-1 and top-5. With
    --reference also how often both rank the same first, and KL(reference || model) per position in nats; this
    alone needs no labels.

    \b
    Examples:
      onnx-autoglm eval model.onnx --data text.txt
      onnx-autoglm eval out/model.onnx --data text.txt --reference model.onnx --json
      onnx-autoglm eval out/model.onnx --data text.txt --reference model.onnx --generate 64
      onnx-autoglm eval resnet.onnx --data val/ --preprocess size=256,crop=224,mean=0.485:0.456:0.406,std=0.225
    """
    from onnx_autoglm.evaluation import evaluate as run

    with progress_line(quiet) as progress:
        found = run(model, **given, progress=progress)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1, allow_nan=False))
    else:
        found.print(console(sys.stdout))


@cli.command(params=[option_of(flag) for flag in flags(EngineOptions)])
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The engine file to write.  [default: MODEL's name + .engine]",
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def build(model: Path, output: Path | None, quiet: bool, **given: Any) -> None:
    """Build a TensorRT engine from MODEL, which has to be in the precision that the engine is to have.

    Writes the engine, engine.json (what it is and how to build it again) and a log, or nothing. Engines run on the kind
    of GPU that they are built for; TensorRT-RTX builds without a GPU.

    \b
    Examples:
      onnx-autoglm build model.onnx -o model.engine
      onnx-autoglm build model.onnx -o model.engine --batch 1:4:16 --sequence 1:256:4096 --past 1:1024:4096
      onnx-autoglm build model.onnx -o model.engine --backend rtx --compute-capability 8.9
    """
    from onnx_autoglm.engine import build as run

    with progress_line(quiet) as progress:
        report = run(model, output or model.with_suffix(".engine"), engine_options(given), progress=progress)
    if not quiet:
        click.echo("\n".join(report.lines()))


@cli.command(params=[option_of(flag) for flag in flags(ConvertOptions)])
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def convert(model: Path, output: Path, quiet: bool, **given: Any) -> None:
    """Convert MODEL to float16 or bfloat16, with parts in float32 where 16 bits do not do, and compare both.

    Writes model.onnx (+ model.onnx.data) and report.json into the output folder, or nothing.

    \b
    Examples:
      onnx-autoglm convert model.onnx -o out --precision fp16
      onnx-autoglm convert model.onnx -o out --precision fp16 --calib text.txt --eval other.txt
      onnx-autoglm convert model.onnx -o out --precision bf16 --io-precision bf16 --keep-logits-fp32
    """
    from onnx_autoglm.conversion import convert as run

    with progress_line(quiet) as progress:
        report = run(model, output, collect_as(ConvertOptions, given), progress=progress)
    if not quiet:
        report.print(console(sys.stdout))
        click.echo(f"written to {output}")


class _Sweep(click.Command):
    """Lets `--keep 0.9 0.8 0.7` take several values after one flag, which click's options cannot."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        in_keep = False
        for word in args:
            in_keep = word == "--keep" or (in_keep and _is_numbers(word))
            if in_keep and word != "--keep" and words[-1] != "--keep":
                words.append("--keep")
            words.append(word)
        return super().parse_args(ctx, words)


def _is_numbers(word: str) -> bool:
    return all(re.fullmatch(r"\d*\.?\d+", part) for part in word.split(","))


@cli.command(cls=_Sweep, params=[option_of(flag) for flag in flags() if flag.keyword != "keep"])
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Output folder.")
@click.option(
    "--keep",
    multiple=True,
    metavar="FRACTION...",
    help="Values of optimize --keep, after one flag (0.9 0.8 0.7) or comma-separated.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="OPTION=V1,V2,...",
    help="Values of any option of optimize; a plus joins parts of one value. Repeatable: all combinations are run.",
)
@click.option("--jobs", type=int, default=1, show_default=True, help="Points to prune at the same time.")
@click.option(
    "--latency-runs", type=int, default=10, show_default=True, help="Timed runs of each model; 0 for none."
)
@click.option(
    "--config", type=click.Path(path_type=Path), help="YAML file with options that all points share."
)
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def sweep(
    model: Path, output: Path, keep: tuple[str, ...], vary: tuple[str, ...], quiet: bool, **given: Any
) -> None:
    """Run optimize on MODEL at several points and collect a table: size, FLOPs, quality, latency, time.

    Writes sweep.csv, sweep.json and sweep.png (with matplotlib) into the output folder, and each point into a folder
    of its own (keep-0.80/). Run it again to go on where it stopped: a point with the same source, data, options and
    version is not run again. All options of optimize are options here.

    \b
    Examples:
      onnx-autoglm sweep model.onnx --keep 0.9 0.8 0.7 -o out --eval text.txt --calib other.txt
      onnx-autoglm sweep model.onnx -o out --vary prune=ffn-channel=0.1,ffn-channel=0.2,ffn-channel=0.3
      onnx-autoglm sweep model.onnx -o out --vary prune=ffn-channel=0.2,ffn-channel=0.2+query-head=0.1
      onnx-autoglm sweep model.onnx -o out --prune ffn-channel=0.2 --vary criterion=l2,wanda,obs --calib text.txt
    """
    from onnx_autoglm.sweep_points import parse_vary
    from onnx_autoglm.sweep_run import sweep as run

    levels = [part for word in keep for part in word.split(",")]
    given["prune"] = ",".join(given["prune"])
    with progress_line(quiet) as progress:
        found = run(model, output, keep=levels, vary=parse_vary(vary), progress=progress, **given)
    if not quiet:
        found.print(console(sys.stdout))
        click.echo(f"written to {output}")


cli.add_command(generate)
cli.add_command(serve)
cli.add_command(bench)


def main() -> None:
    """Runs the command line: user errors in a line or two, everything else with its trace."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = FIXABLE
    except CheckFailed as error:
        click.echo(f"check failed, nothing written: {error}", err=True)
        code = FAILED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted, nothing written", err=True)
        code = INTERRUPTED
    sys.exit(code)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
