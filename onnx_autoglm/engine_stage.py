"""The engine stage of `optimize`: an engine beside the model, or all that it takes to build one elsewhere."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from onnx_autoglm import modelfile
from onnx_autoglm.engine import build_into, describe
from onnx_autoglm.engine_backend import device, find_backend, refuse_unavailable
from onnx_autoglm.engine_choice import EngineChoice
from onnx_autoglm.engine_options import engine_options, parse_settings
from onnx_autoglm.engine_recipe import build_script
from onnx_autoglm.engine_report import NAME, EngineReport
from onnx_autoglm.errors import UserError

ENGINE, SCRIPT = "model.engine", "build_engine.sh"


def add_engine(folder: Path, choice: EngineChoice, progress: Callable[[str], None]) -> list[str]:
    """Builds `model.engine` from the `model.onnx` in a folder, if the choice asks for one.

    Where that cannot be done here (no backend, no GPU for an option that needs one, a node that the backend does not
    know), `engine.json` says why and `build_engine.sh` builds it on another machine. Never raises for such a reason.

    Returns the lines that the user should see.
    """
    if choice.build == "none":
        return []
    model = folder / "model.onnx"
    chosen = engine_options({**parse_settings(choice.options), "backend": choice.build})
    # Where nothing is installed the recipe is for what a GPU machine is likely to have.
    target: str = "tensorrt" if choice.build == "auto" else choice.build
    try:
        backend, gpu = find_backend(chosen.backend), device()
        target = backend.name
        refuse_unavailable(backend, chosen, gpu)
        opened = modelfile.open_model(model)
        return build_into(folder, ENGINE, model, opened, chosen, backend, gpu, progress).lines()
    except UserError as error:
        reason = str(error)
    shutil.rmtree(folder / "graph", ignore_errors=True)
    for name in (ENGINE, f"{ENGINE}.log"):
        with contextlib.suppress(FileNotFoundError):
            (folder / name).unlink()
    try:
        report = describe(ENGINE, model, chosen, target, reason, progress)
    except UserError as error:  # the sizes that it should take are not known: there is nothing to repeat
        return [f"no engine and no recipe: {error}"]
    _write_recipe(folder, report)
    return [f"no engine was built ({reason}); {SCRIPT} tries it again, here or on another machine"]


def _write_recipe(folder: Path, report: EngineReport) -> None:
    report.write(folder / NAME)
    script = folder / SCRIPT
    script.write_text(build_script(report.command, report.trtexec, report.backend["name"]))
    script.chmod(0o755)
