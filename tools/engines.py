"""Builds an engine from every model of a folder and says which fail, where and why.

    python tools/engines.py [FOLDER] [--only GLOB] [--json FILE]

FOLDER holds one folder with a model.onnx per model (`models/build.py` makes them). Without a GPU this needs
TensorRT-RTX, which parses, checks types and serializes without one.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from onnx_autoglm import UserError
from onnx_autoglm.engine import build


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("folder", type=Path, nargs="?", default=Path("build/models"))
    words.add_argument("--only", default="*", help="names of models")
    words.add_argument("--json", type=Path)
    given = words.parse_args()
    rows = []
    for model in sorted(given.folder.glob("*/model.onnx")):
        if fnmatch.fnmatchcase(model.parent.name, given.only):
            rows.append(attempt(model))
            row = rows[-1]
            result = row["reason"] or f"{row['bytes']:,} bytes"
            print(
                f"{row['name']:36} {row['source_bytes']:>13,} {row['seconds']:6.1f} s  {result}", flush=True
            )
    good = sum(not row["reason"] for row in rows)
    print(f"{good} of {len(rows)} parsed and serialized, {sum(row['seconds'] for row in rows):.0f} s")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


def attempt(model: Path) -> dict[str, Any]:
    """One model: size and time of its engine, or the reason why there is none."""
    started = time.perf_counter()
    row: dict[str, Any] = {
        "name": model.parent.name,
        "source_bytes": sum(file.stat().st_size for file in model.parent.glob("model.onnx*")),
        "bytes": 0,
        "reason": "",
        "notes": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = build(model, Path(folder) / "model.engine")
            assert report.plan is not None
            row.update(bytes=report.plan["bytes"], notes=report.notes, prepared=report.prepared)
        except UserError as error:
            row["reason"] = str(error)
    row["seconds"] = time.perf_counter() - started
    return row


if __name__ == "__main__":
    main()
