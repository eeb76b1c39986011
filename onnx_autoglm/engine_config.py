"""The builder configuration: profiles, limits, flags and the timing cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnx_autoglm.engine_backend import Backend
from onnx_autoglm.engine_network import Network
from onnx_autoglm.engine_options import EngineOptions
from onnx_autoglm.engine_profiles import Profile
from onnx_autoglm.errors import UserError

_LEVELS = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}


def builder_config(
    backend: Backend, network: Network, profiles: Sequence[Profile], options: EngineOptions, monitor: Any
) -> Any:
    """Raises UserError if the backend refuses a profile or an option."""
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    trt = backend.trt
    settings: dict[str, Any] = {
        "profiles": [_polygraphy_profile(network, profile, options) for profile in profiles],
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "refittable": options.refit,
        "strip_plan": options.strip_plan,
        "weight_streaming": options.weight_streaming,
        "version_compatible": options.version_compatible,
    }
    if options.workspace is not None:
        settings["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace}
    if options.optimization_level is not None:
        settings["builder_optimization_level"] = options.optimization_level
    if options.hardware_compatible != "none":
        level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[options.hardware_compatible], None)
        if level is None:
            raise UserError(
                f"{backend.described} has no --hardware-compatible {options.hardware_compatible}: use a newer one"
            )
        settings["hardware_compatibility_level"] = level
    # Polygraphy speaks through its own logger; what matters is in the backend's messages and in exceptions.
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it sets a timing cache where there is none, too
        try:
            if backend.name == "rtx":
                from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

                targets = [tuple(map(int, text.split("."))) for text in options.compute_capability]
                create = CreateConfigRTX(compute_capabilities=targets or None, **settings)
            else:
                create = CreateConfig(tf32=True, **settings)
            return create(network.builder, network.network)
        except PolygraphyException as error:
            raise UserError(f"{backend.described} refuses the profiles or options: {error}") from error


def allow_decomposed_attention(backend: Backend, network: Network) -> None:
    """Lets Attention operators without a kernel of their own (such as in float32) be built from products and softmax."""
    if hasattr(backend.trt.LayerType, "ATTENTION_INPUT"):
        from polygraphy.backend.trt import SetDecomposableAttentions

        SetDecomposableAttentions((network.builder, network.network, network.parser))()


def _polygraphy_profile(network: Network, profile: Profile, options: EngineOptions) -> Any:
    from polygraphy.backend.trt import Profile as PolygraphyProfile

    named = options.named_shapes
    made = PolygraphyProfile()
    for index in range(network.network.num_inputs):
        value = network.network.get_input(index)
        sizes: Sequence[Sequence[int]] = profile.shapes[value.name]
        if value.is_shape_tensor:
            if value.name not in named:
                raise UserError(
                    f"input {value.name!r} holds sizes, which the engine has to know: give --shape "
                    f"{value.name}=MIN:OPT:MAX"
                )
            count = int(value.shape[0]) if len(value.shape) else 1
            sizes = [[number] * count for number in named[value.name]]
        made.add(value.name, *(tuple(shape) for shape in sizes))
    return made


def load_timing_cache(config: Any, path: Path) -> list[str]:
    """Gives the configuration the kernel times in the file; notes if they are of another device or version."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"cannot read the timing cache {path}: {error.strerror}") from error
    cache = config.create_timing_cache(data)
    if cache is not None and config.set_timing_cache(cache, False):
        return []
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return [
        f"the timing cache {path} is of another device or version: it was not used, and holds this one's times now"
    ]


def save_timing_cache(config: Any, path: Path) -> None:
    """Writes the times, old and new, whole or not at all."""
    cache = config.get_timing_cache()
    if cache is None:
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(memoryview(cache.serialize()))
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the timing cache {path}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
