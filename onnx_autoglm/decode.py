"""Write text with a language model: one token after the other, with the KV cache where the graph has one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.decode_roles import DecodeRoles, decode_roles
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import LENGTHS, uses_of
from onnx_autoglm.feed_sizes import fed_inputs
from onnx_autoglm.runtime import Session
from onnx_autoglm.upcast import needs_upcast, upcast

if TYPE_CHECKING:
    import onnxruntime

Arrays = dict[str, np.ndarray]
Step = Callable[[str], None]

CACHE_BYTES = 1 << 30  # of the caches of all rows that are written at once
TOKENS_AT_ONCE = 4096  # in one run of a model without a cache
# Relative: rounding, also that of activations quantized by their range, which later tokens may widen.
SAME_SCORES = 2e-2
# Operators between the last product and the scores that treat each position alone.
POINTWISE = frozenset({"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"})


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: scores over `temperature`, then the `top_k` best ones (0: all), then the
    fewest that have `top_p` of the probability."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(
                f"{self}: temperature and top_p must be above 0 (top_p at most 1), top_k 0 or more"
            )


class Decoder:
    """A causal language model that writes.

    16-bit graphs compute in float32. Only the scores of the last position are computed.
    """

    def __init__(self, model: ir.Model) -> None:
        """Loads the model and tries it.

        Raises:
            UserError: the model has no token input, no next-token scores, fixed sizes, inputs of unknown
                meaning, or is not causal; the message says which.
        """
        ready = upcast(model) if needs_upcast(model) else model.clone()
        self.roles: DecodeRoles = decode_roles(ready)
        self.cached = bool(self.roles.caches)
        self._inputs = [_Input.of(value, self.roles) for value in fed_inputs(ready)]
        self._try_out(ready)
        _only_last(ready, self.roles.scores)
        self._session = Session(ready, optimize=True)
        self._rows: int | None = self.roles.inputs.batch

    def _try_out(self, model: ir.Model) -> None:
        """Raises UserError if a later token changes the scores of an earlier one, as in a model that fills gaps, or if
        the scores differ token by token, so that caches or positions are not what they seem."""
        if self.roles.inputs.length == 1:
            return
        session, caches, scores = Session(model), self.roles.caches, self.roles.scores
        a, b, c, d = (self.vocabulary * share // 5 for share in range(1, 5))
        batch = self.roles.inputs.batch or 1
        empty: Arrays = {cache.input: np.zeros(cache.empty(batch), cache.dtype.numpy()) for cache in caches}
        first, second = (
            session.run({**self.feeds(np.tile([row], (batch, 1)), 0), **empty}, [scores])[scores]
            for row in ([a, b, c], [a, b, d])
        )
        if _differ(first[:, :-1], second[:, :-1]):
            raise UserError("the model is not causal: a token changes the scores of those before it")
        if not caches:
            return
        past, run = empty, {scores: first}
        for seen, token in enumerate((a, b, c)):
            feeds = {**self.feeds(np.full((batch, 1), token), seen), **past}
            run = session.run(feeds, [scores, *(cache.output for cache in caches)])
            past = {cache.input: run[cache.output] for cache in caches}
        if _differ(first[:, -1], run[scores][:, -1]):
            raise UserError(
                "with its cache the model computes other scores than without: an input is not understood"
            )

    @property
    def vocabulary(self) -> int:
        return self.roles.inputs.vocabulary

    def generate(
        self,
        prompts: np.ndarray,
        tokens: int,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
        step: Step = lambda _: None,
    ) -> np.ndarray:
        """Continues each prompt.

        Args:
            prompts: int64 `[batch, length]`, at least one token each.
            tokens: how many to write.
            sampling: how to draw; None takes the token of the highest score.
            seed: each row draws from a stream of its own, which `seed` and its index start.
            step: told how far it is.

        Returns:
            int64 `[batch, tokens]`.

        Raises:
            UserError: prompts without tokens or beyond the vocabulary, or the model does not run.
        """
        if prompts.ndim != 2 or not prompts.size or prompts.min() < 0 or prompts.max() >= self.vocabulary:
            raise UserError(
                f"prompts must be [batch, length] tokens below {self.vocabulary}, at least one each"
            )
        # One number per row and token, drawn beforehand: no row depends on how rows are batched.
        draws = np.stack([np.random.default_rng((seed, row)).random(tokens) for row in range(len(prompts))])
        if self._rows is None and len(prompts) > 1:
            self._rows = self._batch_that_runs(prompts)
        rows = self._rows or min(len(prompts), self._most_rows(prompts.shape[1] + tokens))
        written = []
        for start in range(0, len(prompts), rows):
            some, drawn = prompts[start : start + rows], draws[start : start + rows]
            fill = rows - len(some)  # the last batch of a fixed size is filled up with copies
            some, drawn = (
                np.pad(some, ((0, fill), (0, 0)), "edge"),
                np.pad(drawn, ((0, fill), (0, 0)), "edge"),
            )
            written.append(self._write(some, drawn, sampling, _Told(step, start, len(prompts))))
        return np.concatenate(written)[: len(prompts)]

    def _most_rows(self, length: int) -> int:
        """How many rows of this length memory should hold at once."""
        sizes = [
            math.prod(length if size == 0 else size for size in cache.shape) * cache.dtype.itemsize
            for cache in self.roles.caches
        ]
        return max(1, int(CACHE_BYTES // sum(sizes)) if sizes else TOKENS_AT_ONCE // length)

    def _batch_that_runs(self, prompts: np.ndarray) -> int | None:
        """1 if the graph declares any batch but runs only at one; some exporters fix it inside."""
        try:
            self._write(prompts[:2, :1], np.zeros((2, 2)), None, lambda _: None)
        except UserError:
            return 1
        return None

    def _write(
        self, prompts: np.ndarray, draws: np.ndarray, sampling: Sampling | None, step: Step
    ) -> np.ndarray:
        """Continues one batch: `draws` is `[batch, tokens]`."""
        import onnxruntime

        batch, count = draws.shape
        text = prompts.astype(np.int64)
        caches = self.roles.caches
        past: dict[str, onnxruntime.OrtValue] = {}
        for cache in caches:
            empty = np.zeros(cache.empty(batch), cache.dtype.numpy())
            past[cache.input] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        seen = 0
        outputs = [self.roles.scores, *(cache.output for cache in caches)]
        for number in range(count):
            step(f"{number + 1} of {count}")
            fresh = text[:, seen:]
            # A graph that takes one token at a time reads the prompt so.
            width = 1 if self.roles.inputs.length == 1 else fresh.shape[1]
            for start in range(0, fresh.shape[1], width):
                feeds = self.feeds(fresh[:, start : start + width], seen + start)
                scores, *grown = self._session.run_values({**feeds, **past}, outputs)
                past = {cache.input: value for cache, value in zip(caches, grown, strict=True)}
            seen = text.shape[1] if caches else 0
            last = scores.numpy()[:, -1].astype(np.float32)
            if not np.isfinite(last.max(axis=-1)).all():
                raise UserError("the model computes next-token scores that are not finite")
            text = np.concatenate([text, pick(last, sampling, draws[:, number])[:, None]], axis=1)
        return text[:, prompts.shape[1] :]

    def feeds(self, tokens: np.ndarray, past: int) -> Arrays:
        """All inputs but the caches, for `[batch, new]` tokens after `past` others."""
        return {item.name: item.array(tokens, past) for item in self._inputs if item.kind != "cache"}


@dataclasses.dataclass(frozen=True)
class _Told:
    """Progress with the row that it is about."""

    step: Step
    row: int
    rows: int

    def __call__(self, text: str) -> None:
        self.step(f"write text, row {self.row + 1} of {self.rows}, token {text}")


@dataclasses.dataclass(frozen=True)
class _Input:
    """One graph input: what it is, its type, and its declared shape."""

    name: str
    kind: str
    dtype: np.dtype
    rank: int
    inner: tuple[int, ...]  # its axes between the first and the last
    own_length: bool  # a mask over the new tokens alone
    length: tuple[bool, int] | None  # a count of tokens: whether past and new count, and what is added

    @classmethod
    def of(cls, value: ir.Value, roles: DecodeRoles) -> _Input:
        assert value.shape is not None and value.dtype is not None
        kinds = {roles.inputs.tokens: "tokens", **dict.fromkeys(roles.inputs.positions, "positions")}
        kinds |= {cache.input: "cache" for cache in roles.caches}
        inner = tuple(dim if isinstance(dim, int) else 1 for dim in value.shape[1:-1])
        last = value.shape[-1] if len(value.shape) else None
        own = isinstance(last, ir.SymbolicDim) and last.value == roles.inputs.sequence_symbol
        lengths = [LENGTHS[use.key] for use in uses_of(value) if use.key in LENGTHS]
        name = value.name or ""
        return cls(
            name,
            kinds.get(name, "mask"),
            value.dtype.numpy(),
            len(value.shape),
            inner,
            own,
            lengths[0] if lengths else None,
        )

    def array(self, tokens: np.ndarray, past: int) -> np.ndarray:
        batch, new = tokens.shape
        if self.kind == "tokens":
            return np.ascontiguousarray(tokens, self.dtype)
        if self.kind == "positions":
            shape = (new,) if self.rank == 1 else (batch, *self.inner, new)
            return np.ascontiguousarray(np.broadcast_to(np.arange(past, past + new), shape), self.dtype)
        if self.length is not None:
            total, shift = self.length
            return np.full((batch,) * self.rank, (past + new if total else past) + shift, self.dtype)
        return np.ones((batch, new if self.own_length else past + new)[: self.rank], self.dtype)


def _differ(expected: np.ndarray, actual: np.ndarray) -> bool:
    return bool(np.abs(expected - actual).max(initial=0) > SAME_SCORES * np.abs(expected).max(initial=0))


def pick(scores: np.ndarray, sampling: Sampling | None, draws: np.ndarray) -> np.ndarray:
    """The next token of each row, int64 `[batch]`: from float32 scores `[batch, vocabulary]` and one uniform number
    per row."""
    if sampling is None:
        return np.asarray(scores.argmax(axis=-1), dtype=np.int64)
    scaled = scores / np.float32(sampling.temperature)
    if 0 < sampling.top_k < scaled.shape[-1]:
        least = np.partition(scaled, -sampling.top_k, axis=-1)[:, -sampling.top_k, None]
        scaled = np.where(scaled >= least, scaled, -np.inf)
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    if sampling.top_p < 1:
        weights = _most_likely(weights, sampling.top_p)
    summed = weights.cumsum(axis=-1, dtype=np.float64)
    # The first token whose sum is above the draw; a token of weight zero never is the first.
    chosen = (summed <= draws[:, None] * summed[:, -1:]).sum(axis=-1)
    return np.asarray(np.minimum(chosen, scores.shape[-1] - 1), dtype=np.int64)


def _most_likely(weights: np.ndarray, share: float) -> np.ndarray:
    """The weights with zeros outside the fewest that together have `share` of the sum."""
    order = np.argsort(-weights, axis=-1, kind="stable")
    ranked = np.take_along_axis(weights, order, axis=-1)
    before = ranked.cumsum(axis=-1, dtype=np.float64) - ranked
    ranked[before >= share * ranked.sum(axis=-1, keepdims=True, dtype=np.float64)] = 0
    result = np.zeros_like(weights)
    np.put_along_axis(result, order, ranked, axis=-1)
    return result


def _only_last(model: ir.Model, scores: str) -> None:
    """Cuts the graph so that the product that makes the scores reads the last position only.

    The scores of all positions are by far the largest array of a language model, and decoding needs one.
    """
    (output,) = [value for value in model.graph.outputs if value.name == scores]
    path = [output]
    node = output.producer()
    while node is not None and node.domain == "" and node.op_type in POINTWISE:
        wide = [v for v in node.inputs if v is not None and v.shape is not None and len(v.shape) == 3]
        if len(wide) != 1:
            return
        path += wide
        node = wide[0].producer()
    if node is None or node.domain != "" or node.op_type != "MatMul":
        return
    hidden, weight = node.inputs
    if hidden is None or weight is None or hidden.shape is None or weight.shape is None:
        return
    if len(hidden.shape) != 3 or len(weight.shape) != 2:
        return
    if any(len(value.uses()) != 1 or value.is_graph_output() for value in path[1:]) or output.uses():
        return
    for value in path:
        assert value.shape is not None
        value.shape = ir.Shape([value.shape[0], 1, value.shape[2]])
    last = ir.Value(name="last position", const_value=ir.tensor(np.array([-1]), name="last position"))
    model.graph.register_initializer(last)
    gather = ir.node("Gather", [hidden, last], {"axis": 1})
    gather.outputs[0].name = "hidden of the last position"
    model.graph.insert_before(node, gather)
    node.replace_input_with(0, gather.outputs[0])
