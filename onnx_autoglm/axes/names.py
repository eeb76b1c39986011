"""Names of structures, for people only: no decision depends on one.

A name is the longest scope that all places of a structure share, taken from dotted initializer names, from
the exporter's name scopes, or from slashed node names.
"""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from onnx_autoglm.axes.places import Place


def name_structures(entries: list[tuple[str, list[Place]]]) -> list[tuple[str, str]]:
    """A layer and a unique name per (kind, places)."""
    scopes = [_common_scope(places) for _, places in entries]
    prefix = _shared_prefix(scopes)
    short = [".".join(scope[prefix:] or scope[-1:]) for scope in scopes]
    counts = Counter((name, kind) for name, (kind, _) in zip(short, entries, strict=True))
    taken = Counter(short)
    seen: Counter[tuple[str, str]] = Counter()
    names = []
    for name, (kind, _) in zip(short, entries, strict=True):
        unique = name if name and taken[name] == 1 else f"{name}:{kind}" if name else kind
        seen[name, kind] += 1
        if counts[name, kind] > 1:
            unique = f"{unique}.{seen[name, kind]}"
        names.append((name or kind, unique))
    return names


def _common_scope(places: list[Place]) -> list[str]:
    found = [_scope(place) for place in sorted(places, key=_is_vector)]
    known = [scope for scope in found if scope]
    if not known:
        return []
    common = known[0]
    for scope in known[1:]:
        length = next((i for i, (a, b) in enumerate(zip(common, scope, strict=False)) if a != b), None)
        common = common[: min(len(common), len(scope)) if length is None else length]
    return common or known[0]


def _is_vector(place: Place) -> bool:
    return len(place.use.dims) < 2


def _scope(place: Place) -> list[str]:
    name = place.use.value.name or ""
    if "." in name:
        return name.split(".")[:-1]
    for node, _ in place.use.consumers:
        scope = node_scope(node)
        if scope:
            return scope
    return [name] if name else []


def node_scope(node: ir.Node) -> list[str]:
    """The module path of a node: from exporter metadata, or from a slashed node name."""
    listed = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if listed:
        try:
            scopes = [scope for scope in ast.literal_eval(listed) if scope]
        except (SyntaxError, ValueError):
            scopes = []
        modules = [scope for scope in scopes[:-1] if scope]
        if modules:
            return str(modules[-1]).split(".")
    if node.name and "/" in node.name:
        return [part for part in node.name.split("/")[:-1] if part]
    return []


def _shared_prefix(scopes: list[list[str]]) -> int:
    """How many leading parts the deeper half of the scopes share; those say nothing."""
    depths = sorted(len(scope) for scope in scopes)
    deep = [scope for scope in scopes if len(scope) >= max(2, depths[len(depths) // 2])] if depths else []
    if len(deep) < 2:
        return 0
    length = 0
    while all(len(scope) > length + 1 and scope[length] == deep[0][length] for scope in deep):
        length += 1
    # `layers.0` reads better than `0`: a number keeps the word before it.
    if 0 < length and any(scope[length].isdigit() for scope in deep):
        length -= 1
    return length
