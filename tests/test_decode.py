"""Writing text: with and without a cache, in batches and alone, and what cannot be decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import recipes
from helpers import model

from onnx_autoglm import UserError
from onnx_autoglm.decode import Decoder
from onnx_autoglm.decode_roles import decode_roles
from onnx_autoglm.modelfile import open_model
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.runtime import Session
from onnx_autoglm.sampling import Sampling

ROOT = Path(__file__).parents[1] / "build" / "models"
PROMPTS = np.random.default_rng(0).integers(0, 256, (3, 4))

# Each token looks up a key; the cache holds the keys, and scores depend on the sum over past and present.
CACHED = """
g (int64[{b},{s}] t, float[{b},p,4] a, float[{b},p,4] b) => (float[{b},{s},16] y, float[{b},q,4] d, float[{b},q,4] c)
<float[16,4] table, float[4,4] w, float[4,16] head>
{{
  e = Gather(table, t) f = MatMul(e, w)
  {joins}
  r = CumSum(u, one) n = Shape<start=1, end=2>(a) m = Shape<start=1, end=2>(d) l = Slice(r, n, m, one1)
  z = Tanh(l) y = MatMul(z, head)
}}
"""
CONSTANTS = {"one": np.array(1), "one1": np.array([1])}
JOINS = "c = Concat<axis=1>(a, e) d = Concat<axis=1>(b, f) u = Sub(c, d)"


def cached(batch: object = "batch", sequence: object = "s", joins: str = JOINS) -> ir.Model:
    text = CACHED.format(b=batch, s=sequence, joins=joins)
    text = text.replace("<float[16,4] table", "<int64 one, int64[1] one1, float[16,4] table")
    return model(text, weights=CONSTANTS)


def built(name: str) -> ir.Model:
    return canonicalize(open_model(recipes.build(name, ROOT) / "model.onnx"))


def by_whole_runs(source: ir.Model, prompts: np.ndarray, tokens: int) -> np.ndarray:
    """The token of the highest score, from a run over everything so far, each time."""
    session, text = Session(source), prompts
    for _ in range(tokens):
        scores = session.run({"input_ids": text, "attention_mask": np.ones_like(text)})["logits"]
        text = np.concatenate([text, scores[:, -1].argmax(-1)[:, None]], axis=1)
    return text[:, prompts.shape[1] :]


def test_with_a_cache_without_one_and_by_whole_runs() -> None:
    plain = built("glm-gqa-op20")
    expected = by_whole_runs(plain, PROMPTS, 12)
    assert len(np.unique(expected)) > 8
    without, with_cache = Decoder(plain), Decoder(built("glm-gqa-op20-kv"))
    assert with_cache.cached and not without.cached
    assert np.array_equal(without.generate(PROMPTS, 12), expected)
    assert np.array_equal(with_cache.generate(PROMPTS, 12), expected)
    drawn = without.generate(PROMPTS, 12, sampling=Sampling(0.8), seed=3)
    assert np.array_equal(with_cache.generate(PROMPTS, 12, sampling=Sampling(0.8), seed=3), drawn)
    assert not np.array_equal(drawn, expected)


def test_half_precision_writes_as_its_float32_twin() -> None:
    expected = Decoder(built("glm-gqa-op20")).generate(PROMPTS, 6)
    for name in ("glm-gqa-op20-fp16", "glm-gqa-op20-kv-fp16"):
        written = Decoder(built(name)).generate(PROMPTS, 6)
        assert (written == expected).mean() > 0.8, name


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(built("glm-gqa-op20-kv"))
    whole = decoder.generate(PROMPTS, 8, sampling=Sampling(), seed=5)
    monkeypatch.setattr(Decoder, "_most_rows", lambda self, length: 2)
    assert np.array_equal(decoder.generate(PROMPTS, 8, sampling=Sampling(), seed=5), whole)
    assert not np.array_equal(decoder.generate(PROMPTS, 8, sampling=Sampling(), seed=6), whole)
    assert len({tuple(row) for row in decoder.generate(PROMPTS[[0, 0, 0]], 8, sampling=Sampling())}) == 3


@pytest.mark.parametrize(("batch", "sequence"), [(1, "s"), (2, "s"), ("batch", 1), (1, 1)])
def test_fixed_sizes(batch: object, sequence: object) -> None:
    """Rows go in batches of a fixed size, the last one filled up; a prompt goes in token by token."""
    prompts = PROMPTS % 16
    expected = Decoder(cached()).generate(prompts, 10)
    assert len(np.unique(expected)) > 2
    assert np.array_equal(Decoder(cached(batch, sequence)).generate(prompts, 10), expected)


def test_a_batch_that_is_declared_free_but_is_not() -> None:
    joins = "e1 = Reshape(e, fixed) " + JOINS.replace("a, e)", "a, e1)")
    text = CACHED.format(b="batch", s="s", joins=joins).replace(
        "<float[16,4] table", "<int64 one, int64[1] one1, int64[3] fixed, float[16,4] table"
    )
    source = model(text, weights={**CONSTANTS, "fixed": np.array([1, -1, 4])})
    prompts = PROMPTS % 16
    assert np.array_equal(Decoder(source).generate(prompts, 6), Decoder(cached()).generate(prompts, 6))


def test_which_output_continues_which_cache_is_seen_in_the_graph() -> None:
    """The outputs are in the other order than the inputs, and all have one shape."""
    caches = decode_roles(cached()).caches
    assert [(cache.input, cache.output, cache.shape) for cache in caches] == [
        ("a", "c", (1, 0, 4)),
        ("b", "d", (1, 0, 4)),
    ]


def test_where_the_graph_does_not_tell_the_order_does() -> None:
    """Behind a product with one an output is no longer the old cache moved and joined."""
    joins = JOINS.replace("c =", "c0 =").replace("d =", "d0 =") + " d = Mul(d0, two) c = Mul(c0, two)"
    text = CACHED.format(b="batch", s="s", joins=joins.replace("Sub(c, d)", "Sub(c0, d0)"))
    text = text.replace("<float[16,4] table", "<int64 one, int64[1] one1, float two, float[16,4] table")
    source = model(text, weights={**CONSTANTS, "two": np.array(1, np.float32)})
    assert [(cache.input, cache.output) for cache in decode_roles(source).caches] == [("a", "d"), ("b", "c")]
    with pytest.raises(UserError, match="with its cache the model computes other scores"):
        Decoder(source)  # here the order is wrong, and does not go unnoticed
    fewer = text.replace(", float[batch,q,4] c)", ")")
    with pytest.raises(UserError, match="cannot tell which output continues the cache 'a'"):
        decode_roles(model(fewer, weights={**CONSTANTS, "two": np.array(1, np.float32)}))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bert-op20", "no output .* of next-token scores"),
        ("vit-op20", "no token input"),
        ("glm-gqa-op20-static", "exactly 5 tokens at once"),
    ],
)
def test_what_cannot_write_says_why(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Decoder(built(name))


def test_a_model_that_sees_the_future_is_refused() -> None:
    text = "g (int64[n,s] t) => (float[n,s,16] y) <float[16,4] table, float[4,16] head> "
    body = "{ e = Gather(table, t) m = ReduceMean<keepdims=1>(e, one) f = Add(e, m) y = MatMul(f, head) }"
    text = text.replace("<float", "<int64[1] one, float", 1) + body
    with pytest.raises(UserError, match="not causal"):
        Decoder(model(text, weights={"one": np.array([1])}))


def test_prompts_must_be_tokens() -> None:
    decoder = Decoder(cached())
    for prompts in (np.zeros((2, 0), np.int64), np.array([[16]]), np.array([[-1]]), np.array([1])):
        with pytest.raises(UserError, match="prompts must be"):
            decoder.generate(prompts, 2)


def test_progress_is_told() -> None:
    told: list[str] = []
    Decoder(cached()).generate(PROMPTS % 16, 3, step=told.append)
    assert told[-1] == "write text, row 1 of 3, token 3 of 3"


FUSED = """
g (int64[n,s] t, int32[n] k, int32 total, float[n,2,p,8] a, float[n,2,p,8] b)
  => (float[n,s,16] y, float[n,2,q,8] c, float[n,2,q,8] d)
<float[16,32] table, float[32,32] wq, float[32,16] wk, float[32,16] wv, float[32,16] head>
{
  e = Gather(table, t) x = MatMul(e, wq) f = MatMul(e, wk) v = MatMul(e, wv)
  o, c, d = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(x, f, v, a, b, k, total)
  r = Add(o, e) y = MatMul(r, head)
}
"""


def test_an_attention_operator_that_counts_tokens() -> None:
    source, prompts = model(FUSED), PROMPTS % 16
    decoder = Decoder(source)
    assert [cache.output for cache in decoder.roles.caches] == ["c", "d"]
    session, text = Session(source), prompts
    for _ in range(8):
        length = text.shape[1]
        empty = np.zeros((3, 2, 0, 8), np.float32)
        counts = {"k": np.full(3, length - 1, np.int32), "total": np.array(length, np.int32)}
        scores = session.run({"t": text, **counts, "a": empty, "b": empty})["y"]
        text = np.concatenate([text, scores[:, -1].argmax(-1)[:, None]], axis=1)
    assert np.array_equal(decoder.generate(prompts, 8), text[:, 4:])
