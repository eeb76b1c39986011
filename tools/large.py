"""Prunes a large model and reports peak anonymous memory and wall time against copying its files.

    python models/build.py glm-large -o build/timing
    python tools/large.py build/timing/glm-large/model.onnx [--runs 3]

Copying and pruning alternate, each followed by a sync to disk; the ratio is that of the fastest runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("build/large"))
    arguments = parser.parse_args()
    folder = arguments.model.parent
    size = sum(file.stat().st_size for file in folder.iterdir())
    copies, prunes, peaks = [], [], []
    passes = []
    for _ in range(arguments.runs):
        copies.append(_copy(folder, arguments.scratch))
        seconds, peak, passes = _prune(arguments.model, arguments.scratch)
        prunes.append(seconds)
        peaks.append(peak)
        print(f"copy {copies[-1]:.1f} s, optimize {seconds:.1f} s, peak anonymous {peak:.0f} MB", flush=True)
    print(f"\nmodel {size / 1e9:.2f} GB; runs {arguments.runs}")
    print(f"copy {min(copies):.1f} s, optimize {min(prunes):.1f} s: ratio {min(prunes) / min(copies):.2f}")
    print(f"peak anonymous memory {max(peaks):.0f} MB")
    for step in passes:
        print(f"  {step['name']:20} {step['seconds']:8.2f} s")


def _copy(folder: Path, scratch: Path) -> float:
    shutil.rmtree(scratch, ignore_errors=True)
    os.sync()
    started = time.perf_counter()
    shutil.copytree(folder, scratch)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(scratch)
    return seconds


def _prune(model: Path, scratch: Path) -> tuple[float, float, list[dict[str, float]]]:
    """Wall seconds, peak RssAnon in MB and the passes of one run of the command line."""
    os.sync()
    started = time.perf_counter()
    command = [sys.executable, "-m", "onnx_autoglm", "optimize", str(model), "-o", str(scratch), "--quiet"]
    process = subprocess.Popen([*command, "--criterion", "l2", "--repair", "none"])
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(0.01)
    os.sync()
    seconds = time.perf_counter() - started
    if process.returncode:
        sys.exit(f"optimize failed with exit code {process.returncode}")
    report = json.loads((scratch / "report.json").read_text())
    shutil.rmtree(scratch)
    return seconds, peak, report["passes"]


def _anonymous(pid: int) -> float:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


if __name__ == "__main__":
    main()
