"""How to build an engine elsewhere, or again: a command line, the equivalent trtexec line, a script with both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from onnx_autoglm.engine_backend import EXTRAS
from onnx_autoglm.engine_options import EngineOptions, command_line
from onnx_autoglm.engine_profiles import Profile

TOOLS = {"tensorrt": "trtexec", "rtx": "tensorrt_rtx"}
_LEVELS = {"ampere-plus": "ampere+", "same-compute-capability": "sameComputeCapability"}


def build_command(model: str, engine: str, options: EngineOptions) -> str:
    """The `onnx-autoglm build` that these options stand for."""
    return shlex.join(["onnx-autoglm", "build", model, "-o", engine, *command_line(options)])


def trtexec_line(
    model: str, engine: str, options: EngineOptions, profiles: Sequence[Profile], backend: str
) -> str:
    """The same build, of the same graph, with the command-line tool of the backend (which has one syntax for both).

    Types are those of the graph, so no flag names a precision. Without the preparation of the graph.
    """
    words = [TOOLS[backend], f"--onnx={model}", f"--saveEngine={engine}"]
    for index, profile in enumerate(profiles):
        if len(profiles) > 1:
            words.append(f"--profile={index}")
        for corner, name in enumerate(("minShapes", "optShapes", "maxShapes")):
            words.append(f"--{name}=" + ",".join(_shape(key, s[corner]) for key, s in profile.shapes.items()))
    if options.workspace is not None:
        words.append(f"--memPoolSize=workspace:{options.workspace >> 20}M")
    if options.timing_cache is not None:
        words.append(f"--timingCacheFile={options.timing_cache}")
    if options.optimization_level is not None:
        words.append(f"--builderOptimizationLevel={options.optimization_level}")
    if options.hardware_compatible != "none":
        words.append(f"--hardwareCompatibilityLevel={_LEVELS[options.hardware_compatible]}")
    if options.compute_capability:
        words.append(f"--computeCapabilities={','.join(options.compute_capability)}")
    flags = {
        "--refit": options.refit,
        "--stripWeights": options.strip_plan,
        "--allowWeightStreaming": options.weight_streaming,
        "--versionCompatible": options.version_compatible,
    }
    words += [flag for flag, wanted in flags.items() if wanted]
    return shlex.join([*words, "--skipInference"])


def _shape(name: str, sizes: Sequence[int]) -> str:
    quoted = f"'{name}'" if set(name) & set(":,") else name
    return f"{quoted}:{'x'.join(map(str, sizes)) or 'scalar'}"


def build_script(command: str, trtexec: str, backend: str) -> str:
    """A shell script for the machine that will run the engine; it stands beside the model."""
    tool = TOOLS[backend]
    return f"""#!/bin/sh
# Builds model.engine from the model.onnx beside this script. Run it on the machine that will run the engine.
# With onnx-autoglm the graph is made ready first, and engine.json is written; {tool} alone builds it as it is.
set -eu
cd "$(dirname "$0")"
if command -v onnx-autoglm >/dev/null 2>&1; then
    exec {command}
elif command -v {tool} >/dev/null 2>&1; then
    exec {trtexec}
fi
echo "neither onnx-autoglm nor {tool} is installed: {EXTRAS[backend].replace(chr(39), "")}" >&2
exit 1
"""
