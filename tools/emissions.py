"""Quantizes the models of the zoo and compares both emissions bit by bit, in the ONNX reference evaluator.

    python models/build.py -o build/models
    python tools/emissions.py [build/models/glm-*] [--rtx]

8-bit weights and activations, calibrated on generated inputs (the sample beside a model where there is one); what falls
back is left out, so that everything that can be an integer is. `audit` is how many of the promised products ONNX Runtime
computes in integers. With `--rtx` the emission for TensorRT is also parsed and serialized by TensorRT-RTX.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from onnx_autoglm.dataset import Arrays, Dataset
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_files import load_feeds
from onnx_autoglm.feeds import generate_feeds
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.quantization.audit import audit
from onnx_autoglm.quantization.decide import decide
from onnx_autoglm.quantization.emit import emit
from onnx_autoglm.quantization.options import QuantizationOptions
from onnx_autoglm.quantization.prepare import prepare
from onnx_autoglm.quantization.schemes import Target
from onnx_autoglm.runtime import Session

LARGEST = 32 << 20  # bytes of weights: the reference evaluator is slow


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, default=sorted(Path("build/models").iterdir()))
    parser.add_argument("--rtx", action="store_true")
    arguments = parser.parse_args()
    counts = {"equal": 0, "different": 0, "left out": 0}
    for folder in arguments.folders:
        verdict, text = look_at(folder / "model.onnx", arguments.rtx)
        counts[verdict] += 1
        print(f"{folder.name:36} {verdict:10} {text}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


def look_at(path: Path, rtx: bool) -> tuple[str, str]:
    source = canonicalize(open_model(path))
    if sum(v.const_value.nbytes for v in source.graph.initializers.values() if v.const_value) > LARGEST:
        return "left out", "too large for the reference evaluator"
    feed = _feed(path, source)
    data = Dataset("generated", "", 1, [feed])
    options = QuantizationOptions(scheme="w8a8", max_loss=1e9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            prepared = prepare(source, data, options, folder / "scratch")
            plan = decide(source, prepared, data, options, folder / "scratch")
            targets: tuple[Target, ...] = ("cpu", "tensorrt")
            files = {target: emit(plan, target, path, folder, lambda _: None) for target in targets}
        except UserError as error:
            return "left out", str(error)[:150]
        text = ""
        try:
            result = audit(files["cpu"], plan.decisions)
            text = f"kernels {result.integer}/{result.promised}"
        except UserError as error:
            text = f"no audit: {str(error)[:60]}"
        if rtx:
            text += f", rtx {_rtx(files['tensorrt'])}"
        try:
            runs = [_evaluate(file, feed) for file in files.values()]
        except Exception as error:  # noqa: BLE001 - it knows no Q/DQ below opset 19, and no operators of other domains
            text += f", not in the reference evaluator ({type(error).__name__}) but in ONNX Runtime, not optimized"
            runs = [list(Session(open_model(file)).run(feed).values()) for file in files.values()]
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*runs, strict=True))
    return ("equal" if same else "different"), text


def _feed(path: Path, source: ir.Model) -> Arrays:
    sample = path.with_name("sample.npz")
    if sample.exists():
        return load_feeds(sample, source)
    return generate_feeds(source, batch=1)


def _evaluate(file: Path, feed: Arrays) -> list[np.ndarray]:
    evaluator = ReferenceEvaluator(onnx.load(file))
    return list(evaluator.run(None, {name: feed[name] for name in evaluator.input_names}))


def _rtx(file: Path) -> str:
    import onnx_autoglm

    try:
        onnx_autoglm.build(file, file.with_suffix(".engine"), backend="rtx")
    except UserError as error:
        return f"FAILED: {str(error)[:120]}"
    return "ok"


if __name__ == "__main__":
    main()
