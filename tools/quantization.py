"""Quality, speed, size, memory and time of quantizers, ours and others, on one language model and the same data.

    python models/build.py smollm2-glm -o build/models
    python tools/quantization.py build/models/smollm2-glm/model.onnx [--methods w8a8 w8 w4 ort-static ...]

Calibration is `models/texts/calibration.txt`, evaluation the two other texts there. Every quantizer runs in a process of
its own, whose largest resident and anonymous memory is noted. Speeds are those of ONNX Runtime on this machine, all
models in turns, the least of several runs, as ratios to the source: a prompt of 128 tokens, and one token (without a
cache, unless the model has one).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from onnx_autoglm.data import load_dataset
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.latency_table import workload
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize

TEXTS = Path(__file__).parents[1] / "models" / "texts"
OURS = {"w8a8": "w8a8", "auto": "auto", "w8": "w8", "w4": "w4"}
PEERS = ("ort-static", "ort-static-percentile", "ort-dynamic", "onnxsim-static")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--calib-tokens", type=int, default=16384)
    parser.add_argument("--tokens", type=int, default=8192, help="of each evaluation text")
    parser.add_argument("--scratch", type=Path, default=Path("build/quantization"))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments)
        return
    results: dict[str, tuple[Path, float, int, int]] = {"source": (arguments.model, 0.0, 0, 0)}
    for method in arguments.methods:
        try:
            results[method] = _in_a_process(method, arguments)
        except RuntimeError as error:
            print(f"{method:24} failed: {error}", flush=True)
    _print(results, arguments)


def run_one(method: str, arguments: argparse.Namespace) -> None:
    """Writes the model that one method makes to its place below the scratch folder."""
    target = _target(method, arguments)
    target.parent.mkdir(parents=True, exist_ok=True)
    if method in OURS:
        import onnx_autoglm

        onnx_autoglm.quantize(
            arguments.model,
            target.parent,
            quantize=OURS[method],
            target="cpu",
            calib=TEXTS / "calibration.txt",
            calib_tokens=arguments.calib_tokens,
        )
        return
    if method == "ort-dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            arguments.model,
            target,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        return
    feeds = _feeds(arguments)
    if method == "onnxsim-static":
        import onnx
        import onnxsim

        onnx.save(
            onnxsim.quantize_static(str(arguments.model), calibration_data=feeds),
            target,
            save_as_external_data=True,
        )
        return
    _ort_static(method, arguments.model, target, feeds)


def _ort_static(method: str, model: Path, target: Path, feeds: list[dict[str, np.ndarray]]) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(feeds)

        def get_next(self) -> Any:
            return next(self._rows, None)

    # Products of two activations have no weight; they are left out by name, since no option of the library does it.
    graph = canonicalize(open_model(model)).graph
    activations = [
        node.name or ""
        for node in graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and not _is_weight(node.inputs[1])
    ]
    is_minmax = method == "ort-static"
    quantize_static(
        model,
        target,
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"],
        nodes_to_exclude=activations,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        calibrate_method=CalibrationMethod.MinMax if is_minmax else CalibrationMethod.Percentile,
        use_external_data_format=True,
    )


def _is_weight(value: Any) -> bool:
    producer = value.producer()
    while producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
        producer = value.producer()
    return bool(value.is_initializer())


def _feeds(arguments: argparse.Namespace) -> list[dict[str, np.ndarray]]:
    model = canonicalize(open_model(arguments.model))
    tokenizer = arguments.model.with_name("tokenizer.json")
    data = load_dataset(TEXTS / "calibration.txt", model, tokenizer=tokenizer, limit=arguments.calib_tokens)
    names = {value.name for value in model.graph.inputs}
    return [{name: array for name, array in feed.items() if name in names} for feed in data.feeds]


def _target(method: str, arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.scratch / method
    return folder / "model.cpu.onnx"


def _in_a_process(method: str, arguments: argparse.Namespace) -> tuple[Path, float, int, int]:
    """The file, and the seconds and the largest resident and anonymous bytes that making it took."""
    words = [sys.executable, __file__, str(arguments.model), "--one", method]
    words += ["--calib-tokens", str(arguments.calib_tokens), "--scratch", str(arguments.scratch)]
    started, resident, anonymous = time.perf_counter(), 0, 0
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            sizes = _memory(process.pid)
            resident, anonymous = max(resident, sizes[0]), max(anonymous, sizes[1])
            time.sleep(0.05)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(errors.strip().splitlines()[-1][:200] if errors.strip() else "no message")
    seconds = time.perf_counter() - started
    print(
        f"{method:24} {seconds:6.0f} s, {resident / 1e6:6.0f} MB resident, {anonymous / 1e6:6.0f} MB anonymous",
        flush=True,
    )
    return _target(method, arguments), seconds, resident, anonymous


def _memory(pid: int) -> tuple[int, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    return sizes.get("VmRSS", 0), sizes.get("RssAnon", 0)


def _print(results: dict[str, tuple[Path, float, int, int]], arguments: argparse.Namespace) -> None:
    source = canonicalize(open_model(arguments.model))
    quality = {name: _perplexities(path, arguments) for name, (path, *_) in results.items()}
    speeds = _speeds({name: path for name, (path, *_) in results.items()}, source, arguments.runs)
    whole = _bytes(arguments.model)
    print(
        f"\n{'':24} {'speech':>8} {'novel':>8} {'size':>6} {'prefill':>8} {'token':>7}  (ratios to the source)"
    )
    for name, (path, *_) in results.items():
        ratios = [quality[name][text] / quality["source"][text] for text in ("speech", "novel")]
        prefill, token = (speeds["source"][regime] / speeds[name][regime] for regime in (0, 1))
        print(
            f"{name:24} {ratios[0]:8.3f} {ratios[1]:8.3f} {_bytes(path) / whole:6.3f} {prefill:7.2f}x {token:6.2f}x",
            flush=True,
        )


def _bytes(path: Path) -> int:
    return path.stat().st_size + sum(
        other.stat().st_size for other in path.parent.glob(f"{path.name}*") if other != path
    )


def _perplexities(path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parent))
    from perplexity import perplexity
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.model.with_name("tokenizer.json")))
    found = {}
    for name in ("speech", "novel"):
        ids = tokenizer.encode((TEXTS / f"{name}.txt").read_text()).ids[: arguments.tokens]
        found[name] = perplexity(path, np.array(ids, dtype=np.int64), 512)
    return found


def _speeds(paths: dict[str, Path], source: Any, runs: int) -> dict[str, tuple[float, float]]:
    """Least seconds of a prompt and of one token, all models in turns."""
    sessions = {
        name: onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for name, path in paths.items()
    }
    names = [item.name for item in next(iter(sessions.values())).get_inputs()]
    roles = token_roles(source)
    has_cache = roles is not None and bool(roles.past_symbols)
    feeds = [
        workload(source, 1, 128, "prefill"),
        workload(source, 1, 128 if has_cache else 1, "decode" if has_cache else "prefill"),
    ]
    best = {name: [np.inf, np.inf] for name in sessions}
    for run in range(runs + 1):
        for regime, feed in enumerate(feeds):
            known = {name: array for name, array in feed.items() if name in names}
            for name, session in sessions.items():
                started = time.perf_counter()
                session.run(None, known)
                if run:
                    best[name][regime] = min(best[name][regime], time.perf_counter() - started)
    return {name: (row[0], row[1]) for name, row in best.items()}


if __name__ == "__main__":
    main()
