"""Write text with a language model: one token after the other, with the KV cache where the graph has one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from onnx_autoglm.decode_inputs import DecodeInput
from onnx_autoglm.decode_roles import DecodeRoles, decode_roles
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_sizes import fed_inputs
from onnx_autoglm.runtime import Session
from onnx_autoglm.sampling import Sampling, pick
from onnx_autoglm.upcast import needs_upcast, upcast

if TYPE_CHECKING:
    import onnxruntime

Arrays = dict[str, np.ndarray]
Values = dict[str, "onnxruntime.OrtValue"]
Step = Callable[[str], None]

CACHE_BYTES = 1 << 30  # of the caches of all rows that are written at once
TOKENS_AT_ONCE = 4096  # in one run of a model without a cache
# Relative: rounding, also that of activations quantized by their range, which later tokens may widen.
SAME_SCORES = 2e-2
# Operators between the last product and the scores that treat each position alone.
POINTWISE = frozenset({"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"})


class Decoder:
    """A causal language model that writes.

    16-bit graphs compute in float32. Only the scores of the last position are computed.
    """

    def __init__(self, model: ir.Model, *, threads: int | None = None) -> None:
        """Loads the model and tries it.

        Args:
            model: a causal language model; it is only read.
            threads: worker threads; by default ONNX Runtime's own choice.

        Raises:
            UserError: the model has no token input, no next-token scores, fixed sizes, inputs of unknown
                meaning, or is not causal; the message says which.
        """
        ready = upcast(model) if needs_upcast(model) else model.clone()
        self.roles: DecodeRoles = decode_roles(ready)
        self.cached = bool(self.roles.caches)
        self.inputs = [DecodeInput.of(value, self.roles) for value in fed_inputs(ready)]
        self._try_out(ready)
        _only_last(ready, self.roles.scores)
        self._session = Session(ready, optimize=True, threads=threads)
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
        batch, count = draws.shape
        text = prompts.astype(np.int64)
        caches = self.roles.caches
        past, seen = self.empty(batch), 0
        for number in range(count):
            step(f"{number + 1} of {count}")
            fresh = text[:, seen:]
            last, past = self.run(fresh, past, seen)
            seen = text.shape[1] if caches else 0
            if not np.isfinite(last.max(axis=-1)).all():
                raise UserError("the model computes next-token scores that are not finite")
            chosen = pick(last, sampling, draws[:, number], list(text))
            text = np.concatenate([text, chosen[:, None]], axis=1)
        return text[:, prompts.shape[1] :]

    def empty(self, batch: int) -> Values:
        """The caches of rows that have no tokens yet."""
        from onnxruntime import OrtValue

        arrays = {c.input: np.zeros(c.empty(batch), c.dtype.numpy()) for c in self.roles.caches}
        return {name: OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}

    def run(
        self, tokens: np.ndarray, past: Values, seen: int, padding: np.ndarray | None = None
    ) -> tuple[np.ndarray, Values]:
        """Reads `[batch, new]` tokens. Caches stay values of ONNX Runtime and are not copied.

        Args:
            tokens: the new tokens; without a cache all of the text.
            past: the caches, by input.
            seen: tokens in the caches.
            padding: how many of them, the first ones of each row, are none, `[batch]`.

        Returns:
            The scores after the last token, float32 `[batch, vocabulary]`, and the caches with the new tokens.

        Raises:
            UserError: the model does not run.
        """
        caches = self.roles.caches
        outputs = [self.roles.scores, *(cache.output for cache in caches)]
        # A graph that takes one token at a time reads a prompt so.
        width = 1 if self.roles.inputs.length == 1 else tokens.shape[1]
        for start in range(0, tokens.shape[1], width):
            feeds = self.feeds(tokens[:, start : start + width], seen + start, padding)
            scores, *grown = self._session.run_values({**feeds, **past}, outputs)
            past = {cache.input: value for cache, value in zip(caches, grown, strict=True)}
        return scores.numpy()[:, -1].astype(np.float32), past

    def feeds(self, tokens: np.ndarray, past: int, padding: np.ndarray | None = None) -> Arrays:
        """All inputs but the caches, for `[batch, new]` tokens after `past` others, as in `run`."""
        return {item.name: item.array(tokens, past, padding) for item in self.inputs if item.kind != "cache"}


@dataclasses.dataclass(frozen=True)
class _Told:
    """Progress with the row that it is about."""

    step: Step
    row: int
    rows: int

    def __call__(self, text: str) -> None:
        self.step(f"write text, row {self.row + 1} of {self.rows}, token {text}")


def _differ(expected: np.ndarray, actual: np.ndarray) -> bool:
    return bool(np.abs(expected - actual).max(initial=0) > SAME_SCORES * np.abs(expected).max(initial=0))


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
