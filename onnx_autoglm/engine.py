"""`build`: from a model file to an engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.engine_backend import MODULES, Backend, Device, device, find_backend, refuse_unavailable
from onnx_autoglm.engine_config import (
    allow_decomposed_attention,
    builder_config,
    load_timing_cache,
    save_timing_cache,
)
from onnx_autoglm.engine_fit import refuse_misfit
from onnx_autoglm.engine_log import BuildLog, logger_for, monitor_for
from onnx_autoglm.engine_network import parse, refuse_opset
from onnx_autoglm.engine_options import EngineOptions, engine_options
from onnx_autoglm.engine_prepare import Prepared, prepare
from onnx_autoglm.engine_profiles import Profile, profiles_for
from onnx_autoglm.engine_recipe import build_command, trtexec_line
from onnx_autoglm.engine_report import NAME, EngineReport, read_engine_report, signature
from onnx_autoglm.errors import UserError
from onnx_autoglm.output import publish, staging
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.plan import sha256
from onnx_autoglm.summary import versions

Progress = Callable[[str], None]


def build(
    model: Path | str,
    output: Path | str,
    options: EngineOptions | None = None,
    *,
    progress: Progress = lambda _: None,
    **given: Any,
) -> EngineReport:
    """Builds an engine from a model.

    Writes the engine, `engine.json` beside it, and the build log (`.log` added to the name), all or none.

    Args:
        model: the ONNX file; it is not changed.
        output: the engine file to write.
        options: all options; or give single ones by the names of the command line, such as `batch="1:4:8"`.
        progress: told which step runs.

    Raises:
        UserError: no backend, a graph or profile that it refuses, or a place that cannot be written; nothing was
            written.
    """
    if options is not None and given:
        raise UserError("give either options or single options, not both")
    options = engine_options(given) if options is None else options
    source, target = Path(model), Path(output)
    backend, gpu = find_backend(options.backend), device()
    refuse_unavailable(backend, options, gpu)
    opened = modelfile.open_model(source)
    modelfile.check_output_path(opened, target)
    _refuse_other_engine(target)
    with staging(target.parent) as staged:
        report = build_into(staged, target.name, source, opened, options, backend, gpu, progress)
        publish(staged, target.parent, [target.name, f"{target.name}.log", NAME])
    return report


def build_into(
    folder: Path,
    name: str,
    source: Path,
    opened: ir.Model,
    options: EngineOptions,
    backend: Backend,
    gpu: Device | None,
    progress: Progress,
) -> EngineReport:
    """Writes engine, log and `engine.json` into a folder. `opened` is the model in the file `source`; it is changed.

    Raises UserError as `build`.
    """
    started = time.perf_counter()
    _refuse_too_large(opened, options, backend, gpu)
    plan = _plan_of(opened, options, progress)
    log = BuildLog()
    logger = logger_for(backend.trt, log)
    graph = _graph_file(folder, source, opened, plan.is_changed)
    progress("parse")
    network = parse(backend, logger, log, graph, opened)
    monitor = monitor_for(backend.trt, progress)
    allow_decomposed_attention(backend, network)
    config = builder_config(backend, network, plan.profiles, options, monitor)
    notes = list(plan.notes)
    if options.timing_cache is not None:
        notes += load_timing_cache(config, options.timing_cache)
    progress("build")
    engine = network.builder.build_serialized_network(network.network, config)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if engine is None:
        raise UserError(_failure(backend, log, options))
    (folder / name).write_bytes(memoryview(engine))
    if options.timing_cache is not None:
        save_timing_cache(config, options.timing_cache)
    (folder / f"{name}.log").write_text("\n".join(log.lines) + "\n")
    _remove_graph(folder, graph)
    targets = _targets(backend, config)
    report = _report(plan, source, name, options, backend.name, gpu)
    report.plan = {"file": name, "sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    report.backend["version"] = backend.version
    report.backend["compute_capabilities"] = targets or ([] if gpu is None else [gpu.compute_capability])
    report.seconds = round(time.perf_counter() - started, 2)
    report.notes = notes
    report.write(folder / NAME)
    return report


def describe(
    name: str, source: Path, options: EngineOptions, backend: str, reason: str, progress: Progress
) -> EngineReport:
    """What `build` would do, without an engine: profiles and commands for another machine.

    Raises UserError if the model cannot be read or its sizes cannot be told.
    """
    plan = _plan_of(modelfile.open_model(source), options, progress)
    report = _report(plan, source, name, options, backend, device())
    report.reason = reason
    return report


def _report(
    plan: _Plan, source: Path, name: str, options: EngineOptions, backend: str, gpu: Device | None
) -> EngineReport:
    return EngineReport(
        source={"file": source.name, "sha256": sha256(source)},
        plan=None,
        reason="",
        backend={
            "name": backend,
            "package": MODULES[backend].replace("_", "-"),
            "version": None,
            "compute_capabilities": list(options.compute_capability),
        },
        device=None if gpu is None else dataclasses.asdict(gpu),
        profiles=[profile.as_json() for profile in plan.profiles],
        inputs=plan.inputs,
        outputs=plan.outputs,
        prepared=dataclasses.asdict(plan.prepared),
        options=options.model_dump(mode="json"),
        command=build_command(source.name, name, options),
        trtexec=trtexec_line(source.name, name, options, plan.profiles, backend),
        seconds=0.0,
        versions=versions(),
        notes=plan.notes,
    )


@dataclasses.dataclass
class _Plan:
    """What is known before a backend is asked."""

    profiles: list[Profile]
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    prepared: Prepared
    is_changed: bool
    notes: list[str]


def _plan_of(model: ir.Model, options: EngineOptions, progress: Progress) -> _Plan:
    """Profiles and signature; makes the graph ready, in place.

    Raises UserError: the graph's opset is not read, or its sizes cannot be told.
    """
    progress("prepare")
    refuse_opset(model)
    nodes = model.graph.num_nodes() + len(model.functions)
    canonicalize(model)
    profiles = profiles_for(model, options)
    refuse_misfit(model, profiles)
    inputs = signature([value for value in model.graph.inputs if value.name not in model.graph.initializers])
    outputs = signature(list(model.graph.outputs))
    prepared = Prepared(0, 0, 0, 0, 0, ()) if options.prepare is False else prepare(model)
    notes = [
        f"a NaN guard behind a softmax stays, which may keep attention unfused: {g}"
        for g in prepared.kept_guards
    ]
    if prepared.guards:
        notes.append(
            f"{prepared.guards} NaN guards removed: rows that may attend to nothing (padding) hold other numbers than in "
            "the source, all other rows the same"
        )
    return _Plan(profiles, inputs, outputs, prepared, model.graph.num_nodes() != nodes, notes)


def _graph_file(folder: Path, source: Path, model: ir.Model, is_changed: bool) -> Path:
    """The file to parse: the source itself where nothing was changed, else a copy with its weights beside it."""
    if not is_changed:
        return source
    graph = folder / "graph" / "model.onnx"
    modelfile.save_model(model, graph, external=True)
    return graph


def _remove_graph(folder: Path, graph: Path) -> None:
    if graph.parent.parent == folder:
        for file in graph.parent.iterdir():
            file.unlink()
        graph.parent.rmdir()


def _targets(backend: Backend, config: Any) -> list[str]:
    """The compute capabilities that an engine is built for, as far as the configuration says."""
    if backend.name != "rtx":
        return []
    kinds = [config.get_compute_capability(index).name for index in range(config.num_compute_capabilities)]
    return [f"{kind[2:-1]}.{kind[-1]}" for kind in kinds if kind.startswith("SM")]


def _failure(backend: Backend, log: BuildLog, options: EngineOptions) -> str:
    message = f"{backend.described} cannot build the engine: {log.reason('it gives no reason')}"
    if any("OutOfMemory" in error or "workspace limit" in error for error in log.errors):
        fix = "lower the largest sizes (--batch, --sequence, --past)"
        return f"{message}; {fix}" + (", or raise --workspace" if options.workspace is not None else "")
    return message


def _refuse_too_large(model: ir.Model, options: EngineOptions, backend: Backend, gpu: Device | None) -> None:
    needed = modelfile.weight_bytes(model)
    if gpu is None or backend.name == "rtx" or options.weight_streaming or needed <= gpu.memory:
        return
    raise UserError(
        f"the weights take {needed >> 20:,} MiB and {gpu.name} has {gpu.memory >> 20:,} MiB: use --weight-streaming, or "
        "a larger device"
    )


def _refuse_other_engine(target: Path) -> None:
    """`engine.json` describes one engine of its folder."""
    path = target.parent / NAME
    if not path.exists():
        return
    described = read_engine_report(path).plan
    if (
        described is not None
        and described["file"] != target.name
        and path.with_name(described["file"]).exists()
    ):
        raise UserError(
            f"{path} describes {described['file']}, which is there: write {target.name} into another folder"
        )
