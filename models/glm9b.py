"""Large GLM graphs, exported with fake tensors so that no model ever has to fit into memory.

`glm-9b` has the size of GLM-4-9B, to time programs that look at structure and not at numbers: its
initializers point into a sparse file, which reads as zeros and takes no disk space. `glm-large` is cut
to a few layers, in float32, and its file is filled with random weights, to run programs at scale.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import Target
from recipes import Recipe

if TYPE_CHECKING:
    import onnx_ir
    import torch

DATA = "model.onnx.data"
ALIGNMENT = 4096  # of each tensor in the file, as memory mapping likes it


def recipes() -> list[Recipe]:
    target = Target(optimize=False)  # folding would need the weights
    large = {"num_hidden_layers": 7, "vocab_size": 32768, "pad_token_id": 0, "eos_token_id": 1}
    return [
        Recipe("glm-9b", "glm", partial(build, target, {}), frozenset({"timing", "float16"})),
        Recipe("glm-large", "glm", partial(build_filled, target, large), frozenset({"timing", "float32"})),
    ]


def build_filled(target: Target, settings: dict[str, Any], folder: Path) -> None:
    """As `build` in float32, with random weights in the file (about 6.7 GB)."""
    import torch

    build(target, settings, folder, torch.float32)
    fill(folder)


def fill(folder: Path) -> None:
    """Writes random weights into the data file of a sparse model, one tensor at a time.

    Matrices get the scale that keeps activations alike in size, norms lie around 1, and the rotary
    frequencies, the only vector that is not a weight, are computed.
    """
    import numpy as np
    import onnx_ir

    rng = np.random.default_rng(0)
    model = onnx_ir.load(folder / "model.onnx")
    with (folder / DATA).open("r+b") as file:
        for name, value in model.graph.initializers.items():
            tensor: Any = value.const_value
            shape = tuple(int(size) for size in tensor.shape)
            file.seek(tensor.offset)
            if name.endswith("inv_freq"):
                rows = [np.float32(10000.0) ** (-np.arange(shape[0], dtype=np.float32) / shape[0])]
            elif len(shape) == 1:
                rows = [rng.standard_normal(shape, dtype=np.float32) * 0.1 + (0 if "bias" in name else 1)]
            else:
                scale = np.float32(shape[-1] ** -0.5)
                rows = (rng.standard_normal(shape[1], dtype=np.float32) * scale for _ in range(shape[0]))
            for row in rows:
                row.astype(tensor.dtype.numpy()).tofile(file)


def build(target: Target, settings: dict[str, Any], folder: Path, dtype: torch.dtype | None = None) -> None:
    import onnx_ir
    import torch
    from export import decoder_axes, decoder_module, dynamo_program, quiet, save_sample, token_inputs
    from torch._subclasses import FakeTensorMode
    from transformers import GlmConfig, GlmForCausalLM

    config = GlmConfig(**settings, attn_implementation="eager")
    inputs = token_inputs(config.vocab_size, target)
    save_sample(folder, {name: tensor.numpy() for name, tensor in inputs.items()})
    with quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = GlmForCausalLM._from_config(config, dtype=dtype or torch.float16).eval()
        fakes: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        program = dynamo_program(
            decoder_module(model), fakes, ["logits"], decoder_axes(inputs, target), target
        )
    point_to_file(program.model, folder / DATA)
    onnx_ir.save(program.model, folder / "model.onnx")


def point_to_file(model: onnx_ir.Model, file: Path) -> None:
    """Give every initializer a place in a sparse `file`."""
    import onnx_ir

    offset = 0
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        value.const_value = onnx_ir.ExternalTensor(
            location=file.name,
            offset=offset,
            length=tensor.nbytes,
            dtype=tensor.dtype,
            shape=tensor.shape,
            name=name,
            base_dir=file.parent,
        )
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    with file.open("wb") as stream:
        stream.truncate(offset)
