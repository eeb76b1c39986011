"""The two older GLM layouts, which no framework carries any more, written after their papers.

`Chat2` has the layout of ChatGLM2 and ChatGLM3, `Chat1` that of GLM-130B and ChatGLM-6B. They
matter because they join in one matrix what later models keep apart, each in its own order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import PAST_LENGTH, SEQUENCE, Target
from recipes import Recipe

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Size:
    """Dimensions of a small model; no two axes that meet have the same size by accident."""

    layers: int = 2
    hidden: int = 128
    heads: int = 8
    groups: int = 2  # key and value heads, multi-query; Chat1 has as many as heads
    head: int = 16
    inner: int = 344
    vocabulary: int = 256


def recipes() -> list[Recipe]:
    op18, op20, op23 = Target(opset=18), Target(opset=20), Target(opset=23)
    legacy = Target(opset=17, legacy=True)
    cached = [replace(op18, cache=True), replace(op20, cache=True), replace(op23, cache=True)]
    return [
        *(_recipe("chatglm2", target) for target in (op20, op18, op23, legacy, *cached)),
        *(_recipe("chatglm1", target) for target in (op20, op18, op23)),
    ]


def _recipe(layout: str, target: Target) -> Recipe:
    tags = frozenset({"small", "float32"})
    return Recipe(f"{layout}-{target.suffix}", "chatglm", partial(build, layout, target), tags)


def build(layout: str, target: Target, folder: Path) -> None:
    import torch
    from chatglm_modules import Chat1, Chat2
    from export import cache_inputs, decoder_axes, export, noise, token_inputs

    size = Size()
    outputs = ["logits"]
    if layout == "chatglm2":
        model: Any = Chat2(size)
        inputs = token_inputs(size.vocabulary, target)
        if target.cache:
            shape = (target.batch, size.groups, PAST_LENGTH, size.head)
            past = cache_inputs(size.layers, shape, torch.float32)
            inputs |= past
            outputs += [name.replace("past_key_values.", "present.") for name in past]
    else:
        model = Chat1(size)
        ids = token_inputs(size.vocabulary, target)["input_ids"]
        inputs = {"input_ids": ids, **positions(target.batch)}
    noise(model)
    export(model, folder, inputs, outputs, decoder_axes(inputs, target), target)


def positions(batch: int) -> dict[str, torch.Tensor]:
    """The two position channels of Chat1: the place in the text, and the place in the blank.

    Up to the blank the first one counts and the second is zero; in the blank it is the reverse.
    """
    import torch

    steps = torch.arange(SEQUENCE).expand(batch, SEQUENCE)
    blank = torch.tensor(SEQUENCE - 2)
    return {
        "position_ids": torch.minimum(steps, blank),
        "block_position_ids": (steps - blank).clamp(min=0),
    }
