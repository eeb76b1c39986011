"""Build model recipes from the command line: `python models/build.py 'glm-*' -o build/models`."""

from __future__ import annotations

import argparse
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import recipes


def select(globs: list[str]) -> list[recipes.Recipe]:
    """The recipes whose name matches one of `globs`; all of them if there is none."""
    every = recipes.recipes()
    for glob in globs:
        if not any(fnmatch(recipe.name, glob) for recipe in every):
            sys.exit(f"no recipe matches {glob!r}; --list shows them all")
    return [r for r in every if not globs or any(fnmatch(r.name, glob) for glob in globs)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the models used in tests and benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME_GLOB", help="recipes to build (default: all)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("build/models"), help="folder to build into"
    )
    parser.add_argument("--list", action="store_true", help="print the recipes and build nothing")
    arguments = parser.parse_args()

    chosen = select(arguments.names)
    if arguments.list:
        for recipe in chosen:
            print(f"{recipe.name:32} {recipe.family:10} {' '.join(sorted(recipe.tags))}")
        return
    for number, recipe in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {recipe.name} ", end="", flush=True)
        start = time.perf_counter()
        folder = recipes.build(recipe.name, arguments.output)
        size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
        print(f"{size:.1f} MB, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
