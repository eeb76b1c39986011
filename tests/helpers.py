"""Small graphs for tests of the axis engine: written as ONNX text, cut, and proved equal in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from onnx_autoglm.axes.selection import Selection
from onnx_autoglm.axes.structures import Structure, Structures
from onnx_autoglm.cut import Cut, analyse, cut_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.passes.check_masked import Proof, check_masked
from onnx_autoglm.plan import Plan
from onnx_autoglm.tensor_slots import parameters


def model(
    text: str, *, opset: int = 20, seed: int = 0, weights: Mapping[str, np.ndarray] | None = None
) -> ir.Model:
    """A canonical model from ONNX text.

    Names that are declared in `<...>` behind the outputs, with a type but without a value, become initializers:
    from `weights`, or noise. The header may be left out.
    """
    if not text.lstrip().startswith("<"):
        domains = f'"": {opset}, "com.microsoft": 1, "test": 1'
        text = f"<ir_version: 10, opset_import: [{domains}]>\n{text}"
    proto = onnx.parser.parse_model(text)
    made = {name for node in proto.graph.node for name in node.output}
    rng = np.random.default_rng(seed)
    for info in list(proto.graph.value_info):
        if info.name in made:
            continue
        array = (weights or {}).get(info.name)
        if array is None:
            array = _noise(rng, info)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), info.name))
        proto.graph.value_info.remove(info)
    return canonicalize(ir.from_proto(proto))


def _noise(rng: np.random.Generator, info: onnx.ValueInfoProto) -> np.ndarray:
    kind = info.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    assert np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16", f"give {info.name} a value"
    # Away from zero, so that a channel that is lost or kept by mistake shows.
    noise = rng.standard_normal(shape)
    return (noise + 0.3 * np.sign(noise)).astype(dtype)


def structures(source: ir.Model) -> list[Structure]:
    """The structures of a model, which stays as it is."""
    return analyse(source.clone()).found


def the(source: ir.Model, kind: str) -> Structure:
    """The only structure of a kind that can be cut, or the only one that cannot if none can."""
    found = [structure for structure in structures(source) if structure.kind == kind]
    found = [structure for structure in found if not structure.pins] or found
    assert len(found) == 1, f"{len(found)} structures of kind {kind}; free are {summary(source)}"
    return found[0]


def maker(source: ir.Model, name: str, axis: int = 1) -> str:
    """The id of the only structure that can be cut on an axis of an initializer."""
    (found,) = [
        structure.id
        for structure in structures(source)
        if not structure.pins
        and any(place.use.value.name == name and place.axis == axis for place in structure.places)
    ]
    return found


def summary(source: ir.Model) -> list[tuple[str, int]]:
    """Kinds and sizes of all axes that can be cut, in a fixed order."""
    return sorted((s.kind, s.size) for s in structures(source) if not s.pins and s.kind != "block")


def reasons(source: ir.Model) -> str:
    """All reasons for which some axis or structure is left alone, as one text."""
    found = analyse(source.clone())
    stated = [str(pin) for _, pin in found.analysis.pins]
    return "\n".join([*stated, *(str(pin) for structure in found for pin in structure.pins)])


def prune(source: ir.Model, fractions: Mapping[str, float], seed: int = 0) -> Cut:
    """Removes a fraction of the named structures, or of all structures of a kind that are free, at random."""
    rng = np.random.default_rng(seed)

    def choose(found: Structures) -> Selection:
        selection = Selection()
        for name, fraction in fractions.items():
            chosen = [s for s in found if name in (s.id, s.kind) and not s.pins]
            assert chosen, (
                f"nothing to cut for {name!r}; found {[(s.id, s.kind, s.size, s.pins) for s in found]}"
            )
            for structure in chosen:
                outers = tuple(int(atom.size) for atom in structure.outers)  # type: ignore[arg-type]
                count = max(structure.floor, round(structure.size * (1 - fraction)))
                assert count < structure.size, f"{name} is left whole"
                rows = rng.random((*outers, structure.size)).argsort(axis=-1) < count
                selection.keep(structure.atom, structure.outers, rows)
        return selection

    return cut_model(source, choose)


def replayed(plan: Plan) -> Plan:
    """The plan as another program would read it."""
    data = json.loads(json.dumps(plan.as_json()))
    del data["format"], data["version"]
    return Plan(**data)


def prove(
    source: ir.Model, cut: Cut, *, tolerance: float, feeds: dict[str, np.ndarray] | None = None
) -> Proof:
    """Masked source against pruned model, from the plan alone."""
    return check_masked(source.clone(), replayed(cut.plan({})), cut.model, tolerance=tolerance, feeds=feeds)


def assert_equivalent(
    source: ir.Model, cut: Cut, *, tolerance: float, feeds: dict[str, np.ndarray] | None = None
) -> None:
    """The pruned model is smaller, is ordinary ONNX, and computes what the masked source does."""
    assert parameters(cut.model) < parameters(source), "nothing was removed"
    onnx.checker.check_model(ir.to_proto(cut.model), full_check=True)
    proof = prove(source, cut, tolerance=tolerance, feeds=feeds)
    assert proof.holds, proof.difference


def assert_prunes(
    source: ir.Model,
    fractions: Mapping[str, float],
    *,
    tolerance: float = 1e-5,
    feeds: dict[str, np.ndarray] | None = None,
    seeds: int = 2,
) -> Cut:
    """Cuts with several random choices, each proved; returns the last cut."""
    for seed in range(seeds):
        cut = prune(source, fractions, seed)
        assert_equivalent(source, cut, tolerance=tolerance, feeds=feeds)
    return cut


def initializer(cut: ir.Model, name: str) -> np.ndarray:
    value = cut.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def input_of(target: ir.Model, op_type: str, index: int, nth: int = 0) -> np.ndarray:
    """A constant input of the nth node of a type."""
    node = [node for node in target.graph if node.op_type == op_type][nth]
    value = node.inputs[index]
    assert value is not None and value.const_value is not None, f"input {index} of {op_type} is computed"
    return value.const_value.numpy()
