"""Rules for fused attention and rotary embedding, of ONNX and of ONNX Runtime."""

from __future__ import annotations

import dataclasses
import math

from onnx_autoglm.axes import dims as ax
from onnx_autoglm.axes.dims import UNIT, Dim
from onnx_autoglm.axes.facts import Role
from onnx_autoglm.axes.op import Op, Rule, Unknown
from onnx_autoglm.axes.rules_elementwise import broadcast
from onnx_autoglm.axes.rules_product import CONTRACTION
from onnx_autoglm.axes.size import exact_div


@dataclasses.dataclass(frozen=True)
class Heads:
    """The one description of a head layout: query heads are `kv * rep`, each of `qk` or `v` channels."""

    kv: Dim
    rep: Dim
    qk: Dim
    v: Dim

    @property
    def query(self) -> Dim:
        return self.kv + self.rep


def _heads(query_heads: int, kv_heads: int, qk: Dim, v: Dim) -> Heads:
    if kv_heads < 1 or query_heads % kv_heads:
        raise Unknown(f"{query_heads} query heads do not divide into {kv_heads} groups")
    return Heads(ax.fresh(kv_heads), ax.fresh(query_heads // kv_heads), qk, v)


def _state_roles(op: Op, heads: Heads, operands: tuple[int, int]) -> None:
    op.role(heads.query, Role.HEAD)
    op.scores(operands, heads.qk)
    op.must_be_zero(operands, heads.qk, CONTRACTION)
    op.role(heads.v, Role.CARRIED)


def _inner(op: Op, dim: Dim, outer_size: int) -> Dim:
    """The channels of one head in a flat `heads * channels` axis."""
    size = exact_div(ax.size_of(dim), outer_size)
    if size is None:
        raise Unknown("the number of channels is not known")
    return ax.fresh(size)


def attention(op: Op) -> None:
    """Attention of opset 23 and newer: 4-D [B, heads, S, d], or 3-D [B, S, heads*d] with head counts."""
    query, key, value = op.dims(0), op.dims(1), op.dims(2)
    flat = len(query) == 3
    if flat:
        counts = op.attr_int("q_num_heads", 0), op.attr_int("kv_num_heads", 0)
        heads = _heads(*counts, _inner(op, query[2], counts[0]), _inner(op, value[2], counts[1]))
        op.equal(query[2], heads.query + heads.qk)
        op.equal(key[2], heads.kv + heads.qk)
        op.equal(value[2], heads.kv + heads.v)
        op.counts("q_num_heads", heads.query)
        op.counts("kv_num_heads", heads.kv)
    else:
        sizes = ax.size_of(query[1]), ax.size_of(key[1])
        if not isinstance(sizes[0], int) or not isinstance(sizes[1], int):
            raise Unknown("the number of heads is not known")
        heads = _heads(sizes[0], sizes[1], query[3], value[3])
        op.equal(query[1], heads.query)
        op.equal(key[1], heads.kv)
        op.equal(value[1], heads.kv)
        op.equal(query[3], key[3])
    length, keys = query[1 if flat else 2], key[1 if flat else 2]
    op.equal(query[0], key[0])
    op.equal(query[0], value[0])
    op.equal(keys, value[1 if flat else 2])
    total = keys
    if op.has(4):
        total = ax.join([op.dims(4)[2], keys])
        _cache(op, heads, op.dims(4), op.dims(5), query[0])
    op.pin_all([length, total], "positions of an attention")
    if op.has(3):
        broadcast(op, [[query[0], heads.query, length, total], op.dims(3)])
    _state_roles(op, heads, (0, 1))
    _keep_scale(op, heads)
    op.output([query[0], length, heads.query + heads.v] if flat else [query[0], heads.query, length, heads.v])
    op.output([query[0], heads.kv, total, heads.qk], 1)
    op.output([query[0], heads.kv, total, heads.v], 2)
    op.output([query[0], heads.query, length, total], 3)


def _keep_scale(op: Op, heads: Heads, unset: float | None = None) -> None:
    """The default scale is 1/sqrt(d) of the source and stays that when channels go."""
    size = ax.size_of(heads.qk)
    if isinstance(size, int):
        op.keeps("scale", heads.qk, 1.0 / math.sqrt(size), unset)


def _cache(op: Op, heads: Heads, past_key: list[Dim], past_value: list[Dim], batch: Dim) -> None:
    """Past keys and values, [B, kv, P, d]."""
    for past, channels in ((past_key, heads.qk), (past_value, heads.v)):
        op.equal(past[0], batch)
        op.equal(past[1], heads.kv)
        op.equal(past[3], channels)
    op.equal(past_key[2], past_value[2])


def rotary_embedding(op: Op) -> None:
    """RotaryEmbedding of opset 23: x, cos, sin [, position_ids]."""
    _rotate(op, op.dims(0), op.dims(1)[-1], op.dims(2)[-1], op.attr_int("interleaved", 0) == 1)


def contrib_rotary_embedding(op: Op) -> None:
    """ONNX Runtime's RotaryEmbedding: x, position_ids, cos, sin."""
    _rotate(op, op.dims(0), op.dims(2)[-1], op.dims(3)[-1], op.attr_int("interleaved", 0) == 1)


def _rotate(op: Op, dims: list[Dim], cosine: Dim, sine: Dim, interleaved: bool) -> None:
    """Channels are `rotated + passed`, and the rotated ones `pair*2` or, half-split, `2*pair`."""
    op.equal(cosine, sine)
    channels = dims[-1]
    if len(dims) == 3:
        count = op.attr_int("num_heads", 0)
        if not count:
            raise Unknown("a flat RotaryEmbedding without num_heads")
        heads, channels = ax.fresh(count), _inner(op, channels, count)
        op.equal(dims[-1], heads + channels)
        op.counts("num_heads", heads)
    width = op.attr_int("rotary_embedding_dim", 0)
    if width:
        rotated, _ = op.cut(channels, width)
        op.counts("rotary_embedding_dim", rotated)
    else:
        rotated = channels
    both = ax.join([UNIT, UNIT])
    op.equal(rotated, cosine + both if interleaved else ax.join([cosine, cosine]))
    op.output(dims)


def group_query_attention(op: Op) -> None:
    """ONNX Runtime's GroupQueryAttention; the query input may carry `[q|k|v]` packed.

    Its kernels fix the head size (a multiple of 8, one size for keys and values), so channels stay.
    """
    query = op.dims(0)
    counts = op.attr_int("num_heads", 0), op.attr_int("kv_num_heads", 0)
    packed = not op.has(1)
    per_head = counts[0] + 2 * counts[1] if packed else counts[0]
    channels = _inner(op, query[2], per_head)
    heads = _heads(*counts, channels, channels)
    flat_query, flat_kv = heads.query + channels, heads.kv + channels
    if packed:
        op.equal(query[2], ax.join([flat_query, flat_kv, flat_kv]))
    else:
        op.equal(query[2], flat_query)
        op.equal(op.dims(1)[2], flat_kv)
        op.equal(op.dims(2)[2], flat_kv)
    op.pin(channels, "the kernel of GroupQueryAttention fixes the head size")
    op.pin(query[1], "positions of an attention")
    op.counts("num_heads", heads.query)
    op.counts("kv_num_heads", heads.kv)
    total = op.born(op.opaque(), "positions of an attention")
    if op.has(3):
        _cache(op, heads, op.dims(3), op.dims(4), query[0])
    for index in (7, 8):
        if op.has(index):
            op.pin_all(op.dims(index), "rotary tables of GroupQueryAttention")
    if op.has(10):
        broadcast(op, [[query[0], heads.query, query[1], UNIT], [*op.dims(10)[:3], UNIT]])
    if op.has(11):
        op.equal(op.dims(11)[0], heads.query)
    _state_roles(op, heads, (0, 0 if packed else 1))
    op.output([query[0], query[1], flat_query])
    op.output([query[0], heads.kv, total, channels], 1)
    op.output([query[0], heads.kv, total, channels], 2)


def multi_head_attention(op: Op) -> None:
    """ONNX Runtime's MultiHeadAttention on separate q, k, v of [B, S, heads*d]."""
    query = op.dims(0)
    if len(query) != 3 or not op.has(1) or not op.has(2) or len(op.dims(1)) != 3:
        raise Unknown("a MultiHeadAttention with packed inputs")
    count = op.attr_int("num_heads", 0)
    key, value = op.dims(1), op.dims(2)
    heads = _heads(count, count, _inner(op, query[2], count), _inner(op, value[2], count))
    op.equal(query[2], heads.kv + heads.qk)
    op.equal(key[2], heads.kv + heads.qk)
    op.equal(value[2], heads.kv + heads.v)
    op.counts("num_heads", heads.kv)
    if op.has(3):
        op.equal(op.dims(3)[0], ax.join([query[2], key[2], value[2]]))
    op.pin_all([query[1], key[1]], "positions of an attention")
    total = ax.join([op.dims(6)[2], key[1]]) if op.has(6) else key[1]
    if op.has(5):
        broadcast(op, [[query[0], heads.kv, query[1], UNIT], [*op.dims(5)[:3], UNIT]])
    if op.has(6):
        _cache(op, heads, op.dims(6), op.dims(7), query[0])
    _state_roles(op, heads, (0, 1))
    _keep_scale(op, heads, unset=0.0)
    op.output([query[0], query[1], heads.kv + heads.v])
    op.output([query[0], heads.kv, total, heads.qk], 1)
    op.output([query[0], heads.kv, total, heads.v], 2)


RULES: dict[tuple[str, str], Rule] = {
    ("", "Attention"): attention,
    ("", "RotaryEmbedding"): rotary_embedding,
    ("com.microsoft", "RotaryEmbedding"): contrib_rotary_embedding,
    ("com.microsoft", "GroupQueryAttention"): group_query_attention,
    ("com.microsoft", "MultiHeadAttention"): multi_head_attention,
}
