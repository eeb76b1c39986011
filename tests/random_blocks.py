"""Blocks of the random graphs: sequence models, image models, and operators applied at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from onnx import TensorProto, helper
from random_graphs import Builder, Size, Val, sum_of, times

# --- sequence models: values are [batch, sequence, channels]


def attention(b: Builder, x: Val) -> Val:
    """Multi-head, multi-query or grouped attention in one of many layouts."""
    batch, seq, width = x.shape[0], x.shape[1], x.shape[2]
    assert isinstance(width, int)
    kv, rep, d = b.pick([1, 2, 2, 3]), b.pick([1, 2, 3, 4]), b.pick([4, 6, 8])
    heads = kv * rep
    dv = b.pick([2, 4, 5]) if b.chance(0.2) else d
    b.marks.append(f"attention{heads}/{kv}x{d}")
    q, k, v = _project(b, x, kv, rep, d, dv)  # each [B, S, heads, d]
    if b.chance(0.15):
        q, k = b.norm(q), b.norm(k)
    kind = b.pick(["none", "half", "interleaved", "half", "interleaved"])
    if b.opset >= 23 and b.chance(0.5):
        kind = "op"
    elif kind != "none":
        width_rotated = d if b.chance(0.5) else 2 * b.number(1, d // 2)
        tables = _rotary_tables(b, seq, width_rotated // 2)
        q, k = (_rotate(b, part, width_rotated, kind, tables) for part in (q, k))
    if kv == heads and b.chance(0.15) and not isinstance(d, str):
        return b.linear(_einsum_attention(b, q, k, v), width)
    q, k, v = (b.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
    if kind == "op":
        q, k = _rotary_op(b, q, k)
    if b.chance(0.35):
        k, v = _cached(b, k, v)
    if b.opset >= 23 and b.chance(0.5):
        out = _fused_attention(b, q, k, v)
    elif rep > 1 and b.chance(0.3):
        out = _grouped_attention(b, q, k, v, kv, rep)
    else:
        out = _plain_attention(b, q, _repeat(b, k, rep), _repeat(b, v, rep))
    merged = b.reshape(b.transpose(out, 0, 2, 1, 3), (batch, seq, heads * dv))
    return b.linear(merged, width)


def _project(b: Builder, x: Val, kv: int, rep: int, d: int, dv: int) -> tuple[Val, Val, Val]:
    batch, seq = x.shape[:2]
    heads = kv * rep
    forms = ["separate", "fused"]
    forms += ["interleaved"] if rep == 1 else []
    forms += ["grouped", "packed"] if dv == d else []
    forms += ["stacked"] if rep == 1 and dv == d else []
    form = b.pick(forms)
    bias = b.chance(0.4)
    if form == "separate":
        flat = [b.linear(x, size, bias) for size in (heads * d, kv * d, kv * dv)]
    elif form == "fused":
        flat = b.split(b.linear(x, (heads + kv) * d + kv * dv, bias), -1, [heads * d, kv * d, kv * dv])
    elif form == "interleaved":
        made = b.reshape(b.linear(x, kv * (2 * d + dv), bias), (batch, seq, kv, 2 * d + dv))
        q, k, v = b.split(made, -1, [d, d, dv])
        return q, k, v
    elif form == "packed":
        made = b.reshape(b.linear(x, (heads + 2 * kv) * d, bias), (batch, seq, heads + 2 * kv, d))
        q, k, v = b.split(made, 2, [heads, kv, kv])
        return q, k, v
    elif form == "grouped":
        made = b.reshape(b.linear(x, kv * (rep + 2) * d, bias), (batch, seq, kv, rep + 2, d))
        q, k, v = b.split(made, 3, [rep, 1, 1])
        q = b.reshape(q, (batch, seq, heads, d))
        return q, b.squeeze(k, 3), b.squeeze(v, 3)
    else:
        made = b.reshape(b.linear(x, 3 * kv * d, bias), (batch, seq, 3, kv, d))
        parts = []
        for index in range(3):
            number = b.small(np.array(index, dtype=np.int64))
            parts.append(b.node("Gather", [made, number], (batch, seq, kv, d), axis=2))
        return parts[0], parts[1], parts[2]
    shapes = [(batch, seq, heads, d), (batch, seq, kv, d), (batch, seq, kv, dv)]
    q, k, v = (b.reshape(part, shape) for part, shape in zip(flat, shapes, strict=True))
    return q, k, v


def _rotary_tables(b: Builder, seq: Size, pairs: int) -> tuple[Val, Val]:
    """Cosine and sine, [S, 1, pairs], from frequencies or as constants."""
    if isinstance(seq, int) and b.chance(0.4):
        angles = np.arange(seq)[:, None, None] * (0.7 ** np.arange(pairs)).astype(np.float32)
        return b.small(np.cos(angles).astype(np.float32)), b.small(np.sin(angles).astype(np.float32))
    frequencies = b.small((0.7 ** np.arange(pairs)).astype(np.float32))
    zero, one = (b.small(np.array(number, dtype=np.int64)) for number in (0, 1))
    source, axis = b.places[seq] if isinstance(seq, str) else (None, 0)
    if source is not None:
        shape = b.node("Shape", [source], (source.rank,))
        limit = b.node("Gather", [shape, b.small(np.array(axis, dtype=np.int64))], (), axis=0)
    else:
        limit = b.small(np.array(seq, dtype=np.int64))
    steps = b.node("Cast", [b.node("Range", [zero, limit, one], (seq,))], (seq,), to=TensorProto.FLOAT)
    column = b.unsqueeze(b.unsqueeze(steps, 1), 2)
    angles_value = b.pointwise("Mul", column, frequencies)
    return tuple(b.node(op, [angles_value], angles_value.shape) for op in ("Cos", "Sin"))  # type: ignore[return-value]


def _rotate(b: Builder, x: Val, width: int, kind: str, tables: tuple[Val, Val]) -> Val:
    """Rotary embedding of the first `width` channels of [B, S, heads, d]."""
    d = x.shape[-1]
    assert isinstance(d, int)
    cos, sin = tables
    rotated, rest = (x, None) if width == d else b.split(x, -1, [width, d - width])
    half = width // 2
    if kind == "half":
        if b.chance(0.5):
            cos, sin = (b.concat([table, table], -1) for table in (cos, sin))
            first, second = b.split(rotated, -1, [half, half])
            turned = b.concat([b.node("Neg", [second], second.shape), first], -1)
            made = b.pointwise("Add", b.pointwise("Mul", rotated, cos), b.pointwise("Mul", turned, sin))
        else:
            first, second = b.split(rotated, -1, [half, half])
            made = b.concat(list(_turn(b, first, second, cos, sin)), -1)
    elif b.chance(0.5):
        first, second = (b.slice(rotated, -1, start, width, 2, open_end=True) for start in (0, 1))
        pair = [b.unsqueeze(part, -1) for part in _turn(b, first, second, cos, sin)]
        made = b.reshape(b.concat(pair, -1), rotated.shape)
    else:
        pairs = b.reshape(rotated, (*rotated.shape[:-1], half, 2))
        first, second = (b.squeeze(part, -1) for part in b.split(pairs, -1, [1, 1]))
        pair = [b.unsqueeze(part, -1) for part in _turn(b, first, second, cos, sin)]
        made = b.reshape(b.concat(pair, -1), rotated.shape)
    return made if rest is None else b.concat([made, rest], -1)


def _rotary_op(b: Builder, q: Val, k: Val) -> tuple[Val, Val]:
    """The RotaryEmbedding of opset 23 on [B, heads, S, d], with position ids."""
    d = q.shape[-1]
    assert isinstance(d, int)
    width = d if b.chance(0.5) else 2 * b.number(1, d // 2)
    rows = max([32, *(size for size in q.shape[2:3] if isinstance(size, int))])
    angles = np.arange(rows)[:, None] * 0.7 ** np.arange(width // 2)
    tables = [b.small(wave(angles).astype(np.float32)) for wave in (np.cos, np.sin)]
    attrs = {"interleaved": b.number(0, 1)} | ({"rotary_embedding_dim": width} if width != d else {})
    b.marks.append("rotary")
    positions = b.input((q.shape[0], q.shape[2]), TensorProto.INT64)
    made = [b.node("RotaryEmbedding", [x, *tables, positions], x.shape, **attrs) for x in (q, k)]
    return made[0], made[1]


def _turn(b: Builder, first: Val, second: Val, cos: Val, sin: Val) -> tuple[Val, Val]:
    real = b.pointwise("Sub", b.pointwise("Mul", first, cos), b.pointwise("Mul", second, sin))
    imaginary = b.pointwise("Add", b.pointwise("Mul", second, cos), b.pointwise("Mul", first, sin))
    return real, imaginary


def _cached(b: Builder, k: Val, v: Val) -> tuple[Val, Val]:
    past: Size = "past" if b.chance(0.7) else 3
    made = []
    for part in (k, v):
        old = b.input((part.shape[0], part.shape[1], past, part.shape[3]))
        total = b.concat([old, part], 2)
        if isinstance(total.shape[2], str):
            total = Val(total.name, (*total.shape[:2], sum_of(past, part.shape[2]), total.shape[3]))
        b.output(total)
        made.append(total)
    b.marks.append("cache")
    return made[0], made[1]


def _repeat(b: Builder, x: Val, rep: int) -> Val:
    if rep == 1:
        return x
    batch, kv, length, d = x.shape
    wide = b.unsqueeze(x, 2)
    target = (batch, kv, rep, length, d)
    if b.chance(0.25):
        wide = b.node("Tile", [wide, b.ints(1, 1, rep, 1, 1)], target)
    else:
        wide = b.expand(wide, target)
    return b.reshape(wide, (batch, times(kv, rep), length, d))


def _scaled(b: Builder, scores: Val, d: int, q: Val) -> Val:
    form = b.pick(["mul", "div", "shape"])
    if form == "mul":
        return b.pointwise("Mul", scores, b.scalar(1 / math.sqrt(d)))
    if form == "div":
        return b.pointwise("Div", scores, b.scalar(math.sqrt(d)))
    shape = b.node("Shape", [q], (q.rank,))
    size = b.node("Gather", [shape, b.small(np.array(q.rank - 1, dtype=np.int64))], (), axis=0)
    root = b.node("Sqrt", [b.node("Cast", [size], (), to=TensorProto.FLOAT)], ())
    return b.pointwise("Div", scores, root)


def _attend(b: Builder, scores: Val) -> Val:
    """Mask, at random, and softmax."""
    if b.chance(0.25):
        mask_shape = (scores.shape[0], *(1,) * (scores.rank - 3), *scores.shape[-2:])
        simple = all(isinstance(size, int) or size in b.places for size in mask_shape)
        if simple:
            scores = b.pointwise("Add", scores, b.input(mask_shape))
    if all(isinstance(size, int) for size in scores.shape[-2:]) and b.chance(0.3):
        array = np.triu(np.full([int(size) for size in scores.shape[-2:]], -10, dtype=np.float32), 1)
        scores = b.pointwise("Add", scores, b.small(array))
    return b.node("Softmax", [scores], scores.shape, axis=-1 if b.opset >= 13 else scores.rank - 1)


def _plain_attention(b: Builder, q: Val, k: Val, v: Val) -> Val:
    d = q.shape[-1]
    assert isinstance(d, int)
    turned = b.transpose(k, 0, 1, 3, 2)
    scores = b.node("MatMul", [q, turned], (*q.shape[:3], turned.shape[-1]))
    weights = _attend(b, _scaled(b, scores, d, q))
    return b.node("MatMul", [weights, v], (*q.shape[:3], v.shape[-1]))


def _grouped_attention(b: Builder, q: Val, k: Val, v: Val, kv: int, rep: int) -> Val:
    """Keys and values broadcast over the query heads of their group."""
    batch, heads, seq, d = q.shape
    assert isinstance(d, int)
    grouped = b.reshape(q, (batch, kv, rep, seq, d))
    k, v = b.unsqueeze(k, 2), b.unsqueeze(v, 2)
    turned = b.transpose(k, 0, 1, 2, 4, 3)
    scores = b.node("MatMul", [grouped, turned], (batch, kv, rep, seq, turned.shape[-1]))
    weights = _attend(b, _scaled(b, scores, d, grouped))
    out = b.node("MatMul", [weights, v], (batch, kv, rep, seq, v.shape[-1]))
    return b.reshape(out, (batch, heads, seq, v.shape[-1]))


def _einsum_attention(b: Builder, q: Val, k: Val, v: Val) -> Val:
    batch, seq, heads, d = q.shape
    dv = v.shape[-1]
    assert isinstance(d, int)
    if b.opset < 12:
        q, k, v = (b.transpose(part, 0, 2, 1, 3) for part in (q, k, v))
        out = b.transpose(_plain_attention(b, q, k, v), 0, 2, 1, 3)
    else:
        scores = b.node("Einsum", [q, k], (batch, heads, seq, seq), equation="bqhd,bkhd->bhqk")
        weights = _attend(b, _scaled(b, scores, d, q))
        out = b.node("Einsum", [weights, v], (batch, seq, heads, dv), equation="bhqk,bkhd->bqhd")
    return b.reshape(out, (batch, seq, times(heads, dv)))


def _fused_attention(b: Builder, q: Val, k: Val, v: Val) -> Val:
    scale = {"scale": 0.3} if b.chance(0.3) else {}
    return b.node("Attention", [q, k, v], (*q.shape[:3], v.shape[-1]), **scale)


def contrib_attention(b: Builder, x: Val) -> Val:
    """ONNX Runtime's MultiHeadAttention."""
    width, heads, d = x.shape[2], b.pick([2, 3, 4]), b.pick([4, 8])
    assert isinstance(width, int)
    b.marks.append(f"mha{heads}x{d}")
    q, k, v = (b.linear(x, heads * d) for _ in range(3))
    bias = b.bias(3 * heads * d) if b.chance(0.4) else None
    out = b.node("MultiHeadAttention", [q, k, v, bias], q.shape, "com.microsoft", num_heads=heads)
    return b.linear(out, width)


def grouped_contrib_attention(b: Builder, x: Val) -> Val:
    """ONNX Runtime's GroupQueryAttention without a past, its inputs separate or packed."""
    batch, seq, width = x.shape
    if not isinstance(batch, int) or not isinstance(seq, int):
        return contrib_attention(b, x)
    assert isinstance(width, int)
    kv, rep, d = b.pick([1, 2, 3]), b.pick([1, 2, 3]), 8
    b.marks.append(f"gqa{kv * rep}/{kv}")
    if b.chance(0.4):
        q, k, v = b.linear(x, (kv * rep + 2 * kv) * d), None, None
    else:
        q, k, v = b.linear(x, kv * rep * d), b.linear(x, kv * d), b.linear(x, kv * d)
    lengths = b.small(np.full(batch, seq - 1, dtype=np.int32)), b.small(np.array(seq, dtype=np.int32))
    shapes = [(batch, seq, kv * rep * d), (batch, kv, seq, d), (batch, kv, seq, d)]
    counts = {"num_heads": kv * rep, "kv_num_heads": kv}
    made = b.many("GroupQueryAttention", [q, k, v, None, None, *lengths], shapes, "com.microsoft", **counts)
    return b.linear(made[0], width)


def feed_forward(b: Builder, x: Val) -> Val:
    """Plain or gated, the gate separate, fused or interleaved."""
    width, inner = x.shape[-1], b.pick([6, 8, 12, 16])
    assert isinstance(width, int)
    form = b.pick(["plain", "plain", "gated", "fused", "reshaped", "interleaved", "double"])
    b.marks.append(f"ffn:{form}")
    if form == "plain":
        made = b.activation(b.linear(x, inner))
    elif form == "double":
        made = b.activation(b.linear(b.activation(b.linear(x, inner)), b.pick([6, 8, 12])))
    else:
        if form == "gated":
            gate, up = b.linear(x, inner), b.linear(x, inner)
        elif form == "fused":
            gate, up = b.split(b.linear(x, 2 * inner), -1, [inner, inner])
        elif form == "reshaped":
            pair = b.reshape(b.linear(x, 2 * inner), (*x.shape[:-1], 2, inner))
            gate, up = (b.squeeze(part, -2) for part in b.split(pair, -2, [1, 1]))
        else:
            both = b.linear(x, 2 * inner)
            gate, up = (b.slice(both, -1, start, 2 * inner, 2, open_end=True) for start in (0, 1))
        made = b.pointwise("Mul", b.activation(gate), up)
    if b.chance(0.1):
        made = b.norm(made)
    return b.linear(made, width)


def experts(b: Builder, x: Val) -> Val:
    """A mixture of experts over stacked weights; all computed and weighted, or the chosen ones looked up."""
    batch, seq, width = x.shape
    assert isinstance(width, int)
    count, inner, chosen = b.pick([3, 4, 6]), b.pick([4, 6, 8]), b.pick([1, 2])
    tokens = times(batch, seq)
    flat = b.reshape(x, (tokens, width))
    logits = b.linear(flat, count, bias=b.chance(0.3))
    axis = 1 if b.opset < 13 else -1
    scores = b.node("Softmax", [logits], logits.shape, axis=axis)
    values, indices = b.many("TopK", [scores, b.ints(chosen)], [(tokens, chosen)] * 2, axis=-1)
    scale = 1 / math.sqrt(width), 1 / math.sqrt(inner)
    if b.chance(0.4):
        b.marks.append(f"moe-dense{count}")
        zeros = b.pointwise("Mul", scores, b.scalar(0.0))
        routed = b.node("ScatterElements", [zeros, indices, values], (tokens, count), axis=1)
        wide = b.unsqueeze(flat, 0)
        up = b.node("MatMul", [wide, b.weight([count, width, inner], scale[0])], (count, tokens, inner))
        down = b.weight([count, inner, width], scale[1])
        out = b.node("MatMul", [b.activation(up), down], (count, tokens, width))
        weights = b.unsqueeze(b.transpose(routed, 1, 0), 2)
        total = b.reduce("ReduceSum", b.pointwise("Mul", out, weights), [0], keep=False)
        return b.reshape(total, (batch, seq, width))
    b.marks.append(f"moe-lookup{count}")
    gated = b.chance(0.5)
    up_weight = b.weight([count, width, 2 * inner if gated else inner], scale[0])
    picked_up = b.node("Gather", [up_weight, indices], (tokens, chosen, *up_weight.shape[1:]), axis=0)
    row = b.unsqueeze(b.unsqueeze(flat, 1), 1)
    up = b.node("MatMul", [row, picked_up], (tokens, chosen, 1, up_weight.shape[-1]))
    if gated:
        gate, value = b.split(up, -1, [inner, inner])
        up = b.pointwise("Mul", b.activation(gate), value)
    else:
        up = b.activation(up)
    picked_down = b.node(
        "Gather", [b.weight([count, inner, width], scale[1]), indices], (tokens, chosen, inner, width), axis=0
    )
    out = b.squeeze(b.node("MatMul", [up, picked_down], (tokens, chosen, 1, width)), 2)
    total = b.reduce("ReduceSum", b.pointwise("Mul", out, b.unsqueeze(values, 2)), [1], keep=False)
    return b.reshape(total, (batch, seq, width))


def oddity(b: Builder, x: Val) -> Val:
    """An operator without a rule, or one that pins: it must be refused with a reason."""
    width = x.shape[-1]
    assert isinstance(width, int)
    forms = ["einsum", "if", "cumsum", "sort", "lstm", "loop"]
    form = b.pick(forms)
    b.marks.append(f"odd:{form}")
    made = b.linear(x, 2 * width)
    if form == "lstm" and x.rank == 3:
        turned = b.transpose(made, 1, 0, 2)
        hidden = 3
        weights = [b.weight([1, 4 * hidden, size], 0.3) for size in (2 * width, hidden)]
        shape = (x.shape[1], 1, x.shape[0], hidden)
        out = b.squeeze(b.node("LSTM", [turned, *weights], shape, hidden_size=hidden), 1)
        made = b.transpose(out, 1, 0, 2)
    elif form == "einsum" and b.opset >= 12:
        other = b.weight([2 * width, 5], 0.3)
        made = b.node("Einsum", [made, other], (*x.shape[:-1], 5), equation="...i,ij->...j")
    elif form in ("if", "loop"):
        made = _conditional(b, made)
    elif form == "sort":
        axis = b.ints(2 * width)
        made = b.many("TopK", [made, axis], [made.shape] * 2, axis=-1)[0]
    else:
        made = b.node("CumSum", [made, b.small(np.array(x.rank - 1, dtype=np.int64))], made.shape)
    return b.linear(made, width)


def _conditional(b: Builder, x: Val) -> Val:
    """An If that reads a value of the outer graph in both branches."""
    total = b.reduce("ReduceSum", x, list(range(x.rank)), keep=False)
    condition = b.node("Greater", [total, b.small(np.array(0, dtype=np.float32))], ())
    branches = []
    for op in ("Tanh", "Relu"):
        name = b.name("branch")
        inner = helper.make_node(op, [x.name], [name])
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * x.rank)
        branches.append(helper.make_graph([inner], name, [], [result]))
    return b.node("If", [condition], x.shape, then_branch=branches[0], else_branch=branches[1])


def channel_mixing(b: Builder, x: Val) -> Val:
    """Random operators between two linear layers."""
    width = x.shape[-1]
    assert isinstance(width, int)
    inner = b.linear(x, b.pick([6, 8, 12]))
    b.marks.append("mixing")
    out = scramble(b, inner, b.number(2, 6))
    return b.linear(flatten_to(b, out, x.shape[:2]), width)


def flatten_to(b: Builder, x: Val, leading: Sequence[Size]) -> Val:
    """A value that starts with the leading axes, its other axes merged into one of at least 1."""
    rest = times(*x.shape[len(leading) :])
    return x if x.rank == len(leading) + 1 else b.reshape(x, (*leading, rest))


def sequence_model(b: Builder) -> None:
    width = b.pick([8, 12, 16])
    if b.chance(0.5):
        tokens = b.input((b.batch, b.seq), TensorProto.INT64)
        x = b.node("Gather", [b.weight([11, width]), tokens], (b.batch, b.seq, width), axis=0)
    else:
        x = b.linear(b.input((b.batch, b.seq, b.pick([3, 6]))), width)
    blocks: list[Callable[[Builder, Val], Val]] = [
        attention,
        attention,
        attention,
        feed_forward,
        feed_forward,
        experts,
        channel_mixing,
    ]
    blocks += [contrib_attention, grouped_contrib_attention] if b.chance(0.25) else []
    blocks += [oddity] if b.chance(0.15) else []
    style = b.pick(["pre", "post", "sandwich", "bare", "parallel"])
    for _ in range(b.number(1, 3)):
        block = b.pick(blocks)
        inner = b.norm(x) if style in ("pre", "sandwich", "parallel") else x
        made = block(b, inner)
        if style == "parallel":
            made = b.pointwise("Add", made, feed_forward(b, inner))
        if style == "sandwich":
            made = b.norm(made)
        x = b.pointwise("Add", x, made)
        if style == "post":
            x = b.norm(x)
    b.output(b.linear(b.norm(x) if b.chance(0.6) else x, b.pick([5, 7])))


# --- image models: values are [batch, channels, height, width]


def conv(
    b: Builder, x: Val, out: int, kernel: int = 3, group: int = 1, stride: int = 1, bias: bool | None = None
) -> Val:
    channels = x.shape[1]
    assert isinstance(channels, int)
    scale = 1 / math.sqrt(channels // group * kernel * kernel)
    inputs = [x, b.weight([out, channels // group, kernel, kernel], scale)]
    inputs += [b.bias(out)] if (b.chance(0.5) if bias is None else bias) else []
    pad = kernel // 2
    spatial = tuple(
        (int(s) + 2 * pad - kernel) // stride + 1 if isinstance(s, int) else s for s in x.shape[2:]
    )
    attrs = {"group": group} if group > 1 or b.chance(0.3) else {}
    attrs_list = {"pads": [pad] * 4, "strides": [stride, stride], "kernel_shape": [kernel, kernel]}
    return b.node("Conv", inputs, (x.shape[0], out, *spatial), **attrs, **attrs_list)


def channel_norm(b: Builder, x: Val) -> Val:
    """BatchNorm, GroupNorm, InstanceNorm, a scale and shift, or nothing."""
    channels = x.shape[1]
    assert isinstance(channels, int)
    forms = ["batch"] * 4 + ["instance", "affine", "layer", "groups", "none"]
    forms += ["GroupNormalization"] * 2 * (b.opset >= 21)
    form = b.pick(forms)
    if form == "batch":
        mean, variance = b.bias(channels), b.weight([channels], 0.05, 1.0, "variance")
        return b.node("BatchNormalization", [x, b.gain(channels), b.bias(channels), mean, variance], x.shape)
    if form == "instance":
        return b.node("InstanceNormalization", [x, b.gain(channels), b.bias(channels)], x.shape)
    if form == "affine":
        gain, bias = (b.weight([channels, 1, 1], 0.2, offset) for offset in (1.0, 0.0))
        return b.pointwise("Add", b.pointwise("Mul", x, gain), bias)
    if form == "layer" and all(isinstance(size, int) for size in x.shape[2:]):
        return b.transpose(b.norm(b.transpose(x, 0, 2, 3, 1)), 0, 3, 1, 2)
    groups = b.pick([g for g in (1, 2, 4, channels) if channels % g == 0])
    if form == "GroupNormalization":
        inputs = [x, b.gain(channels), b.bias(channels)]
        return b.node("GroupNormalization", inputs, x.shape, num_groups=groups)
    if form == "groups":
        # As exporters write it: an InstanceNorm over groups in a row, then scale and shift.
        flat = b.reshape(x, (x.shape[0], groups, times(channels // groups, *x.shape[2:])))
        one, zero = np.ones(groups, dtype=np.float32), np.zeros(groups, dtype=np.float32)
        normal = b.node("InstanceNormalization", [flat, b.small(one), b.small(zero)], flat.shape)
        gain, bias = (b.weight([channels, 1, 1], 0.2, offset) for offset in (1.0, 0.0))
        return b.pointwise("Add", b.pointwise("Mul", b.reshape(normal, x.shape), gain), bias)
    return x


def convolution(b: Builder, x: Val) -> Val:
    out = b.pick([6, 8, 12])
    return b.activation_2d(channel_norm(b, conv(b, x, out, b.pick([1, 3]))))


def grouped_convolution(b: Builder, x: Val) -> Val:
    channels = x.shape[1]
    assert isinstance(channels, int)
    group = b.pick([g for g in (2, 3, 4, channels) if channels % g == 0] or [1])
    out = group * b.pick([1, 2, 3])
    b.marks.append(f"group{group}")
    return b.activation_2d(channel_norm(b, conv(b, x, out, 3, group)))


def bottleneck(b: Builder, x: Val) -> Val:
    """A residual block, plain or inverted with a depthwise convolution."""
    channels, inner = x.shape[1], b.pick([6, 8, 12])
    assert isinstance(channels, int)
    depthwise = b.chance(0.5)
    b.marks.append("inverted" if depthwise else "bottleneck")
    made = b.activation_2d(channel_norm(b, conv(b, x, inner, 1)))
    made = b.activation_2d(channel_norm(b, conv(b, made, inner, 3, inner if depthwise else 1)))
    if b.chance(0.4):
        made = squeeze_excite(b, made)
    made = channel_norm(b, conv(b, made, channels, 1))
    return b.pointwise("Add", x, made)


def squeeze_excite(b: Builder, x: Val) -> Val:
    channels = x.shape[1]
    assert isinstance(channels, int)
    b.marks.append("se")
    if b.chance(0.5):
        pooled = b.node("GlobalAveragePool", [x], (*x.shape[:2], 1, 1))
    else:
        pooled = b.reduce("ReduceMean", x, [2, 3])
    inner = b.pick([2, 3, 4])
    if b.chance(0.5):
        small = b.activation_2d(conv(b, pooled, inner, 1))
        scale = conv(b, small, channels, 1)
    else:
        flat = b.node("Flatten", [pooled], (x.shape[0], channels))
        scale = b.linear(b.activation(b.linear(flat, inner)), channels)
        scale = b.reshape(scale, (x.shape[0], channels, 1, 1))
    gate = b.node(b.pick(["Sigmoid", "HardSigmoid"]), [scale], scale.shape)
    return b.pointwise("Mul", x, gate)


def dense_block(b: Builder, x: Val) -> Val:
    b.marks.append("dense")
    parts = [x]
    for _ in range(b.number(2, 3)):
        joined = b.concat(parts, 1) if len(parts) > 1 else parts[0]
        parts.append(b.activation_2d(conv(b, channel_norm(b, joined), b.pick([3, 4]))))
    return b.concat(parts, 1)


def inception(b: Builder, x: Val) -> Val:
    b.marks.append("inception")
    parts = [b.activation_2d(conv(b, x, b.pick([3, 4, 6]), kernel)) for kernel in (1, 3)]
    spatial = x.shape[2:]
    pool = b.pick(["MaxPool", "AveragePool"])
    shape = (*x.shape[:2], *spatial)
    pooled = b.node(pool, [x], shape, kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1])
    return b.concat([*parts, conv(b, pooled, b.pick([2, 5]), 1)], 1)


def shuffle(b: Builder, x: Val) -> Val:
    channels = x.shape[1]
    assert isinstance(channels, int)
    group = b.pick([g for g in (2, 3, 4) if channels % g == 0] or [1])
    b.marks.append(f"shuffle{group}")
    made = b.reshape(x, (x.shape[0], group, channels // group, *x.shape[2:]))
    made = b.transpose(made, 0, 2, 1, 3, 4)
    made = b.reshape(made, x.shape)
    return conv(b, made, channels, 3, group) if b.chance(0.6) else made


def split_branches(b: Builder, x: Val) -> Val:
    """Channels cut in two, one part convolved, joined again."""
    channels = x.shape[1]
    assert isinstance(channels, int)
    first = b.number(1, channels - 1)
    b.marks.append(f"branches{first}/{channels}")
    left, right = b.split(x, 1, [first, channels - first])
    made = b.activation_2d(channel_norm(b, conv(b, right, channels - first)))
    return b.concat([left, made] if b.chance(0.7) else [made, left], 1)


def resample(b: Builder, x: Val) -> Val:
    """Pooling, strides, transposed convolution, padding, or space moved into channels."""
    channels, height, width = x.shape[1:]
    assert isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)
    form = b.pick(
        ["pool", "stride", "transposed", "pad", "channelpad", "resize", "to_depth", "to_space", "lrn"]
    )
    b.marks.append(f"sample:{form}")
    if form == "pool":
        shape = (x.shape[0], channels, height // 2, width // 2)
        op = b.pick(["MaxPool", "AveragePool", "LpPool"])
        return b.node(op, [x], shape, kernel_shape=[2, 2], strides=[2, 2])
    if form == "transposed" and max(height, width) <= 16:
        group = b.pick([g for g in (1, 1, 2, 3) if channels % g == 0])
        out = b.pick([2, 3, 4])
        weight = b.weight([channels, out, 2, 2], 1 / math.sqrt(channels / group))
        inputs = [x, weight] + ([b.bias(group * out)] if b.chance(0.5) else [])
        shape = (x.shape[0], group * out, 2 * height, 2 * width)
        return b.node("ConvTranspose", inputs, shape, strides=[2, 2], group=group)
    if form == "pad":
        mode = b.pick(["constant", "reflect", "edge"])
        shape = (x.shape[0], channels, height + 2, width + 2)
        return b.node("Pad", [x, b.ints(0, 0, 1, 1, 0, 0, 1, 1)], shape, mode=mode)
    if form == "channelpad":
        before, behind = b.pick([(0, 2), (1, 0), (2, 3)])
        pads = b.ints(0, before, 0, 0, 0, behind, 0, 0)
        return b.node("Pad", [x, pads], (x.shape[0], channels + before + behind, height, width))
    if form == "resize" and max(height, width) <= 16:
        scales = b.small(np.array([1, 1, 2, 2], dtype=np.float32))
        shape = (x.shape[0], channels, 2 * height, 2 * width)
        region = b.small(np.zeros(0, dtype=np.float32)) if b.opset < 13 else None
        return b.node("Resize", [x, region, scales], shape, mode="nearest")
    if form == "to_depth" and height % 2 == width % 2 == 0:
        shape = (x.shape[0], 4 * channels, height // 2, width // 2)
        return b.node("SpaceToDepth", [x], shape, blocksize=2)
    if form == "to_space" and channels % 4 == 0 and max(height, width) <= 16:
        shape = (x.shape[0], channels // 4, 2 * height, 2 * width)
        return b.node("DepthToSpace", [x], shape, blocksize=2, mode=b.pick(["DCR", "CRD"]))
    if form == "lrn":
        return b.node("LRN", [x], x.shape, size=3)
    return conv(b, x, b.pick([4, 6, 8]), 3, stride=2)


def image_model(b: Builder) -> None:
    size = b.pick([4, 6, 8])
    x = conv(b, b.input((b.batch, 3, size, size)), b.pick([4, 6, 8, 12]))
    blocks = [
        convolution,
        grouped_convolution,
        bottleneck,
        bottleneck,
        dense_block,
        inception,
        shuffle,
        split_branches,
        resample,
    ]
    for _ in range(b.number(1, 4)):
        if isinstance(x.shape[1], int) and x.shape[1] < 2:
            x = conv(b, x, 6)
        x = b.pick(blocks)(b, x)
    if b.chance(0.25):
        b.output(conv(b, x, 3, 1))
        return
    if b.chance(0.3):
        x = patches_to_sequence(b, x)
        for _ in range(b.number(1, 2)):
            x = b.pointwise("Add", x, b.pick([attention, feed_forward])(b, b.norm(x)))
        x = b.reduce("ReduceMean", x, [1], keep=False)
    elif b.chance(0.5):
        pooled = b.node(b.pick(["GlobalAveragePool", "GlobalMaxPool"]), [x], (*x.shape[:2], 1, 1))
        x = b.node("Flatten", [pooled], x.shape[:2])
    else:
        flat = times(*x.shape[1:])
        if b.chance(0.5):
            x = b.node("Flatten", [x], (x.shape[0], flat), axis=b.pick([1, -3]))
        else:
            x = b.reshape(x, (x.shape[0], flat))
    if b.chance(0.5):
        x = b.activation(b.linear(x, b.pick([8, 10])))
    b.output(b.linear(x, 5))


def patches_to_sequence(b: Builder, x: Val) -> Val:
    b.marks.append("patches")
    flat = b.reshape(x, (*x.shape[:2], times(*x.shape[2:])))
    return b.linear(b.transpose(flat, 0, 2, 1), b.pick([8, 12]))


# --- operators at random


def scramble(b: Builder, x: Val, steps: int) -> Val:
    """Applies random operators; all axes but the leading ones of unknown size may be used."""
    leading = x.rank - 1
    for _ in range(steps):
        step = b.pick(_STEPS)
        made = step(b, x, leading)
        if made is not None and _entries(made) <= 4096:
            b.marks.append(step.__name__.strip("_"))
            x = made
    return x


def _entries(x: Val) -> int:
    total = 1
    for size in x.shape:
        total *= size if isinstance(size, int) else 1
    return total


def _axis(b: Builder, x: Val, leading: int) -> int:
    return b.number(leading, x.rank - 1)


def _size(x: Val, axis: int) -> int:
    size = x.shape[axis]
    assert isinstance(size, int)
    return size


def _activate(b: Builder, x: Val, leading: int) -> Val | None:
    return b.activation(x)


def _divide_axis(b: Builder, x: Val, leading: int) -> Val | None:
    axis = _axis(b, x, leading)
    size = _size(x, axis)
    factors = [f for f in range(2, size) if size % f == 0]
    if not factors or x.rank >= 5:
        return None
    factor = b.pick(factors)
    return b.reshape(x, (*x.shape[:axis], factor, size // factor, *x.shape[axis + 1 :]))


def _merge_axes(b: Builder, x: Val, leading: int) -> Val | None:
    if x.rank < leading + 2:
        return None
    return b.merge(x, b.number(leading, x.rank - 2))


def _regroup(b: Builder, x: Val, leading: int) -> Val | None:
    """A reshape whose factors need not nest."""
    total = times(*x.shape[leading:])
    assert isinstance(total, int)
    factors = [f for f in range(1, total + 1) if total % f == 0]
    factor = b.pick(factors)
    return b.reshape(x, (*x.shape[:leading], factor, total // factor))


def _permute(b: Builder, x: Val, leading: int) -> Val | None:
    order = [*range(leading), *(int(axis) + leading for axis in b.rng.permutation(x.rank - leading))]
    return b.transpose(x, *order)


def _cut_and_join(b: Builder, x: Val, leading: int) -> Val | None:
    """Split, some parts changed, joined in any order."""
    axis = _axis(b, x, leading)
    size = _size(x, axis)
    if size < 2:
        return None
    if size % 2 == 0 and b.chance(0.5):
        sizes = [size // 2] * 2
    elif size > 2 and b.chance(0.4):
        first = b.number(1, size - 2)
        second = b.number(1, size - first - 1)
        sizes = [first, second, size - first - second]
    else:
        first = b.number(1, size - 1)
        sizes = [first, size - first]
    parts = [b.activation(part) if b.chance(0.4) else part for part in b.split(x, axis, sizes)]
    if len(set(sizes)) == 1 and b.chance(0.4):
        return b.pointwise(b.pick(["Add", "Mul", "Sub", "Max"]), parts[0], parts[1])
    if b.chance(0.3):
        parts.append(b.pick(parts))
    return b.concat([parts[int(index)] for index in b.rng.permutation(len(parts))], axis)


def _window(b: Builder, x: Val, leading: int) -> Val | None:
    axis = _axis(b, x, leading)
    size = _size(x, axis)
    if size < 2:
        return None
    if b.chance(0.1):
        return b.node("Slice", [x, b.ints(-1), b.ints(-(2**31)), b.ints(axis), b.ints(-1)], x.shape)
    start = b.number(0, size - 1)
    end = b.number(start + 1, size)
    return b.slice(x, axis, start, end, b.pick([1, 1, 2, 3]), open_end=end == size)


def _gather(b: Builder, x: Val, leading: int) -> Val | None:
    axis = _axis(b, x, leading)
    size = _size(x, axis)
    form = b.pick(["scalar", "range", "stride", "order", "repeat"])
    if form == "scalar":
        if x.rank <= leading + 1:
            return None
        index = b.small(np.array(b.number(-size, size - 1), dtype=np.int64))
        return b.node("Gather", [x, index], (*x.shape[:axis], *x.shape[axis + 1 :]), axis=axis)
    if form == "range":
        start = b.number(0, size - 1)
        indices = list(range(start, b.number(start + 1, size)))
    elif form == "stride":
        indices = list(range(b.number(0, 1) % size, size, 2))
    elif form == "order":
        indices = [int(index) for index in b.rng.permutation(size)]
    else:
        indices = [int(index) for index in b.rng.integers(0, size, b.number(1, 4))]
    if b.chance(0.2):
        indices = [index - size for index in indices]
    return b.node(
        "Gather", [x, b.ints(*indices)], (*x.shape[:axis], len(indices), *x.shape[axis + 1 :]), axis=axis
    )


def _scale(b: Builder, x: Val, leading: int) -> Val | None:
    """A weight that broadcasts over some of the axes."""
    shape = [_size(x, axis) if b.chance(0.7) else 1 for axis in range(leading, x.rank)]
    op = b.pick(["Add", "Mul", "Sub", "Max", "Div"])
    weight = b.weight(shape, 0.2, 2.0, "divisor") if op == "Div" else b.weight(shape, 0.5)
    return b.pointwise(op, x, weight)


def _stretch(b: Builder, x: Val, leading: int) -> Val | None:
    """A new axis by Expand or Tile."""
    if x.rank >= 5:
        return None
    axis, count = b.number(leading, x.rank), b.pick([2, 3])
    if b.chance(0.3) and axis < x.rank:
        repeats = [count if a == axis else 1 for a in range(x.rank)]
        return b.node(
            "Tile", [x, b.ints(*repeats)], (*x.shape[:axis], _size(x, axis) * count, *x.shape[axis + 1 :])
        )
    wide = b.unsqueeze(x, axis)
    return b.expand(wide, (*wide.shape[:axis], count, *wide.shape[axis + 1 :]))


def _pad(b: Builder, x: Val, leading: int) -> Val | None:
    axis = _axis(b, x, leading)
    before, behind = b.pick([(0, 1), (2, 0), (1, 1)])
    pads = [before if a == axis else 0 for a in range(x.rank)] + [
        behind if a == axis else 0 for a in range(x.rank)
    ]
    shape = (*x.shape[:axis], _size(x, axis) + before + behind, *x.shape[axis + 1 :])
    inputs = [x, b.ints(*pads)] + ([b.small(np.array(0.5, dtype=np.float32))] if b.chance(0.4) else [])
    return b.node("Pad", inputs, shape)


def _reduce(b: Builder, x: Val, leading: int) -> Val | None:
    if x.rank <= leading + 1:
        return None
    sums = ["ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2"]
    op = b.pick([*sums, "ReduceMean", "ReduceMax", "ReduceMin", "ReduceLogSumExp"])
    made = b.reduce(op, x, [_axis(b, x, leading)], keep=b.chance(0.5))
    return made


def _project_axis(b: Builder, x: Val, leading: int) -> Val | None:
    """A linear layer on the last axis, at random with an axis moved there before."""
    if x.rank > leading + 1 and b.chance(0.5):
        axis = b.number(leading, x.rank - 2)
        order = [*range(axis), *range(axis + 1, x.rank), axis]
        x = b.transpose(x, *order)
    return b.linear(x, b.pick([4, 6, 8]))


def _residual(b: Builder, x: Val, leading: int) -> Val | None:
    return b.pointwise("Add", x, b.activation(b.linear(x, _size(x, x.rank - 1))))


def _normalise(b: Builder, x: Val, leading: int) -> Val | None:
    form = b.pick(["norm", "norm", "Softmax", "LogSoftmax", "LpNormalization"])
    return b.norm(x) if form == "norm" else b.node(form, [x], x.shape, axis=x.rank - 1)


def _bilinear(b: Builder, x: Val, leading: int) -> Val | None:
    """A product of two activations made from the same value."""
    if x.rank < leading + 2:
        return None
    axes = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    other = b.transpose(b.activation(x), *axes)
    scale = b.scalar(1 / math.sqrt(_size(x, x.rank - 1)))
    product = b.node("MatMul", [x, other], (*x.shape[:-1], x.shape[-2]))
    return b.pointwise("Mul", product, scale)


def _choose(b: Builder, x: Val, leading: int) -> Val | None:
    condition = b.node("Greater", [x, b.scalar(0.0)], x.shape)
    return b.node("Where", [condition, x, b.activation(x)], x.shape)


def _normalised_channels(b: Builder, x: Val, leading: int) -> Val | None:
    """BatchNorm over axis 1, where that is one of the axes in play."""
    if leading > 1:
        return None
    channels = _size(x, 1)
    mean, variance = b.bias(channels), b.weight([channels], 0.05, 1.0, "variance")
    return b.node("BatchNormalization", [x, b.gain(channels), b.bias(channels), mean, variance], x.shape)


def _convolve(b: Builder, x: Val, leading: int) -> Val | None:
    if leading > 1 or x.rank not in (3, 4):
        return None
    channels, out = _size(x, 1), b.pick([3, 4, 6])
    group = b.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
    kernel = [1] * (x.rank - 2)
    inputs = [x, b.weight([out * group, channels // group, *kernel], 1 / math.sqrt(channels // group))]
    inputs += [b.bias(out * group)] if b.chance(0.5) else []
    return b.node("Conv", inputs, (x.shape[0], out * group, *x.shape[2:]), group=group)


_STEPS: list[Callable[[Builder, Val, int], Val | None]] = [
    _activate,
    _divide_axis,
    _divide_axis,
    _merge_axes,
    _regroup,
    _permute,
    _cut_and_join,
    _cut_and_join,
    _window,
    _gather,
    _scale,
    _scale,
    _stretch,
    _pad,
    _reduce,
    _project_axis,
    _project_axis,
    _residual,
    _normalise,
    _bilinear,
    _choose,
    _normalised_channels,
    _convolve,
]


def random_operators(b: Builder) -> None:
    """Linear layers around random operators on [batch, channels]; several branches may meet."""
    x = b.linear(b.input((b.batch, b.pick([4, 7]))), b.pick([8, 12, 24]))
    for _ in range(b.number(1, 3)):
        out = scramble(b, b.activation(x) if b.chance(0.5) else x, b.number(1, 7))
        flat = flatten_to(b, out, x.shape[:1])
        made = b.linear(flat, b.pick([6, 8, 12]))
        x = b.pointwise("Add", made, b.linear(x, _size(made, 1))) if b.chance(0.3) else made
        if b.chance(0.1):
            b.output(b.linear(flat, 2))
    b.output(b.linear(x, 3))


def random_sequence_operators(b: Builder) -> None:
    """The same on [batch, sequence, channels]."""
    x = b.linear(b.input((b.batch, b.seq, 6)), b.pick([8, 12]))
    for _ in range(b.number(1, 2)):
        x = channel_mixing(b, x)
    b.output(b.linear(x, 3))


FAMILIES = [
    sequence_model,
    sequence_model,
    image_model,
    image_model,
    random_operators,
    random_operators,
    random_sequence_operators,
]
