"""A graph of the size of GLM-4-9B, to time programs that look at structure and not at numbers.

Weights never exist: the model is made and exported with fake tensors, and the initializers point
into a sparse file of the right length, which reads as zeros and takes no disk space.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import Target
from recipes import Recipe

if TYPE_CHECKING:
    import onnx_ir

DATA = "model.onnx.data"
ALIGNMENT = 4096  # of each tensor in the file, as memory mapping likes it


def recipes() -> list[Recipe]:
    target = Target(optimize=False)  # folding would need the weights
    return [Recipe("glm-9b", "glm", partial(build, target), frozenset({"timing", "float16"}))]


def build(target: Target, folder: Path) -> None:
    import onnx_ir
    import torch
    from export import decoder_axes, decoder_module, dynamo_program, quiet, save_sample, token_inputs
    from torch._subclasses import FakeTensorMode
    from transformers import GlmConfig, GlmForCausalLM

    settings: dict[str, Any] = {"attn_implementation": "eager"}
    config = GlmConfig(**settings)
    inputs = token_inputs(config.vocab_size, target)
    save_sample(folder, {name: tensor.numpy() for name, tensor in inputs.items()})
    with quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = GlmForCausalLM._from_config(config, dtype=torch.float16).eval()
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
