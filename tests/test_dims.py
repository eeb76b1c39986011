"""Dimension expressions: the six rules of unification, cuts, and sizes that are kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_autoglm.axes.dims import (
    UNIT,
    Clash,
    Dim,
    Sum,
    cut,
    fresh,
    join,
    leaves,
    parts_of,
    product,
    resolve,
    size_of,
    split_inner,
    unify,
)
from onnx_autoglm.axes.size import mul, symbol


def shape(dim: Dim) -> str:
    """An expression as text: `2*(3+4)`."""
    factors = []
    for atom in resolve(dim):
        if isinstance(atom.bound, Sum):
            factors.append("(" + "+".join(shape(part) for part in parts_of(atom)) + ")")
        else:
            factors.append(str(atom.size))
    return "*".join(factors) or "1"


# --- rule 1: the same factor on both sides


def test_the_same_factor_is_dropped() -> None:
    shared, a, b = fresh(8), fresh(16), fresh(16)
    unify(shared + a, shared + b)
    assert resolve(a) == resolve(b)
    assert shape(shared) == "8"


# --- rule 2: factors of equal size


def test_factors_of_equal_size_are_identified() -> None:
    a, b = fresh(8), fresh(8)
    unify(a, b)
    assert resolve(a) == resolve(b)


def test_an_atom_becomes_the_sum_of_its_size() -> None:
    atom, total = fresh(24), join([fresh(16), fresh(8)])
    unify(atom, total)
    assert shape(atom) == "(16+8)"
    assert leaves(atom) == leaves(total)


def test_two_sums_are_matched_part_by_part_cutting_the_longer() -> None:
    a, b = join([fresh(10), fresh(6)]), join([fresh(4), fresh(12)])
    unify(a, b)
    assert shape(a) == shape(b) == "(4+6+6)"
    assert leaves(a) == leaves(b)


def test_sums_of_symbolic_parts_in_another_order_clash() -> None:
    past, sequence = symbol("past"), symbol("sequence")
    with pytest.raises(Clash, match="parts of size past and sequence cannot be compared"):
        unify(join([fresh(past), fresh(sequence)]), join([fresh(sequence), fresh(past)]))


# --- rule 3: a larger atom against a smaller factor


def test_a_larger_atom_is_split() -> None:
    flat, heads, channels = fresh(128), fresh(8), fresh(16)
    unify(flat, heads + channels)
    assert resolve(flat) == resolve(heads + channels)


def test_views_that_disagree_split_each_other() -> None:
    flat = fresh(128)
    unify(flat, fresh(8) + fresh(16))
    unify(flat, fresh(2) + fresh(64))
    assert shape(flat) == "2*4*16"


def test_boundaries_that_do_not_nest_clash() -> None:
    flat = fresh(12)
    unify(flat, fresh(4) + fresh(3))
    with pytest.raises(Clash, match="factors of size 4 and 3 do not nest"):
        unify(flat, fresh(3) + fresh(4))


def test_outer_factors_that_agree_stay_identified_after_a_clash() -> None:
    outer, same = fresh(5), fresh(5)
    with pytest.raises(Clash):
        unify(outer + fresh(4) + fresh(3), same + fresh(3) + fresh(4))
    assert resolve(outer) == resolve(same)


def test_different_sizes_clash() -> None:
    with pytest.raises(Clash, match="sizes 8 and 16 differ"):
        unify(fresh(8), fresh(8) + fresh(2))
    with pytest.raises(Clash, match="sizes 1 and 8 differ"):
        unify(UNIT, fresh(8))


# --- rule 4: a larger sum against a smaller factor


def test_a_sum_of_equal_parts_is_a_product() -> None:
    """`[q|k|v]` read as `3*heads*channels`: one head lives in all three parts."""
    parts = [fresh(128) for _ in range(3)]
    three, heads, channels = fresh(3), fresh(8), fresh(16)
    unify(join(parts), three + heads + channels)
    assert [resolve(part) for part in parts] == [resolve(heads + channels)] * 3
    assert shape(three) == "(1+1+1)"


def test_multi_query_parts_share_the_channels_of_a_head() -> None:
    query, key, value = fresh(128), fresh(32), fresh(32)
    heads, channels = fresh(12), fresh(16)
    unify(join([query, key, value]), heads + channels)
    assert shape(heads) == "(8+2+2)"
    assert shape(query) == "8*16"
    assert shape(key) == "2*16"
    assert resolve(key)[-1:] == resolve(query)[-1:] == resolve(channels)


def test_parts_that_are_no_multiples_clash() -> None:
    with pytest.raises(Clash, match=r"parts 112\+24 are not all multiples of 34"):
        unify(join([fresh(112), fresh(24)]), fresh(4) + fresh(34))


# --- rule 5: cutting


def test_cutting_an_atom_makes_it_a_sum() -> None:
    channels = fresh(16)
    rotated, passed = cut(channels, 8)
    assert shape(channels) == "(8+8)"
    assert leaves(channels) == [*rotated, *passed]


def test_cutting_a_product_cuts_its_outer_factor() -> None:
    heads, channels = fresh(12), fresh(16)
    first, rest = cut(heads + channels, 128)
    assert (shape(heads), shape(first), shape(rest)) == ("(8+4)", "8*16", "4*16")


def test_a_cut_inside_an_inner_factor_clashes() -> None:
    with pytest.raises(Clash, match="a cut at 120 falls inside an inner axis of size 16"):
        cut(fresh(12) + fresh(16), 120)


def test_cutting_a_sum_cuts_the_part_that_holds_the_place() -> None:
    total = join([fresh(6), fresh(10), fresh(4)])
    first, rest = cut(total, 9)
    assert shape(first) == "(6+3)"
    assert shape(rest) == "(7+4)"
    assert shape(total) == "(6+3+7+4)"


def test_cuts_at_the_ends_and_at_boundaries_change_nothing() -> None:
    a, b = fresh(6), fresh(10)
    total = join([a, b])
    assert cut(total, 6) == (a, b)
    assert size_of(cut(total, 0)[0]) == 0 and cut(total, 0)[1] == total
    assert cut(total, 16)[0] == total
    assert shape(total) == "(6+10)"


def test_a_symbolic_axis_is_not_cut_at_a_number() -> None:
    with pytest.raises(Clash, match="an axis of size sequence cannot be cut at 4"):
        cut(fresh(symbol("sequence")), 4)
    with pytest.raises(Clash, match="an axis of size 1 cannot be cut"):
        cut(UNIT, 4)


def test_a_sum_under_a_product_splits_by_distribution() -> None:
    """`heads*(q+k+v)`: the interleaved projection of ChatGLM-6B."""
    heads, inner = fresh(4), fresh(24)
    flat = fresh(96)
    unify(flat, heads + inner)
    query, rest = cut(inner, 8)
    key, value = cut(rest, 8)
    assert shape(flat) == "4*(8+8+8)"
    assert leaves(flat) == leaves(heads + query + key + value)


def test_a_part_of_a_product_over_a_sum_is_spliced_in() -> None:
    total = join([join([fresh(2), fresh(3)]) + fresh(4), fresh(8)])
    assert shape(total) == "(2*4+3*4+8)"


# --- splitting off an inner factor: suffixes and -1


def test_a_suffix_is_split_off() -> None:
    flat = fresh(128)
    outer, inner = split_inner(flat, 16)
    assert (shape(outer), shape(inner)) == ("8", "16")
    assert resolve(flat) == outer + inner


def test_a_suffix_may_span_factors_and_split_one() -> None:
    dim = fresh(6) + fresh(8) + fresh(2)
    outer, inner = split_inner(dim, 4)
    assert (shape(outer), shape(inner)) == ("6*4", "2*2")


def test_a_suffix_of_a_symbolic_product() -> None:
    batch = fresh(symbol("batch"))
    outer, inner = split_inner(batch + fresh(128), 16)
    assert outer == batch + resolve(outer)[1:]
    assert (shape(outer), shape(inner)) == ("batch*8", "16")


def test_a_suffix_that_does_not_divide_clashes() -> None:
    with pytest.raises(Clash, match="no inner factor of size 24"):
        split_inner(fresh(128), 24)
    with pytest.raises(Clash, match="no inner factor of size 256"):
        split_inner(fresh(128), 256)


# --- sizes that must not be mistaken for each other


def test_a_symbol_meets_only_itself() -> None:
    batch, sequence = fresh(symbol("batch")), fresh(symbol("sequence"))
    with pytest.raises(Clash, match="batch and sequence do not nest"):
        unify(batch, sequence)
    with pytest.raises(Clash):
        unify(batch, fresh(8))


def test_a_merged_symbolic_axis_is_split_again() -> None:
    batch, heads = fresh(symbol("batch")), fresh(8)
    merged = fresh(mul(symbol("batch"), 8))
    unify(merged, batch + heads)
    assert resolve(merged) == resolve(batch + heads)


def test_a_transposed_view_of_the_same_factors_is_a_power() -> None:
    a, b = fresh(2), fresh(4)
    unify(a + b, b + a)
    assert resolve(b) == resolve(a + a)


# --- properties


@st.composite
def two_views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two factorisations of one size that have a common refinement."""
    factors = draw(st.lists(st.integers(2, 5), min_size=1, max_size=6))

    def grouped() -> list[int]:
        ends = sorted({*draw(st.lists(st.integers(1, len(factors)), max_size=4)), len(factors)})
        starts = [0, *ends[:-1]]
        return [math.prod(factors[start:end]) for start, end in zip(starts, ends, strict=True)]

    return grouped(), grouped()


@given(two_views())
def test_nested_views_unify_and_keep_their_sizes(views: tuple[list[int], list[int]]) -> None:
    left, right = ([fresh(size) for size in view] for view in views)
    unify(product(left), product(right))
    assert resolve(product(left)) == resolve(product(right))
    for dims, view in ((left, views[0]), (right, views[1])):
        for dim, size in zip(dims, view, strict=True):
            assert size_of(resolve(dim)) == size_of(dim) == size


@given(st.data())
def test_random_equations_keep_the_size_of_every_expression(data: st.DataObject) -> None:
    """Splits, cuts and unifications in any order, those that clash included, never change a size."""
    dims = [
        fresh(size)
        for size in data.draw(st.lists(st.sampled_from([4, 6, 8, 12, 24]), min_size=2, max_size=5))
    ]
    before = [size_of(dim) for dim in dims]
    for _ in range(data.draw(st.integers(1, 8))):
        dim = data.draw(st.sampled_from(dims))
        size = size_of(dim)
        assert isinstance(size, int)
        try:
            step = data.draw(st.sampled_from(["split", "cut", "unify"]))
            if step == "split":
                split_inner(dim, data.draw(st.sampled_from([2, 3, 4])))
            elif step == "cut":
                cut(dim, data.draw(st.integers(0, size)))
            else:
                unify(dim, data.draw(st.sampled_from([d for d in dims if size_of(d) == size])))
        except Clash:
            pass
        for other, expected in zip(dims, before, strict=True):
            assert size_of(resolve(other)) == expected
            assert sum_of_parts_is_consistent(other)


def sum_of_parts_is_consistent(dim: Dim) -> bool:
    for atom in resolve(dim):
        if isinstance(atom.bound, Sum):
            sizes = [size_of(part) for part in parts_of(atom)]
            if sum(int(size) for size in sizes) != atom.size:  # type: ignore[arg-type]
                return False
            if not all(sum_of_parts_is_consistent(part) for part in parts_of(atom)):
                return False
    return True


@given(two_views(), st.data())
def test_a_successful_cut_partitions_the_axis(
    views: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    dim = product(fresh(size) for size in views[0])
    total = math.prod(views[0])
    at = data.draw(st.integers(0, total))
    try:
        first, rest = cut(dim, at)
    except Clash:
        assert at % math.prod(views[0][1:]) != 0, "a cut between rows of the outer factor is always possible"
        return
    assert (size_of(first), size_of(rest)) == (at, total - at)
