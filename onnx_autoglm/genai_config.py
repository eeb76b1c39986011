"""`genai_config.json`, with which onnxruntime-genai runs an exported language model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnx_autoglm import modelfile
from onnx_autoglm.decode_roles import DecodeRoles, decode_roles
from onnx_autoglm.errors import UserError
from onnx_autoglm.generate import CONTEXT
from onnx_autoglm.passes.canonicalize import canonicalize

NAME = "genai_config.json"
# Its name there for a decoder with tokens, mask, positions and one cache per layer; nothing else depends on it.
KIND = "llama"


def write_genai_config(model: Path, ends: frozenset[int], context: int | None = None) -> Path:
    """Writes genai_config.json beside a model.

    Raises:
        UserError: onnxruntime-genai cannot run such a graph, with the reason; the file is there already or cannot be
            written.
    """
    path = model.with_name(NAME)
    data = genai_config(canonicalize(modelfile.open_model(model)), model.name, ends, context or CONTEXT)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(json.dumps(data, indent=2) + "\n")
    except FileExistsError as error:
        raise UserError(f"{path} is there already: move it away") from error
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def genai_config(model: ir.Model, file: str, ends: frozenset[int], context: int) -> dict[str, Any]:
    """The configuration as data. Raises UserError, with the reason, for a graph that it cannot describe."""
    if not ends:
        raise UserError("genai_config.json needs a token that ends a text: pass --eos")
    roles = decode_roles(model)
    if len(roles.inputs.positions) > 1 or len(roles.inputs.masks) != 1 or roles.inputs.lengths:
        raise UserError(
            "onnxruntime-genai takes graphs with one attention mask and at most one position input"
        )
    shapes = {cache.shape for cache in roles.caches}
    if len(shapes) != 1:
        raise UserError(
            "onnxruntime-genai takes graphs with a KV cache of one shape in all layers, this one has "
            f"{len(shapes)}: prune with --uniform"
        )
    (shape,) = shapes
    if len(shape) != 4 or shape[0] != 1 or shape[2] != 0:
        raise UserError("onnxruntime-genai takes caches of shape [batch, heads, length, size] only")
    names = _cache_names(roles)
    positions = {"position_ids": roles.inputs.positions[0]} if roles.inputs.positions else {}
    return {
        "model": {
            "type": KIND,
            "context_length": context,
            "vocab_size": roles.inputs.vocabulary,
            "eos_token_id": sorted(ends),
            "pad_token_id": min(ends),
            "decoder": {
                "filename": file,
                "head_size": shape[3],
                "num_key_value_heads": shape[1],
                "num_hidden_layers": len(roles.caches) // 2,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": roles.inputs.tokens,
                    "attention_mask": roles.inputs.masks[0],
                    **positions,
                    "past_key_names": names[0],
                    "past_value_names": names[1],
                },
                "outputs": {
                    "logits": roles.scores,
                    "present_key_names": names[2],
                    "present_value_names": names[3],
                },
            },
        },
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False},
    }


def _cache_names(roles: DecodeRoles) -> tuple[str, ...]:
    """Names with %d for the layer: of past keys and values, and of present ones.

    onnxruntime-genai pairs them by these names, so a key is what comes first in each layer.
    """
    keys, values = roles.caches[::2], roles.caches[1::2]
    found = tuple(
        _pattern([getattr(cache, end) for cache in side])
        for end in ("input", "output")
        for side in (keys, values)
    )
    if len(keys) != len(values) or len(set(found)) != 4:
        raise UserError("onnxruntime-genai takes graphs with a key and a value cache in each layer")
    return found


def _pattern(names: Sequence[str]) -> str:
    """What all names are with the index of their place in it."""
    for found in re.finditer(r"0", names[0]):
        pattern = (
            names[0][: found.start()].replace("%", "%%") + "%d" + names[0][found.end() :].replace("%", "%%")
        )
        if [pattern % index for index in range(len(names))] == list(names):
            return pattern
    raise UserError(f"the caches {names[0]!r}, ... are not numbered from 0, as onnxruntime-genai wants them")
