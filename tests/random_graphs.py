"""Random ONNX graphs with valid shapes by construction, for the property test of the axis engine.

`Builder` adds nodes one by one and knows the shape of every value, symbols included; shape inputs are
literals, -1, 0 or computed in the graph, and initializers are shared, all at random. `random_graph` either
strings together the blocks of `random_blocks` or applies random operators to random values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Size = int | str  # a number, or an expression over symbols such as "batch*seq" or "past + seq"
Shape = tuple[Size, ...]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Val:
    """A value of the graph: its name and its shape."""

    name: str
    shape: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)

    def static(self) -> list[int]:
        """The axes of known size greater than 1, the batch left out."""
        return [axis for axis, size in enumerate(self.shape) if axis and isinstance(size, int) and size > 1]


def times(*sizes: Size) -> Size:
    """The product of sizes in a canonical form."""
    number, symbols = 1, []
    for size in sizes:
        if isinstance(size, int):
            number *= size
        else:
            for factor in [size] if "+" in size else size.split("*"):
                if factor.isdigit():
                    number *= int(factor)
                else:
                    symbols.append(factor)
    if not symbols:
        return number
    return "*".join(([str(number)] if number != 1 else []) + sorted(symbols))


def sum_of(a: Size, b: Size) -> Size:
    return a + b if isinstance(a, int) and isinstance(b, int) else f"{a} + {b}"


def last_axis(x: Val) -> tuple[int, ...]:
    """The shape of a vector along the last axis; 1 where that is not known."""
    size = x.shape[-1]
    return (size,) if isinstance(size, int) else (1,)


class Builder:
    """A graph under construction."""

    def __init__(self, seed: int, opset: int | None = None) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset if opset is not None else int(self.rng.integers(11, 24))
        self.batch: Size = "batch" if self.chance(0.6) else 2
        self.seq: Size = "seq" if self.chance(0.6) else self.pick([4, 5])
        self.shares_vectors = self.pick([0.0, 0.3, 0.8])
        self.shares_matrices = self.pick([0.0, 0.0, 0.1])
        self.merges_constants = self.chance(0.5)
        self.shape_style = self.pick(["literal", "computed", "mixed", "mixed"])
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.places: dict[str, tuple[Val, int]] = {}  # symbol -> an input axis that has it
        self.by_shape: dict[tuple[str, tuple[int, ...]], list[Val]] = {}
        self.constants: dict[tuple[str, bytes, tuple[int, ...]], Val] = {}
        self.marks: list[str] = []  # what was built, for people
        self.count = 0

    # --- chance

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def number(self, low: int, high: int) -> int:
        """A number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    # --- values

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}_{self.count}"

    def input(self, shape: Shape, dtype: int = TensorProto.FLOAT) -> Val:
        value = Val(self.name("in"), shape)
        self.inputs.append(helper.make_tensor_value_info(value.name, dtype, shape))
        for axis, size in enumerate(shape):
            if isinstance(size, str):
                self.places.setdefault(size, (value, axis))
        return value

    def output(self, value: Val, dtype: int = TensorProto.FLOAT) -> None:
        """Makes a value a graph output; an axis with a compound size is declared without one."""
        if any(value.name == made.name for made in (*self.outputs, *self.inputs)):
            value = self.node("Identity", [value], value.shape)
        shape = [size if isinstance(size, int) or size in self.places else None for size in value.shape]
        self.outputs.append(helper.make_tensor_value_info(value.name, dtype, shape))

    def weight(self, shape: Sequence[int], scale: float = 1.0, offset: float = 0.0, kind: str = "w") -> Val:
        """A float initializer, at random one that is in use already."""
        key = (kind, tuple(shape))
        known = self.by_shape.setdefault(key, [])
        is_vector = sum(size > 1 for size in shape) <= 1
        if known and self.chance(self.shares_vectors if is_vector else self.shares_matrices):
            return self.pick(known)
        array = (self.rng.standard_normal(tuple(shape)) * scale + offset).astype(np.float32)
        known.append(self.constant(array, kind))
        return known[-1]

    def gain(self, size: int) -> Val:
        return self.weight([size], 0.2, 1.0, "gain")

    def bias(self, size: int) -> Val:
        return self.weight([size], 0.3, 0.0, "bias")

    def constant(self, array: np.ndarray, kind: str = "const") -> Val:
        """An initializer, or a Constant node."""
        value = Val(self.name(kind), tuple(int(size) for size in array.shape))
        if self.chance(0.15):
            tensor = numpy_helper.from_array(array, value.name + "_value")
            self.nodes.append(helper.make_node("Constant", [], [value.name], value=tensor))
        else:
            self.initializers[value.name] = array
        return value

    def small(self, array: np.ndarray) -> Val:
        """A constant that exporters merge with equal ones."""
        key = (str(array.dtype), array.tobytes(), array.shape)
        if not self.merges_constants or key not in self.constants:
            self.constants[key] = self.constant(array)
        return self.constants[key]

    def ints(self, *numbers: int) -> Val:
        return self.small(np.array(numbers, dtype=np.int64))

    def scalar(self, number: float) -> Val:
        shape = () if self.chance(0.7) else (1,)
        return self.small(np.full(shape, number, dtype=np.float32))

    def node(
        self, op: str, inputs: Sequence[Val | None], shape: Shape, domain: str = "", **attrs: Any
    ) -> Val:
        return self.many(op, inputs, [shape], domain, **attrs)[0]

    def many(
        self, op: str, inputs: Sequence[Val | None], shapes: Sequence[Shape], domain: str = "", **attrs: Any
    ) -> list[Val]:
        outputs = [Val(self.name(op.lower()), tuple(shape)) for shape in shapes]
        names = ["" if value is None else value.name for value in inputs]
        while names and not names[-1]:
            names.pop()
        made = helper.make_node(op, names, [value.name for value in outputs], domain=domain, **attrs)
        self.nodes.append(made)
        return outputs

    # --- operators whose form depends on the opset

    def with_axes(
        self, op: str, x: Val, axes: Sequence[int], shape: Shape, since: int = 13, **attrs: Any
    ) -> Val:
        if self.opset < since:
            return self.node(op, [x], shape, axes=list(axes), **attrs)
        return self.node(op, [x, self.ints(*axes)], shape, **attrs)

    def unsqueeze(self, x: Val, axis: int) -> Val:
        axis %= x.rank + 1
        shown = axis if self.chance(0.7) else axis - x.rank - 1
        return self.with_axes("Unsqueeze", x, [shown], (*x.shape[:axis], 1, *x.shape[axis:]))

    def squeeze(self, x: Val, axis: int) -> Val:
        axis %= x.rank
        return self.with_axes("Squeeze", x, [axis], (*x.shape[:axis], *x.shape[axis + 1 :]))

    def reduce(self, op: str, x: Val, axes: Sequence[int], keep: bool = True) -> Val:
        axes = [axis % x.rank for axis in axes]
        shape = tuple(1 if a in axes else size for a, size in enumerate(x.shape) if keep or a not in axes)
        since = 13 if op == "ReduceSum" else 18
        return self.with_axes(op, x, axes, shape, since, keepdims=int(keep))

    def split(self, x: Val, axis: int, sizes: Sequence[int]) -> list[Val]:
        """Split with equal or listed parts, or the same by slices."""
        axis %= x.rank
        shapes = [(*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes]
        shown = axis if self.chance(0.6) else axis - x.rank
        if self.chance(0.25):
            starts = np.cumsum([0, *sizes])
            return [
                self.slice(x, axis, int(starts[i]), int(starts[i + 1]), 1, open_end=i == len(sizes) - 1)
                for i in range(len(sizes))
            ]
        if len(set(sizes)) == 1 and self.chance(0.5):
            count = {"num_outputs": len(sizes)} if self.opset >= 18 else {}
            return self.many("Split", [x], shapes, axis=shown, **count)
        if self.opset < 13:
            return self.many("Split", [x], shapes, axis=shown, split=list(sizes))
        return self.many("Split", [x, self.ints(*sizes)], shapes, axis=shown)

    def slice(self, x: Val, axis: int, start: int, end: int, step: int = 1, open_end: bool = False) -> Val:
        """x[start:end:step] on one axis of known size, with positive, negative or open bounds."""
        axis %= x.rank
        total = x.shape[axis]
        assert isinstance(total, int)
        count = len(range(total)[start:end:step])
        if open_end and self.chance(0.6):
            end = self.pick([2**63 - 1, 2**31 - 1, total])
        elif 0 < end < total and self.chance(0.3):
            end -= total
        if 0 < start and self.chance(0.3):
            start -= total
        shown = axis if self.chance(0.6) else axis - x.rank
        bounds = [self.ints(start), self.ints(end), self.ints(shown)]
        if step != 1 or self.chance(0.5):
            bounds.append(self.ints(step))
        return self.node("Slice", [x, *bounds], (*x.shape[:axis], count, *x.shape[axis + 1 :]))

    def concat(self, values: Sequence[Val], axis: int) -> Val:
        axis %= values[0].rank
        total = values[0].shape[axis]
        for value in values[1:]:
            total = sum_of(total, value.shape[axis])
        shape = (*values[0].shape[:axis], total, *values[0].shape[axis + 1 :])
        return self.node("Concat", values, shape, axis=axis if self.chance(0.6) else axis - values[0].rank)

    def transpose(self, x: Val, *order: int) -> Val:
        return self.node("Transpose", [x], tuple(x.shape[axis] for axis in order), perm=list(order))

    def pointwise(self, op: str, a: Val, b: Val) -> Val:
        """A binary operator with broadcasting."""
        if self.chance(0.3) and op in ("Add", "Mul"):
            a, b = b, a
        rank = max(a.rank, b.rank)
        left, right = [(1,) * (rank - v.rank) + v.shape for v in (a, b)]
        return self.node(op, [a, b], tuple(y if x == 1 else x for x, y in zip(left, right, strict=True)))

    # --- shapes

    def extent(self, size: Size, near: Val) -> Val:
        """The size as a one-element integer array, computed from the shape of a value that has it."""
        if size in near.shape:
            return self._measure(near, near.shape.index(size))
        if isinstance(size, int):
            return self.ints(size)
        parts = [self._factor(factor, near) for factor in size.split("*")]
        total = parts[0]
        for part in parts[1:]:
            total = self.node("Mul", [total, part], (1,))
        return total

    def _factor(self, factor: str, near: Val) -> Val:
        if factor.isdigit():
            return self.ints(int(factor))
        return self._measure(
            *((near, near.shape.index(factor)) if factor in near.shape else self.places[factor])
        )

    def _measure(self, value: Val, axis: int) -> Val:
        if self.opset >= 15 and self.chance(0.4):
            return self.node("Shape", [value], (1,), start=axis, end=axis + 1)
        shape = self.node("Shape", [value], (value.rank,))
        if self.chance(0.3):
            return self.node("Slice", [shape, self.ints(axis), self.ints(axis + 1), self.ints(0)], (1,))
        if self.chance(0.3):
            return self.node("Gather", [shape, self.ints(axis)], (1,), axis=0)
        index = self.small(np.array(axis, dtype=np.int64))
        return self.unsqueeze(self.node("Gather", [shape, index], (), axis=0), 0)

    def shape_value(self, target: Shape, near: Val, computed: float = 0.5) -> Val:
        """The target as an integer array without 0 and -1."""
        parts: list[Val] = []
        for size in target:
            can = size in near.shape and size != 1
            if isinstance(size, str) or (can and self.chance(computed * 0.5)):
                parts.append(self.extent(size, near))
            else:
                parts.append(self.ints(size))
        return self.join(parts)

    def join(self, parts: list[Val]) -> Val:
        """One integer array; neighbouring literals are one constant."""
        rows: list[list[int] | Val] = []
        for part in parts:
            array = self.initializers.get(part.name)
            if array is None or self.chance(0.2):
                rows.append(part)
            elif rows and isinstance(rows[-1], list):
                rows[-1].extend(array.tolist())
            else:
                rows.append(array.tolist())
        values = [self.ints(*row) if isinstance(row, list) else row for row in rows]
        return values[0] if len(values) == 1 else self.concat(values, 0)

    def reshape(self, x: Val, target: Shape) -> Val:
        """Reshape; each axis of the target is a literal, 0, -1 or computed."""
        parts: list[Val] = []
        has_hole = False
        must = [axis for axis, size in enumerate(target) if isinstance(size, str)]
        for axis, size in enumerate(target):
            kinds: list[str] = []
            is_copy = axis < x.rank and x.shape[axis] == size
            if isinstance(size, int):
                kinds += ["literal"] * (6 if self.shape_style == "literal" else 3)
            if is_copy:
                kinds += ["zero"] * 2
            if not has_hole and (axis in must or not any(a > axis for a in must)):
                kinds += ["hole"] * 2
            if isinstance(size, str) and (self.shape_style != "literal" or not kinds):
                kinds += ["computed"] * (6 if self.shape_style == "computed" else 2)
            elif size in x.shape and size != 1 and self.shape_style == "computed":
                kinds += ["computed"]
            kind = self.pick(kinds)
            has_hole |= kind == "hole"
            literal = {"zero": 0, "hole": -1}.get(kind, size)
            parts.append(
                self.ints(literal)
                if isinstance(literal, int) and kind != "computed"
                else self.extent(size, x)
            )
        return self.node("Reshape", [x, self.join(parts)], target)

    def expand(self, x: Val, target: Shape) -> Val:
        if self.chance(0.4):
            shape = tuple(1 if a == b else b for a, b in zip(x.shape, target, strict=True))
            return self.node("Expand", [x, self.shape_value(shape, x)], target)
        return self.node("Expand", [x, self.shape_value(target, x)], target)

    def merge(self, x: Val, axis: int) -> Val:
        """Merges an axis with the next one."""
        merged = times(x.shape[axis], x.shape[axis + 1])
        return self.reshape(x, (*x.shape[:axis], merged, *x.shape[axis + 2 :]))

    # --- layers

    def linear(self, x: Val, out: int, bias: bool | None = None) -> Val:
        """A product of the last axis with a weight, in one of the forms that exporters write."""
        inner = x.shape[-1]
        assert isinstance(inner, int)
        scale = 1.0 / math.sqrt(inner)
        has_bias = self.chance(0.5) if bias is None else bias
        form = self.pick(["matmul", "matmul", "transposed", "gemm", "einsum", "fused", "conv"])
        shape = (*x.shape[:-1], out)
        if form == "gemm":
            flat = x if x.rank == 2 else self.reshape(x, (times(*x.shape[:-1]), inner))
            turned = self.chance(0.7)
            inputs = [flat, self.weight([out, inner] if turned else [inner, out], scale)]
            inputs += [self.bias(out)] if has_bias else []
            product = self.node("Gemm", inputs, (flat.shape[0], out), transB=int(turned))
            return product if x.rank == 2 else self.reshape(product, shape)
        if form == "conv" and x.rank == 3:
            turned_x = self.transpose(x, 0, 2, 1)
            inputs = [turned_x, self.weight([out, inner, 1], scale)] + ([self.bias(out)] if has_bias else [])
            made = self.node("Conv", inputs, (x.shape[0], out, x.shape[1]))
            return self.transpose(made, 0, 2, 1)
        if form == "einsum" and self.opset >= 12:
            letters = "abcde"[: x.rank - 1]
            turned = self.chance(0.5)
            weight = self.weight([out, inner] if turned else [inner, out], scale)
            equation = f"{letters}x,{'yx' if turned else 'xy'}->{letters}y"
            product = self.node("Einsum", [x, weight], shape, equation=equation)
        elif form == "fused":
            turned = self.chance(0.5)
            weight = self.weight([out, inner] if turned else [inner, out], scale)
            product = self.node("FusedMatMul", [x, weight], shape, "com.microsoft", transB=int(turned))
        elif form == "transposed":
            product = self.node("MatMul", [x, self.transpose(self.weight([out, inner], scale), 1, 0)], shape)
        else:
            product = self.node("MatMul", [x, self.weight([inner, out], scale)], shape)
        return self.pointwise("Add", product, self.bias(out)) if has_bias else product

    def activation(self, x: Val) -> Val:
        """An elementwise function; some are not zero at zero."""
        plain = (
            "Relu LeakyRelu Elu Selu Sigmoid Tanh Softplus Softsign HardSigmoid Erf Sin Cos Abs Neg Identity "
        )
        mixed = "silu gelu quick clip PRelu sqrt square cast tanhshift Dropout exp quantized Sum Min Mean FastGelu"
        names = (plain + mixed).split()
        names += ["Celu"] if self.opset >= 12 else []
        names += ["HardSwish"] if self.opset >= 14 else []
        names += ["Mish"] if self.opset >= 18 else []
        names += ["Gelu"] if self.opset >= 20 else []
        name = self.pick(names)
        if name == "silu":
            return self.pointwise("Mul", x, self.node("Sigmoid", [x], x.shape))
        if name == "gelu":
            erf = self.node("Erf", [self.pointwise("Div", x, self.scalar(math.sqrt(2)))], x.shape)
            return self.pointwise(
                "Mul",
                self.pointwise("Mul", x, self.pointwise("Add", erf, self.scalar(1.0))),
                self.scalar(0.5),
            )
        if name == "quick":
            return self.node("QuickGelu", [x], x.shape, "com.microsoft", alpha=1.702)
        if name == "clip":
            low, high = (
                self.small(np.array(bound, dtype=np.float32))
                for bound in self.pick([(-1, 1), (0.1, 2), (0, 6)])
            )
            return self.node("Clip", [x, low, high], x.shape)
        if name == "PRelu":
            size = x.shape[-1]
            slope = self.weight([size], 0.2, 0.3, "slope") if isinstance(size, int) else self.scalar(0.2)
            return self.node("PRelu", [x, slope], x.shape)
        if name == "sqrt":
            return self.node("Sqrt", [self.node("Abs", [x], x.shape)], x.shape)
        if name == "square":
            return self.node("Tanh", [self.node("Pow", [x, self.scalar(2.0)], x.shape)], x.shape)
        if name == "cast":
            wide = self.node("Cast", [x], x.shape, to=TensorProto.DOUBLE)
            return self.node("Cast", [wide], x.shape, to=TensorProto.FLOAT)
        if name == "exp":
            return self.node("Exp", [self.node("Neg", [self.node("Abs", [x], x.shape)], x.shape)], x.shape)
        if name == "quantized":
            return self.node("Softsign", [self._quantized(x)], x.shape)
        if name in ("Sum", "Min", "Mean"):
            inputs = [x, self.node("Tanh", [x], x.shape), self.weight(last_axis(x), 0.3)]
            return self.node(name, inputs, x.shape)
        if name == "FastGelu":
            return self.node(name, [x], x.shape, "com.microsoft")
        if name == "tanhshift":
            return self.node("Tanh", [self.pointwise("Sub", x, self.scalar(0.5))], x.shape)
        return self.node(name, [x], x.shape)

    def _quantized(self, x: Val) -> Val:
        """x with a weight added that is stored in 8 bits."""
        shape = last_axis(x)
        array = self.rng.integers(-9, 9, shape).astype(np.int8)
        scale = self.small(np.array(0.05, dtype=np.float32))
        zero = self.small(np.array(0, dtype=np.int8))
        wide = self.node("DequantizeLinear", [self.constant(array), scale, zero], shape)
        return self.pointwise("Add", x, wide)

    def activation_2d(self, x: Val) -> Val:
        """An activation between convolutions."""
        return self.node("Relu", [x], x.shape) if self.chance(0.4) else self.activation(x)

    def norm(self, x: Val) -> Val:
        """A norm of the last axis: LayerNorm or RMSNorm, fused or decomposed."""
        size = x.shape[-1]
        assert isinstance(size, int)
        forms = ["rms", "layer", "skip"] + ["LayerNormalization"] * 2 * (self.opset >= 17)
        forms += ["RMSNormalization"] * 2 * (self.opset >= 23)
        form = self.pick(forms)
        if form == "LayerNormalization":
            inputs = [x, self.gain(size)] + ([self.bias(size)] if self.chance(0.6) else [])
            return self.node(form, inputs, x.shape, axis=-1, epsilon=1e-5)
        if form == "RMSNormalization":
            return self.node(form, [x, self.gain(size)], x.shape, axis=-1, epsilon=1e-5)
        if form == "skip" and x.rank == 3:  # the residual add and the norm in one
            skip = self.linear(x, size)
            return self.node(
                "SkipSimplifiedLayerNormalization", [x, skip, self.gain(size)], x.shape, "com.microsoft"
            )
        if form == "layer":
            x = self.pointwise("Sub", x, self.reduce("ReduceMean", x, [-1]))
        square = (
            self.node("Pow", [x, self.scalar(2.0)], x.shape)
            if self.chance(0.6)
            else self.node("Mul", [x, x], x.shape)
        )
        mean = self.reduce("ReduceMean", square, [-1])
        root = self.node("Sqrt", [self.pointwise("Add", mean, self.scalar(1e-5))], mean.shape)
        if self.chance(0.5):
            normal = self.pointwise("Div", x, root)
        else:
            normal = self.pointwise("Mul", x, self.node("Reciprocal", [root], root.shape))
        normal = self.pointwise("Mul", normal, self.gain(size))
        return self.pointwise("Add", normal, self.bias(size)) if form == "layer" else normal

    # --- the end

    def model(self) -> onnx.ModelProto:
        tensors = [numpy_helper.from_array(array, name) for name, array in self.initializers.items()]
        graph = helper.make_graph(self.nodes, "+".join(self.marks), self.inputs, self.outputs, tensors)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        made = helper.make_model(graph, opset_imports=imports, ir_version=10)
        if self.chance(0.6):
            made = onnx.shape_inference.infer_shapes(made, data_prop=True)
        return made


def random_graph(seed: int) -> onnx.ModelProto:
    """The random graph of a seed; its name says what it was built from."""
    from random_blocks import FAMILIES

    builder = Builder(seed)
    family: Callable[[Builder], None] = builder.pick(FAMILIES)
    builder.marks.append(family.__name__)
    family(builder)
    return builder.model()
