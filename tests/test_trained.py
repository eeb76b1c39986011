"""The trained convolutional networks: they are what their README says, and pruning keeps what it promises."""

from __future__ import annotations

from pathlib import Path

import fashion_mnist
import numpy as np
import onnx
import pytest

from onnx_autoglm import optimize
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.runtime import Session

TRAINED = Path(__file__).parents[1] / "models" / "trained"
NAMES = ["resnet-fashion", "resnet-fashion-bn"]


def sample() -> dict[str, np.ndarray]:
    with np.load(TRAINED / "fashion-samples.npz") as data:
        return {name: data[name] for name in data.files}


def scores(file: Path, images: np.ndarray) -> np.ndarray:
    session = Session(canonicalize(open_model(file)), optimize=True)
    pixels = fashion_mnist.pixels(images)
    parts = [session.run({"image": pixels[i : i + 500]})["scores"] for i in range(0, len(pixels), 500)]
    return np.concatenate(parts)


def top1(file: Path) -> float:
    data = sample()
    return float((scores(file, data["images"]).argmax(axis=1) == data["labels"]).mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_networks_are_accurate(name: str) -> None:
    assert top1(TRAINED / f"{name}.onnx") > 0.91


def test_both_compute_the_same_and_only_one_normalises() -> None:
    images = sample()["images"][:50]
    folded, plain = (scores(TRAINED / f"{name}.onnx", images) for name in NAMES)
    assert np.allclose(folded, plain, atol=1e-3)
    norms = []
    for name in NAMES:
        graph = onnx.load(TRAINED / f"{name}.onnx").graph
        norms.append(sum(node.op_type == "BatchNormalization" for node in graph.node))
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert norms == [0, 16]


def test_the_recipe_says_how_to_get_the_data(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist.read(tmp_path, "train")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_fifths_of_all_channels_cost_two_points(name: str, tmp_path: Path) -> None:
    calibration = tmp_path / "calibration.npz"
    np.savez(calibration, image=fashion_mnist.pixels(sample()["calibration"]))
    file, out = TRAINED / f"{name}.onnx", tmp_path / "out"
    report = optimize(file, out, prune={"conv-channel": 0.4}, calib=calibration)
    assert report.repair["method"] == "affine" and report.result.parameters < 0.45 * report.source.parameters
    assert top1(out / "model.onnx") > top1(file) - 0.02
