"""Sizes: integers and polynomials over symbols."""

from hypothesis import given
from hypothesis import strategies as st

from onnx_autoglm.axes.size import Size, add, exact_div, is_larger, mul, parse, sub, symbol

B, S = symbol("batch"), symbol("sequence")

numbers = st.integers(-50, 50)
sizes = st.recursive(
    numbers | st.sampled_from([B, S]),
    lambda inner: st.tuples(st.sampled_from([add, sub, mul]), inner, inner).map(lambda t: t[0](t[1], t[2])),
    max_leaves=6,
)


def value(size: Size, batch: int, sequence: int) -> int:
    if isinstance(size, int):
        return size
    total = 0
    for names, factor in size.terms:
        for name in names:
            factor *= {"batch": batch, "sequence": sequence}[name]
        total += factor
    return total


@given(sizes, sizes, st.integers(2, 9), st.integers(2, 9))
def test_arithmetic_is_that_of_the_numbers_behind_the_symbols(
    a: Size, b: Size, batch: int, sequence: int
) -> None:
    x, y = value(a, batch, sequence), value(b, batch, sequence)
    assert value(add(a, b), batch, sequence) == x + y
    assert value(sub(a, b), batch, sequence) == x - y
    assert value(mul(a, b), batch, sequence) == x * y


@given(sizes, sizes)
def test_equal_polynomials_are_equal_objects(a: Size, b: Size) -> None:
    assert add(a, b) == add(b, a)
    assert mul(a, b) == mul(b, a)
    assert sub(a, a) == 0
    assert sub(add(a, b), b) == a


@given(
    sizes, st.integers(1, 9) | st.sampled_from([B, S, mul(2, B), mul(B, S), add(B, S), add(mul(3, B), -2)])
)
def test_division_undoes_multiplication(a: Size, b: Size) -> None:
    assert exact_div(mul(a, b), b) == a


def test_division_is_exact_or_refused() -> None:
    assert exact_div(128, 16) == 8
    assert exact_div(128, 3) is None
    assert exact_div(128, 0) is None
    assert exact_div(mul(8, B), 16) is None
    assert exact_div(mul(8, B), S) is None
    assert exact_div(add(B, 1), B) is None
    assert exact_div(add(B, S), add(B, S)) == 1
    assert exact_div(mul(add(B, S), B), B) == add(B, S)
    assert exact_div(8, B) is None
    assert exact_div(mul(add(B, S), 8), add(B, S)) == 8
    assert exact_div(mul(add(B, S), sub(B, S)), add(B, S)) == sub(B, S)
    assert exact_div(add(mul(B, B), S), add(B, S)) is None
    assert exact_div(B, 0) is None


def test_only_a_multiple_is_larger() -> None:
    assert is_larger(8, 4)
    assert not is_larger(4, 8)
    assert not is_larger(4, 4)
    assert is_larger(mul(8, B), B)
    assert is_larger(mul(8, B), 4)
    assert not is_larger(B, mul(8, B))
    assert not is_larger(B, S)
    assert not is_larger(B, 4)


def test_declared_dimensions_are_read_as_polynomials() -> None:
    past = symbol("past")
    assert parse("past + sequence") == add(past, S)
    assert parse("2*batch*(past - 1)") == mul(mul(2, B), sub(past, 1))
    assert parse("12") == 12
    assert parse("batch - batch") == 0


def test_anything_else_is_one_opaque_symbol() -> None:
    for text in ("past.1", "batch // 2", "", "f(x)", "2 +", "batch**2"):
        assert parse(text) == symbol(text)


def test_text() -> None:
    assert str(add(mul(8, B), 1)) == "1 + 8*batch"
    assert str(mul(B, S)) == "batch*sequence"
