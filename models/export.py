"""Torch to ONNX, shared by all recipes that start from a torch module.

Recipes describe a graph by plain data: named sample inputs, output names and which axes are
dynamic. This module turns that into one exporter call, for both of torch's exporters.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Axes = dict[str, dict[int, str]]

PAST = "past_key_values."
SEQUENCE, PAST_LENGTH = 5, 3  # of sample inputs: distinct from every head count and head size in use


@dataclass(frozen=True)
class Target:
    """How to export, apart from what to export."""

    opset: int = 20
    cache: bool = False
    dynamic: bool = True
    legacy: bool = False  # the TorchScript exporter, which most files in the wild come from
    optimize: bool = True  # constant folding and clean-up by the exporter
    batch: int = 2  # of the sample
    external: bool = False  # weights in model.onnx.data

    @property
    def suffix(self) -> str:
        """The part of a recipe's name that this target stands for."""
        words = {
            "kv": self.cache,
            "static": not self.dynamic,
            "legacy": self.legacy,
            "raw": not self.optimize,
        }
        return "-".join([f"op{self.opset}", *(word for word, on in words.items() if on)])


def save_sample(folder: Path, feed: dict[str, Any]) -> None:
    """Write `sample.npz`: one valid feed of arrays, keyed by the names of the graph's inputs."""
    import numpy

    numpy.savez(folder / "sample.npz", **feed)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and log lines of torch and transformers off the terminal."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def noise(module: torch.nn.Module, seed: int = 0) -> None:
    """Give every parameter its own random values, so that no two slices are equal by accident.

    Matrices keep the variance of what flows through them, norms stay near one and biases small:
    activations remain of order one, and an error of the size of rounding stays one.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, torch.nn.Embedding)
    }
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters())
    tensors |= {n: b for n, b in module.named_buffers() if n.endswith("correction_bias")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            fresh = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                fresh = 0.1 * fresh + (0.0 if name.endswith("bias") else 1.0)
            elif name not in embeddings:
                fan_in = tensor.shape[-1] if tensor.ndim < 4 else tensor[0].numel()
                fresh = fresh / fan_in**0.5
            tensor.copy_(fresh)


def token_inputs(vocabulary: int, target: Target) -> dict[str, torch.Tensor]:
    """Sample token inputs of a decoder: ids, a mask with one padded token, positions if cached."""
    import torch

    past = PAST_LENGTH if target.cache else 0
    shape = (target.batch, SEQUENCE)
    mask = torch.ones(target.batch, past + SEQUENCE, dtype=torch.int64)
    if target.batch > 1:
        mask[-1, -1] = 0
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": mask}
    if target.cache:
        inputs["position_ids"] = torch.arange(past, past + SEQUENCE).expand(shape).contiguous()
    return inputs


def cache_inputs(layers: int, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Sample KV cache, flat: `past_key_values.{layer}.key` and `.value`, each of `shape`."""
    import torch

    generator = torch.Generator().manual_seed(2)
    return {
        f"{PAST}{layer}.{part}": torch.randn(shape, generator=generator).to(dtype)
        for layer in range(layers)
        for part in ("key", "value")
    }


def export_decoder(model: Any, folder: Path, target: Target) -> None:
    """Export a transformers causal language model, with a flat KV cache if the target wants one."""
    config = model.config
    inputs = token_inputs(config.vocab_size, target)
    outputs = ["logits"]
    if target.cache:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (target.batch, kv_heads, PAST_LENGTH, head)
        past = cache_inputs(config.num_hidden_layers, shape, next(model.parameters()).dtype)
        inputs |= past
        outputs += [name.replace(PAST, "present.") for name in past]

    export(decoder_module(model), folder, inputs, outputs, decoder_axes(inputs, target), target)


def decoder_module(model: Any) -> torch.nn.Module:
    """`model` as a module that takes tensors by position and returns tensors, the cache laid flat."""
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = model

        def forward(self, input_ids, attention_mask, position_ids=None, *past):  # type: ignore[no-untyped-def]
            pairs = [(past[i], past[i + 1]) for i in range(0, len(past), 2)]
            cache: Any = DynamicCache(pairs) if pairs else None
            result = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=bool(pairs),
            )
            if cache is None:
                return result.logits
            return (
                result.logits,
                *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)),
            )

    return Decoder().eval()


def decoder_axes(inputs: dict[str, torch.Tensor], target: Target) -> Axes:
    """The dynamic axes of a decoder's inputs: batch, sequence, past and past + sequence."""
    if not target.dynamic:
        return {}
    total = "total" if target.cache else "sequence"
    axes: Axes = {name: {0: "batch", 1: "sequence"} for name in inputs}
    axes["attention_mask"] = {0: "batch", 1: total}
    return axes | {name: {0: "batch", 2: "past"} for name in inputs if name.startswith(PAST)}


def export(
    module: torch.nn.Module,
    folder: Path,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    axes: Axes,
    target: Target,
) -> None:
    """Write `model.onnx` and `sample.npz`. The inputs are passed by position, in their order."""
    import torch

    module.eval()
    with quiet(), torch.no_grad():
        if target.legacy:
            legacy_file(module, folder / "model.onnx", inputs, outputs, axes, target)
        else:
            program = dynamo_program(module, inputs, outputs, axes, target)
            program.save(folder / "model.onnx", external_data=target.external)
    save_sample(folder, {name: tensor.numpy() for name, tensor in inputs.items()})


def dynamo_program(
    module: torch.nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str], axes: Axes, target: Target
) -> torch.onnx.ONNXProgram:
    """What the current exporter makes of `module`."""
    import torch

    plain: list[Any] = [axes.get(name) for name in inputs if not name.startswith(PAST)]
    past = tuple(axes.get(name) for name in inputs if name.startswith(PAST))
    program = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=target.opset,
        dynamic_shapes=(*plain, past) if past else tuple(plain),
        input_names=list(inputs),
        output_names=outputs,
        optimize=target.optimize,
        verbose=False,
    )
    assert program is not None
    return program


def legacy_file(
    module: torch.nn.Module,
    file: Path,
    inputs: dict[str, torch.Tensor],
    outputs: list[str],
    axes: Axes,
    target: Target,
) -> None:
    """Write what the TorchScript exporter makes of `module`."""
    from unittest import mock

    import torch

    repeat = torch.Tensor.repeat_interleave

    def repeat_interleave(self: torch.Tensor, repeats: int, dim: int) -> torch.Tensor:
        """The legacy exporter counts a negative `dim` of this op from the wrong end."""
        return repeat(self, repeats, dim=dim % self.ndim)

    present = {name: {0: "batch", 2: "total"} for name in outputs if name.startswith("present.")}
    with mock.patch.object(torch.Tensor, "repeat_interleave", repeat_interleave):
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            dynamo=False,
            opset_version=target.opset,
            dynamic_axes={**axes, "logits": {0: "batch", 1: "sequence"}, **present} if axes else None,
            input_names=list(inputs),
            output_names=outputs,
        )
