"""Converts every model of the zoo to float16 and bfloat16 and runs the results beside their sources.

    python tools/precision.py [NAME_GLOB ...] [--models build/models] [--json build/precision.json]

Every row is one run of `onnx-autoglm convert` as users run it, with the ranges measured on generated inputs. float16 runs
in ONNX Runtime as it is; bfloat16, for which its CPU has hardly any kernels, runs in float32 with every result of an
operator rounded. A row passes if the source runs, the result passes the ONNX checker, loads and runs, its distance from the
source (root mean square) is what rounding explains, and no cast undoes another. The column `weights` is the distance
of the source with only its weights rounded; the limit is eight times that, and at least eight roundings.

`detours` are casts there and back around operators that only move numbers; where an operator has no 16 bits they must be.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_HEADER = (
    f"{'model':36} {'to':5} {'bytes':>8} {'16 bits':>9} {'largest':>8} {'rms':>8} {'weights':>8} {'limit':>8} "
    f"{'casts':>6} {'cancel':>6} {'twice':>6} {'detours':>7}  verdict"
)


def main() -> int:
    arguments = _arguments()
    folders = [
        folder
        for folder in sorted(arguments.models.iterdir())
        if (folder / "model.onnx").is_file()
        and any(fnmatch.fnmatch(folder.name, glob) for glob in arguments.names)
    ]
    rows = []
    print(_HEADER)
    for folder in folders:
        for precision in arguments.precisions:
            row = _row(folder, precision)
            rows.append(row)
            print(_line(row), flush=True)
    for precision in arguments.precisions:
        own = [row for row in rows if row["precision"] == precision]
        print(f"{precision}: {sum(row['passed'] for row in own)} of {len(own)} pass")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["passed"] for row in rows) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="only models that match one of these globs")
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--precisions", nargs="+", default=["fp16", "bf16"], choices=["fp16", "bf16"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def _row(folder: Path, precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        words = ["convert", str(folder / "model.onnx"), "-o", str(out), "--precision", precision]
        command = [sys.executable, "-m", "onnx_autoglm", *words, "--calib", "none", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        row: dict[str, Any] = {"model": folder.name, "precision": precision, "passed": False}
        if done.returncode:
            return {**row, "message": (done.stderr.strip().splitlines() or ["no message"])[-1]}
        report = json.loads((out / "report.json").read_text())
    found, casts = report["difference"], report["conversion"]["casts"]
    complaints = [note for note in report["notes"] if "checker" in note]
    within = found["rms"] <= found["expected"]
    return {
        **row,
        **report,
        "passed": within and not casts["cancelling"] and not casts["repeated"] and not complaints,
        "message": "; ".join([*complaints, *([] if within else ["further than rounding explains"])]),
    }


def _line(row: dict[str, Any]) -> str:
    verdict = "ok" if row["passed"] else f"FAILED {row['message']}"
    start = f"{row['model']:36} {row['precision']:5} "
    if "conversion" not in row:
        return start + verdict
    done, found = row["conversion"], row["difference"]
    casts = done["casts"]
    share = row["result"]["bytes"] / row["source"]["bytes"]
    return (
        f"{start}{share:8.3f} {done['low']:4}/{done['nodes']:4} {found['largest']:8.1e} {found['rms']:8.1e} "
        f"{found['rounding']:8.1e} {found['expected']:8.1e} {casts['all']:6} {casts['cancelling']:6} {casts['repeated']:6} {casts['detours']:7}  "
        f"{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
