"""The list of model recipes, and how one of them is built into a folder.

A recipe writes `model.onnx`, a `sample.npz` with one valid feed and, where the model has one,
`tokenizer.json`. Listing recipes is cheap: frameworks are imported when a recipe is built.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """A model that can be made on this machine, without a download."""

    name: str
    family: str
    build: Callable[[Path], None]
    tags: frozenset[str]


def recipes() -> list[Recipe]:
    """Every recipe, cheap ones first within a family."""
    import chatglm
    import glm
    import glm9b
    import light_cnn
    import neighbours
    import smollm

    return [
        *glm.recipes(),
        *chatglm.recipes(),
        *neighbours.recipes(),
        *light_cnn.recipes(),
        *smollm.recipes(),
        *glm9b.recipes(),
    ]


def find(name: str) -> Recipe:
    """The recipe called `name`."""
    for recipe in recipes():
        if recipe.name == name:
            return recipe
    raise KeyError(f"no recipe is called {name!r}; `python models/build.py --list` shows them all")


def build(name: str, root: Path) -> Path:
    """Build recipe `name` into `root/name`, unless it lies there already, and return that folder.

    The files are made in a scratch folder beside it and renamed in one step, so a folder that
    exists is complete, whatever was interrupted.
    """
    folder = root / name
    if folder.exists():
        return folder
    recipe = find(name)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as scratch:
        draft = Path(scratch) / name
        draft.mkdir()
        recipe.build(draft)
        try:
            os.rename(draft, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, and its result is as good
                raise
    return folder
