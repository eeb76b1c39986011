"""`sweep`: `optimize` at several points, and a table of what each costs and gains."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from onnx_autoglm import modelfile, pipeline
from onnx_autoglm.errors import CheckFailed, UserError
from onnx_autoglm.evidence import Data
from onnx_autoglm.latency import LatencyMeter
from onnx_autoglm.options import DataOptions, Options
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.plan import sha256
from onnx_autoglm.report import FORMAT
from onnx_autoglm.summary import versions
from onnx_autoglm.sweep_points import Point, Values, make_points
from onnx_autoglm.sweep_table import Row, Sweep, add_latency, point_row, source_row, write_tables

Progress = Callable[[str], None]


def sweep(
    model: Path | str,
    output: Path | str,
    *,
    keep: Sequence[float | str] = (),
    vary: Values | None = None,
    config: Path | str | None = None,
    jobs: int = 1,
    latency_runs: int = 10,
    progress: Progress = lambda _: None,
    **given: Any,
) -> Sweep:
    """Runs `optimize` at every combination of some options' values and collects a table.

    Each point lies in a folder of its own below `output` (keep-0.80/), beside sweep.json, sweep.csv and sweep.png. A
    point that is already there (same source, data, options and version) is not run again. Latency is measured
    afterwards, one point after the other.

    Args:
        model: the ONNX file.
        output: the folder to write to.
        keep: values of the option `keep`, the fraction of the parameters that stays.
        vary: values by option, such as `{"prune": [{"ffn-channel": 0.1}, {"ffn-channel": 0.2}]}`.
        config: a YAML configuration file below the single options.
        jobs: points to prune at the same time, in processes of their own.
        latency_runs: timed runs of each model; 0 leaves latency out.
        progress: told which step runs.
        given: options that all points share, named as in `optimize`.

    Raises:
        UserError: something the user can mend; finished points stay. If only some points failed, the table is written
            before this is raised.
        CheckFailed: as `UserError`, where the proof of a point failed.
    """
    source, folder = Path(model), Path(output)
    if len(keep) and "keep" in (vary or {}):
        raise UserError("keep is given both by itself and among the options to vary: give it once")
    wanted = {**({"keep": list(keep)} if len(keep) else {}), **(vary or {})}
    points = make_points(wanted, given, config)
    if jobs < 1 or latency_runs < 0:
        raise UserError(f"--jobs {jobs} and --latency-runs {latency_runs}: the least is 1 job and 0 runs")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another output folder")
    progress("open")
    opened = modelfile.open_model(source)
    for point in points:
        modelfile.check_output_path(opened, folder / point.name / "model.onnx")
    canonicalize(opened)
    # Bad data shows now, not at the last point.
    sets = {point.options.data: Data.load(opened, source, point.options) for point in points}
    known = _Known(source, sets)
    reused = [point.name for point in points if known.has(folder / point.name, point.options)]
    failures = _run(source, folder, [point for point in points if point.name not in reused], jobs, progress)
    reports = {point.name: _report(folder / point.name) for point in points if point.name not in failures}
    if not reports:
        raise _failure(failures, len(points))
    first = next(iter(reports.values()))
    result = Sweep(
        source={"file": source.name, "sha256": known.sha256},
        rows=[source_row(first), *(_row(point, reports, failures) for point in points)],
        data=first["quality"].get("data"),
        reused=reused,
        latency=None,
        versions=versions(),
        notes=[],
    )
    if latency_runs:
        data = sets[points[0].options.data].evaluation
        try:
            meter = LatencyMeter(source, latency_runs, data.feeds[0] if data else None)
            _time(result, folder, meter, progress)
        except UserError as error:  # bfloat16 has no CPU kernels; the rest of the table is right all the same
            result.notes.append(f"latency was not measured: {error}")
    write_tables(result, folder)
    if failures:
        raise _failure(failures, len(points))
    return result


def _row(point: Point, reports: dict[str, dict[str, Any]], failures: dict[str, Exception]) -> Row:
    if point.name in failures:
        return Row(point.name, point.given, error=str(failures[point.name]))
    return point_row(point.name, point.given, reports[point.name])


def _failure(failures: dict[str, Exception], count: int) -> Exception:
    """One error for all points that failed, with the reason of the first."""
    name, first = next(iter(failures.items()))
    kind = CheckFailed if isinstance(first, CheckFailed) else UserError
    return kind(f"{len(failures)} of {count} points have no result; {name}: {first}")


# --- what is there already


class _Known:
    """Tells whether a folder holds the result of a point."""

    def __init__(self, source: Path, sets: dict[DataOptions, Data]) -> None:
        self.sha256 = sha256(source)
        self._version = versions()["onnx-autoglm"]
        files = modelfile.source_files(modelfile.open_model(source))[1:]
        # External weights are not part of the hash: they must be older than the result.
        self._weights_time = max((file.stat().st_mtime for file in files), default=0.0)
        self._hashes = {
            options: [None if one is None else one.sha256 for one in (data.calibration, data.evaluation)]
            for options, data in sets.items()
        }

    def has(self, folder: Path, options: Options) -> bool:
        if not (folder / "report.json").is_file() or not (folder / "model.onnx").is_file():
            return False
        try:
            report = _report(folder)
        except UserError:
            return False
        calibration = (report["repair"].get("calibration") or {}).get("sha256")
        evaluation = (report["quality"].get("data") or {}).get("sha256")
        wanted = options.model_dump(mode="json")
        return (
            report["source"].get("sha256") == self.sha256
            and report["versions"].get("onnx-autoglm") == self._version
            and {key: report["options"].get(key) for key in wanted} == wanted
            and [calibration, evaluation] == self._hashes[options.data]
            and self._weights_time <= (folder / "report.json").stat().st_mtime
        )


def _report(folder: Path) -> dict[str, Any]:
    """The report of a point. Raises UserError if it is none."""
    path = folder / "report.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        if report["format"] == FORMAT and {"source", "result", "quality", "options"} <= report.keys():
            return report
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is no report of optimize: remove {folder} and run the sweep again")


# --- running


def _run(
    source: Path, folder: Path, points: list[Point], jobs: int, progress: Progress
) -> dict[str, Exception]:
    """Runs `optimize` at each point; returns why points have no result."""
    failures: dict[str, Exception] = {}
    if jobs > 1 and len(points) > 1:
        failures.update(_run_parallel(source, folder, points, jobs, progress))
        return failures
    for number, point in enumerate(points, 1):
        step = _Prefixed(progress, f"{point.name} ({number} of {len(points)}): ")
        try:
            pipeline.optimize(source, folder / point.name, point.options, progress=step)
        except (UserError, CheckFailed) as error:
            failures[point.name] = error
    return failures


def _run_parallel(
    source: Path, folder: Path, points: list[Point], jobs: int, progress: Progress
) -> dict[str, Exception]:
    """The same in processes: each is a command `optimize`, ended when this one is interrupted."""
    failures: dict[str, Exception] = {}
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    running: set[subprocess.Popen[str]] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def run(point: Point, config: Path) -> Exception | None:
        config.write_text(json.dumps(point.options.model_dump(mode="json")))  # JSON is YAML
        command = [sys.executable, "-m", "onnx_autoglm", "optimize", str(source), "-q"]
        with lock:
            if stopped.is_set():
                return None
            process = subprocess.Popen(
                [*command, "-o", str(folder / point.name), "--config", str(config)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this program alone, which ends the others in order
            )
            running.add(process)
        _, message = process.communicate()
        with lock:
            running.discard(process)
        return _outcome(process.returncode, message)

    with tempfile.TemporaryDirectory(prefix="onnx-autoglm-") as scratch, ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, point, Path(scratch, f"{point.name}.yaml")): point for point in points}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                progress(f"{number} of {len(points)} points done")
                error = future.result()
                if error is not None:
                    failures[futures[future].name] = error
        except BaseException:
            with lock:
                stopped.set()
                for process in running:
                    process.terminate()
            raise
        finally:
            pool.shutdown()
            # A process cannot remove the folder that it made while another one works in it.
            for path in created:
                with contextlib.suppress(OSError):
                    path.rmdir()
    return failures


def _outcome(code: int, message: str) -> Exception | None:
    if code == 0:
        return None
    line = message.strip().removeprefix("error: ").removeprefix("check failed, nothing written: ")
    if code == 3:
        return CheckFailed(line)
    if code == 1 and "Traceback" not in line:
        return UserError(line)
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    advice = "fewer --jobs need less memory" if code < 0 else "run optimize alone to see why"
    last = f" ({line.splitlines()[-1]})" if line else ""
    return UserError(f"its process {ended}{last}; {advice}")


def _time(result: Sweep, folder: Path, meter: LatencyMeter, progress: Progress) -> None:
    """Adds latencies to the rows, one after the other."""
    times = []
    for row in result.rows[1:]:
        if not row.error:
            progress(f"{row.name}: latency")
            latency = meter.measure(folder / row.name / "model.onnx", _Prefixed(progress, f"{row.name}: "))
            add_latency(row, latency)
            times.append(latency)
    result.rows[0].latency_ms = statistics.median(latency.source_ms for latency in times)
    result.rows[0].speedup = 1.0
    result.latency = {
        "runs": times[0].runs,
        "shapes": times[0].shapes,
        "runtime": "ONNX Runtime, CPU, default threads",
    }


@dataclasses.dataclass(frozen=True)
class _Prefixed:
    """Progress with the name of the point in front."""

    progress: Progress
    prefix: str

    def __call__(self, step: str) -> None:
        self.progress(self.prefix + step)
