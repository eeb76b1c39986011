"""The commands that run models: `generate`, `serve`, `bench`. Their options derive from fields, as those of `optimize`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from onnx_autoglm.bench_options import BenchOptions
from onnx_autoglm.cli_shared import console, from_flags, option_of, progress_line
from onnx_autoglm.errors import UserError
from onnx_autoglm.generate_options import GenerateOptions
from onnx_autoglm.options import flags
from onnx_autoglm.serve_options import ServeOptions


@click.command(params=[option_of(flag) for flag in flags(GenerateOptions)])
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--prompt", multiple=True, metavar="TEXT", help="What to continue; repeatable. - reads it from stdin."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Write JSON when all is done, instead of text as it comes."
)
@click.option(
    "--genai-config",
    is_flag=True,
    help="Write genai_config.json beside MODEL instead, with which onnxruntime-genai runs it.",
)
def generate(model: Path, prompt: tuple[str, ...], as_json: bool, genai_config: bool, **given: Any) -> None:
    """Continue prompts with the language model MODEL.

    The text of one prompt is written as it comes; several are continued at once and written one after the other.

    \b
    Examples:
      onnx-autoglm generate model.onnx --prompt "The capital of France is"
      onnx-autoglm generate model.onnx --prompt "Once" --prompt "In the" --temperature 0.8 --top-p 0.95 --seed 3
      onnx-autoglm generate model.onnx --genai-config
    """
    options = from_flags(GenerateOptions, given)
    if genai_config:
        _write_genai_config(model, options)
        return
    if not prompt:
        raise UserError("nothing to continue: pass --prompt TEXT (or --prompt - to read it from stdin)")
    texts = [sys.stdin.read() if text == "-" else text for text in prompt]
    from onnx_autoglm.generate import Generator

    generator = Generator.open(
        model,
        tokenizer=options.tokenizer,
        eos=options.eos,
        context=options.context,
        rows=options.batch,
        threads=options.threads,
    )
    how = (options.max_tokens, options.sampling, options.seed, options.stop)
    if len(texts) == 1 and not as_json:
        for _, piece in generator.stream(texts, *how):
            click.echo(piece, nl=False)
        click.echo()
        return
    found = generator.generate(texts, *how)
    if as_json:
        rows = [
            {"prompt": text, "text": one.text, "tokens": one.tokens, "finish": one.finish}
            for text, one in zip(texts, found, strict=True)
        ]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        click.echo("\n\n".join(text + one.text for text, one in zip(texts, found, strict=True)))


def _write_genai_config(model: Path, options: GenerateOptions) -> None:
    from onnx_autoglm.data_text import open_tokenizer
    from onnx_autoglm.genai_config import write_genai_config
    from onnx_autoglm.model_folder import ModelFolder, parse_ends

    folder = ModelFolder(model, options.tokenizer)
    words = None if folder.tokenizer is None else open_tokenizer(folder.tokenizer)
    ends = parse_ends(options.eos, words) or folder.ends(words)[0]
    click.echo(f"written {write_genai_config(model, ends, options.context or folder.context())}")


@click.command(params=[option_of(flag) for flag in flags(ServeOptions)])
@click.argument("model", type=click.Path(path_type=Path))
def serve(model: Path, **given: Any) -> None:
    """Serve MODEL over HTTP, for clients that speak OpenAI's interface.

    Language models: /v1/completions, /v1/chat/completions (where a chat template lies beside the model), /v1/models.
    Other models: /predict with JSON arrays by input name. All: /healthz, /metrics. Prompts are never logged.

    \b
    Examples:
      onnx-autoglm serve model.onnx --port 8080
      curl localhost:8080/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Once", "max_tokens": 9}'
    """
    from onnx_autoglm.serve import serve as run

    run(model, from_flags(ServeOptions, given))


@click.command(params=[option_of(flag) for flag in flags(BenchOptions)])
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for bench.json and bench.png.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON instead of a table.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def bench(a: Path, b: Path, output: Path | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Compare the speed of the models A and B: how much faster is B, and is that more than noise?

    Both are loaded and take turns. Language models: reading a prompt, and writing one token after it; other models: one
    run. Ratios are of runs that followed each other, with 95 % confidence intervals. --load starts a server of each
    and raises the load until both are saturated.

    \b
    Examples:
      onnx-autoglm bench model.onnx out/model.onnx
      onnx-autoglm bench model.onnx out/model.onnx --load --data text.txt -o bench
    """
    from onnx_autoglm.bench_run import bench as run

    with progress_line(quiet) as progress:
        found = run(a, b, from_flags(BenchOptions, given), output=output, progress=progress)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1, allow_nan=False))
    else:
        found.print(console(sys.stdout))
        if output is not None:
            click.echo(f"written to {output}")
