"""Prunes every model of the zoo, proves it, and puts onnxsim's pruner beside it.

    python tools/zoo.py [NAME_GLOB ...] [--models build/models] [--json build/zoo.json] [--kinds]

Half of the heads and half of the FFN, expert and convolution channels are removed from every model, through the
command line that users run. A row passes if the result loads in ONNX Runtime, passes the ONNX checker with
strict shape inference and equals the masked source. Then onnxsim 0.8.1 prunes the same file (channels and
heads at 0.5), and the parameters that both removed stand side by side.

`--kinds` also prunes each kind of structure by itself wherever a model has it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

HALF = ("query-head", "ffn-channel", "expert-channel", "conv-channel")
TOLERANCE = 1e-4


def main() -> int:
    arguments = _arguments()
    wanted = _built(arguments)
    rows = []
    header = f"{'model':36} {'params':>12} {'removed':>8} {'onnxsim':>8} {'worst':>8}  verdict"
    print(header)
    for folder in wanted:
        row = _row(folder / "model.onnx", kinds=arguments.kinds, peer=not arguments.no_peer)
        rows.append(row)
        print(_line(row), flush=True)
    passed = sum(row["passed"] for row in rows)
    ahead = sum(row["removed"] > row["onnxsim"] for row in rows if row["onnxsim"] is not None)
    compared = sum(row["onnxsim"] is not None for row in rows)
    print(f"\n{passed} of {len(rows)} pruned, loaded, checked and equal within {TOLERANCE:.0e}")
    print(f"more parameters removed than onnxsim: {ahead} of {compared}")
    if arguments.kinds:
        _print_kinds(rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if passed == len(rows) else 1


def _built(arguments: argparse.Namespace) -> list[Path]:
    """The folders of all recipes that match, built where they are missing."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
    import recipes

    names = [
        recipe.name
        for recipe in recipes.recipes()
        if "timing" not in recipe.tags and any(fnmatch.fnmatch(recipe.name, glob) for glob in arguments.names)
    ]
    if not names:
        sys.exit(f"no recipe matches {' '.join(arguments.names)}")
    folders = []
    for name in names:
        if not (arguments.models / name).exists():
            print(f"building {name}", flush=True)
        folders.append(recipes.build(name, arguments.models))
    return folders


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["*"], help="only models that match one of these globs")
    parser.add_argument("--models", type=Path, default=Path("build/models"))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--kinds", action="store_true", help="also prune every kind by itself")
    parser.add_argument("--no-peer", action="store_true", help="leave onnxsim out")
    return parser.parse_args()


def _row(model: Path, *, kinds: bool, peer: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        "model": model.parent.name,
        "passed": False,
        "removed": 0.0,
        "onnxsim": None,
        "compared": peer,
    }
    found = json.loads(_run("inspect", str(model), "--json").stdout)
    row["parameters"] = found["source"]["parameters"]
    entries = found["structures"]
    free = {e["kind"] for e in entries if not e["pins"] and (e["kind"] != "block" or e["size"] > 1)}
    row |= _prune(model, {kind: 0.5 for kind in HALF if kind in free})
    if kinds:
        row["kinds"] = {kind: _prune(model, {kind: 0.5}) for kind in sorted(free)}
    if peer:
        row["onnxsim"] = _onnxsim(model)
    return row


def _prune(model: Path, fractions: dict[str, float]) -> dict[str, Any]:
    """One run of the command line; what it removed and how equal the result is."""
    prune = ",".join(f"{kind}={fraction}" for kind, fraction in fractions.items())
    criterion = "random" if "block" in fractions else "l2"  # blocks are compared on data otherwise
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        words = [
            "--prune",
            prune,
            "--criterion",
            criterion,
            "--repair",
            "none",
            "--tolerance",
            str(TOLERANCE),
        ]
        done = _run("optimize", str(model), "-o", str(out), *words)
        if done.returncode:
            return {"passed": False, "message": done.stderr.strip(), "removed": 0.0}
        report = json.loads((out / "report.json").read_text())
        loads = _loads(out / "model.onnx", model)
    before, after = report["source"]["parameters"], report["result"]["parameters"]
    return {
        "passed": not loads and not _complaints(report),
        "message": "; ".join(
            [loads, *(n for n in report["notes"] if "kernels" in n), *_complaints(report)]
        ).strip("; "),
        "removed": 1 - after / before,
        "flops": report["result"]["flops"] / max(report["source"]["flops"], 1),
        "difference": report["check"]["relative_difference"],
    }


def _complaints(report: dict[str, Any]) -> list[str]:
    return [note for note in report["notes"] if "checker" in note]


def _loads(result: Path, source: Path) -> str:
    """'' if ONNX Runtime loads the result, or lacks CPU kernels for the source as well; else its complaint."""
    import onnxruntime

    def attempt(path: Path) -> str:
        try:
            onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # noqa: BLE001 - any failure to load is the answer
            return str(error).splitlines()[0][:200]
        return ""

    problem = attempt(result)
    return "" if "NOT_IMPLEMENTED" in problem and "NOT_IMPLEMENTED" in attempt(source) else problem


def _onnxsim(model: Path) -> float | None:
    """The share of parameters that onnxsim removes, in a process of its own; None if it fails."""
    code = (
        "import sys, onnx, onnxsim\n"
        "def count(model): return sum(__import__('math').prod(t.dims) for t in model.graph.initializer)\n"
        "model = onnx.load(sys.argv[1])\n"
        "simple, _ = onnxsim.simplify(model)\n"
        "before = count(simple)\n"
        "after = onnxsim.apply_structured_pruning(simple, 0.5)\n"
        "after = after[0] if isinstance(after, tuple) else after\n"
        "after = onnxsim.apply_attention_head_pruning(after, 0.5)\n"
        "after = after[0] if isinstance(after, tuple) else after\n"
        "print('share', 1 - count(after) / before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False, timeout=1200
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("share ")]
    return float(lines[-1].split()[1]) if lines else None


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onnx_autoglm", *words], capture_output=True, text=True, check=False
    )


def _line(row: dict[str, Any]) -> str:
    missing = "failed" if row["compared"] else "-"
    peer = missing if row["onnxsim"] is None else f"{100 * row['onnxsim']:.1f} %"
    worst = f"{row['difference']:.1e}" if "difference" in row else "-"
    verdict = "ok" if row["passed"] else "FAILED"
    message = f"  ({row['message']})" if row.get("message") else ""
    share = f"{100 * row['removed']:.1f} %"
    return f"{row['model']:36} {row['parameters']:12,} {share:>8} {peer:>8} {worst:>8}  {verdict}{message}"


def _print_kinds(rows: list[dict[str, Any]]) -> None:
    results: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        for kind, result in row.get("kinds", {}).items():
            results[kind].append((row["model"], result))
    print(f"\n{'kind':16} {'models':>6} {'equal':>6} {'worst':>8}")
    for kind, entries in sorted(results.items()):
        equal = [result for _, result in entries if result["passed"]]
        worst = max((result["difference"] for result in equal), default=0.0)
        print(f"{kind:16} {len(entries):6} {len(equal):6} {worst:8.1e}")
        for model, result in entries:
            if not result["passed"]:
                print(f"    {model}: {result['message'].splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
