"""A small residual network, trained on Fashion-MNIST: the convolutional model whose accuracy is measured.

    python models/fashion_mnist.py /usr/share/datasets/fashion-mnist -o models/trained

Writes the same network twice, as `resnet-fashion.onnx` (normalisation folded into the convolutions) and
`resnet-fashion-bn.onnx` (as it was trained), and `fashion-samples.npz`, a part of the data for calibration
and evaluation. Training takes about five minutes.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

WIDTHS = (32, 48, 64)  # of the residual streams, stage by stage
BLOCKS = 2  # per stage
STEM = 16
CLASSES = 10
EPOCHS, BATCH, PEAK_RATE, DECAY = 6, 128, 0.1, 5e-4
THREADS = 1  # the order of sums is part of the result, and a second one gains little
SHIFT = 2  # pixels
CALIBRATION, EVALUATION = 1200, 2000  # images of the committed sample
HINT = "it comes with the package dataset-fashion-mnist: apt-get install dataset-fashion-mnist"


def read(folder: Path, part: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Images `[n, 28, 28]` and labels `[n]`, both uint8, of the part `train` or `t10k`."""
    return _idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz")


def _idx(file: Path) -> numpy.ndarray:
    """An IDX file of bytes: two zeros, the type 8, the rank, the sizes (big-endian), the data."""
    import numpy

    if not file.is_file():
        raise SystemExit(f"{file} is missing: pass the folder of Fashion-MNIST; {HINT}")
    data = gzip.decompress(file.read_bytes())
    rank = data[3]
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"{file} is not an IDX file of bytes; {HINT}")
    shape = numpy.frombuffer(data, ">u4", rank, offset=4)
    return numpy.frombuffer(data, numpy.uint8, offset=4 + 4 * rank).reshape(shape)


def pixels(images: numpy.ndarray) -> numpy.ndarray:
    """What the network reads: `[n, 1, 28, 28]`, float32 from 0 to 1."""
    import numpy

    return (images[:, None] / 255).astype(numpy.float32)


def network() -> torch.nn.Module:
    """Three stages of basic blocks; the first block of each halves the image and projects its shortcut."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(outputs)
            self.shortcut: nn.Module = nn.Identity()
            if stride > 1:
                projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            inner = self.norm1(self.conv1(x)).relu()
            return (self.norm2(self.conv2(inner)) + self.shortcut(x)).relu()

    layers = [nn.Conv2d(1, STEM, 3, padding=1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU()]
    inputs = STEM
    for width in WIDTHS:
        for position in range(BLOCKS):
            layers.append(Block(inputs, width, 1 if position else 2))
            inputs = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES)]
    return nn.Sequential(*layers)


def train(folder: Path, epochs: int, seed: int) -> torch.nn.Module:
    """The network after one cycle of learning rates; flipped and shifted copies keep it from overfitting."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(THREADS)
    images, labels = (torch.from_numpy(array.copy()) for array in read(folder, "train"))
    x = torch.nn.functional.pad(images[:, None].float() / 255, (SHIFT,) * 4)
    model = network().to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_RATE, momentum=0.9, nesterov=True)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(x))
        for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
            scores = model(augmented(x[batch]))
            loss = torch.nn.functional.cross_entropy(scores, labels[batch].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(
            f"epoch {epoch + 1} of {epochs}: loss {total / len(x):.4f}, {accuracy(model, folder)}", flush=True
        )
    return model.eval()


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Padded images, half of them flipped, cut at a random place (one for each half)."""
    import torch

    flip = torch.rand(len(images)) < 0.5
    parts = []
    for part in (images[flip].flip(3), images[~flip]):
        top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
        size = images.shape[2] - 2 * SHIFT
        parts.append(part[:, :, top : top + size, left : left + size])
    order = torch.cat((flip.nonzero()[:, 0], (~flip).nonzero()[:, 0]))
    return torch.cat(parts)[order.argsort()]


def accuracy(model: torch.nn.Module, folder: Path) -> str:
    import torch

    images, labels = read(folder, "t10k")
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(part).argmax(1) for part in torch.from_numpy(pixels(images)).split(1000)])
    model.train()
    return f"test accuracy {(found.numpy() == labels).mean():.2%}"


def folded(model: torch.nn.Module) -> torch.nn.Module:
    """The same function with every normalisation folded into the convolution before it."""
    import copy
    import itertools

    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    def fold(parent: nn.Module) -> None:
        children = list(parent.named_children())
        for (name, child), (following, norm) in itertools.pairwise(children):
            if isinstance(child, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(child, norm))
                setattr(parent, following, nn.Identity())
        for _, child in children:
            fold(child)

    result = copy.deepcopy(model).eval()
    fold(result)
    return result


def export(model: torch.nn.Module, file: Path) -> None:
    """The network as ONNX with any number of images."""
    import torch
    from export import Target, dynamo_program, quiet
    from onnxscript import optimizer

    inputs = {"image": torch.zeros(2, 1, 28, 28)}
    # The exporter's own clean-up folds normalisations; constants alone are folded here.
    target = Target(optimize=False)
    with quiet(), torch.no_grad():
        program = dynamo_program(model, inputs, ["scores"], {"image": {0: "batch"}}, target)
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
        for node in program.model.graph.all_nodes():
            # Names of modules stay; stack traces hold paths of the machine that exported.
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
        program.save(file)


def save_samples(folder: Path, file: Path) -> None:
    """The first images of both parts: `calibration`, and `images` with `labels`."""
    import numpy

    training, (images, labels) = read(folder, "train")[0], read(folder, "t10k")
    parts = {
        "calibration": training[:CALIBRATION],
        "images": images[:EVALUATION],
        "labels": labels[:EVALUATION],
    }
    numpy.savez_compressed(file, **parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("-o", "--output", type=Path, default=Path("models/trained"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = train(arguments.data, arguments.epochs, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    export(folded(model), arguments.output / "resnet-fashion.onnx")
    export(model, arguments.output / "resnet-fashion-bn.onnx")
    save_samples(arguments.data, arguments.output / "fashion-samples.npz")


if __name__ == "__main__":
    main()
