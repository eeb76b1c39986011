"""Accuracy of a convolutional network after pruning by every method, in one run.

    python tools/conv_repair.py [--data /usr/share/datasets/fashion-mnist]

Prunes the networks of `models/trained` (normalisation folded into the convolutions, and not): every convolution
loses the same share of its channels, with the residual streams and without. Calibration is the committed sample.
Top-1 is that of the whole test set with `--data` (see `models/fashion_mnist.py`), else of the committed sample.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnx_autoglm import optimize
from onnx_autoglm.axes.dims import leaves
from onnx_autoglm.axes.facts import Role
from onnx_autoglm.cut import analyse
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize

ROOT = Path(__file__).parents[1]
TRAINED = ROOT / "models" / "trained"
sys.path.insert(0, str(ROOT / "models"))

MODELS = ("resnet-fashion", "resnet-fashion-bn")
CRITERIA = ("l1", "l2", "wanda", "flap", "obs")
REPAIRS = ("none", "bias", "affine")
SCOPES = ("all", "inner")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST, for the whole test set")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--fraction", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--criterion", nargs="+", choices=CRITERIA, default=CRITERIA)
    parser.add_argument("--repair", nargs="+", choices=REPAIRS, default=REPAIRS)
    parser.add_argument("--scope", nargs="+", choices=SCOPES, default=SCOPES)
    arguments = parser.parse_args()
    images, labels = evaluation(arguments.data)
    with tempfile.TemporaryDirectory() as scratch:
        calibration = Path(scratch) / "calibration.npz"
        save_calibration(calibration)
        for model in arguments.model:
            file = TRAINED / f"{model}.onnx"
            dense = accuracy(file, images, labels)
            print(f"{model}: top-1 {dense:.2%} of {len(labels)} images")
            for scope in arguments.scope:
                options = {"calib": calibration, "include": inner(file) if scope == "inner" else ()}
                for fraction in arguments.fraction:
                    for criterion in arguments.criterion:
                        options |= {"prune": {"conv-channel": fraction}, "criterion": criterion}
                        cells = compared(file, arguments.repair, options, images, labels, dense)
                        print(f"  {scope:5} -{fraction:.0%} {criterion:5}  {cells}", flush=True)


def inner(model: Path) -> tuple[str, ...]:
    """The channels that are no residual stream: those of no sum of two activations."""
    structures = analyse(canonicalize(open_model(model)))
    added = {atom for dim, role, _ in structures.analysis.roles if role is Role.ADDED for atom in leaves(dim)}
    return tuple(s.id for s in structures.found if s.kind == "conv-channel" and s.atom not in added)


def compared(
    model: Path,
    repairs: list[str],
    options: dict[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    dense: float,
) -> str:
    """Top-1 after each repair, and what was removed."""
    started = time.perf_counter()
    cells = []
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        for repair in repairs:
            report = optimize(model, output, repair=repair, **options)
            reached = accuracy(output / "model.onnx", images, labels)
            cells.append(f"{repair} {100 * reached:5.2f} ({100 * (reached - dense):+6.2f})")
    size = 1 - report.result.parameters / report.source.parameters
    work = 1 - report.result.flops / report.source.flops
    cells.append(f"parameters -{size:.0%}, FLOPs -{work:.0%}  {time.perf_counter() - started:3.0f} s")
    return "  ".join(cells)


def evaluation(folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images as the network reads them, and labels."""
    import fashion_mnist

    if folder is not None:
        images, labels = fashion_mnist.read(folder, "t10k")
    else:
        with np.load(TRAINED / "fashion-samples.npz") as sample:
            images, labels = sample["images"], sample["labels"]
    return fashion_mnist.pixels(images), labels


def save_calibration(file: Path) -> None:
    """The committed calibration images as one feed."""
    import fashion_mnist

    with np.load(TRAINED / "fashion-samples.npz") as sample:
        np.savez(file, image=fashion_mnist.pixels(sample["calibration"]))


def accuracy(model: Path, images: np.ndarray, labels: np.ndarray) -> float:
    """The share of images whose highest score is that of their label."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    scores = [session.run(None, {name: images[i : i + 500]})[0] for i in range(0, len(images), 500)]
    return float((np.concatenate(scores).argmax(axis=1) == labels).mean())


if __name__ == "__main__":
    main()
