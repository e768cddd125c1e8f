"""The search for a number of parts: what it finds, how few programs it compiles, and the estimate that guides it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepc._compiler.search import CandidatePrograms, SearchResult, SearchTrial, find_smallest_fit, live_bytes
from stepc.inspect import Memory

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)
STAYS = 1000


def programs_of(temporary: Mapping[int, int | None], live: Mapping[int, int]) -> tuple[CandidatePrograms, list[int]]:
    """Programs that need what they are said to need, and the list of those that get compiled."""
    compiled: list[int] = []

    def compile_one(count: int) -> Memory | None:
        compiled.append(count)
        needs = temporary[count]
        return None if needs is None else Memory(STAYS, 0, 0, needs, 0)

    return CandidatePrograms(tuple(temporary), STAYS, live.__getitem__, compile_one), compiled


def halving(ratio: float = 1.0) -> dict[int, int]:
    return {count: round(ratio * 48_000 / count) for count in COUNTS}


@given(
    most=st.integers(1_500, 60_000),
    ratio=st.sampled_from([0.2, 0.5, 1.0, 2.0]),
    errors=st.lists(st.floats(0.95, 1.05), min_size=len(COUNTS), max_size=len(COUNTS)),
)
def test_search_finds_the_least_that_fits_whatever_the_ratio(most: int, ratio: float, errors: list[float]) -> None:
    temporary = {n: round(ratio * needs * error) for (n, needs), error in zip(halving().items(), errors, strict=True)}
    programs, compiled = programs_of(temporary, halving())
    tried, chosen = find_smallest_fit(programs, most)
    fitting = [count for count in COUNTS if STAYS + temporary[count] <= most]
    assert chosen == min(fitting, default=None)
    assert sorted(compiled) == sorted(set(compiled)), "nothing is compiled twice"
    assert [one.parts for one in tried if one.outcome != "too large by its estimate"] == compiled


@pytest.mark.parametrize("most", range(2_000, 50_000, 4_000))
def test_search_by_a_right_estimate_compiles_at_most_two(most: int) -> None:
    programs, compiled = programs_of(halving(), halving())
    find_smallest_fit(programs, most)
    assert len(compiled) <= 2


def test_search_mean_of_compilations_is_small_though_the_ratio_is_unknown() -> None:
    total = 0
    for most in range(2_000, 50_000, 1_000):
        programs, compiled = programs_of(halving(0.45), halving())
        assert find_smallest_fit(programs, most)[1] is not None
        total += len(compiled)
    assert total / 48 < 2.5  # bisecting ten numbers takes 3.3


def test_search_one_part_without_an_accumulator_is_not_passed_over() -> None:
    needs = {1: 9_000, 2: 12_000, 4: 7_000}
    programs, compiled = programs_of(needs, {1: 9_500, 2: 12_000, 4: 6_000})
    assert find_smallest_fit(programs, STAYS + 9_100)[1] == 1
    assert 1 in compiled


def test_search_program_that_the_compiler_refuses_does_not_fit() -> None:
    programs, _ = programs_of({1: None, 2: None, 4: 10_000, 8: 5_000}, {1: 4_000, 2: 3_000, 4: 2_000, 8: 1_000})
    tried, chosen = find_smallest_fit(programs, 12_000)
    assert chosen == 4
    assert [(one.parts, one.compiled) for one in tried if one.outcome == "refused by the compiler"] == [
        (1, None),
        (2, None),
    ]


def test_search_where_nothing_fits_tries_all_that_might() -> None:
    programs, compiled = programs_of({1: 9_000, 2: 5_000, 4: 4_900, 8: 5_100}, {1: 9_000, 2: 5_000, 4: 5_000, 8: 5_000})
    assert find_smallest_fit(programs, STAYS + 4_950)[1] == 4
    assert find_smallest_fit(programs, STAYS + 4_000)[1] is None
    compiled.clear()
    assert find_smallest_fit(programs, STAYS + 1_000)[1] is None
    assert compiled == [8], "what is far from fitting is not compiled"


def test_search_prints_as_a_table() -> None:
    tried = (
        SearchTrial(8, 6_900_000, 6_740_757, "fits"),
        SearchTrial(2, 26_000_000, None, "refused by the compiler"),
        SearchTrial(4, 13_000_000, None, "too large by its estimate"),
    )
    found = SearchResult('accumulate(memory="7MB")', "accumulate(8)", 7_000_000, (1, 2, 4, 8), tried, 8)
    assert str(found) == (
        'accumulate(memory="7MB") became accumulate(8)\n'
        "parts of a device's rows: 1, 2, 4, 8; 2 compilations\n"
        "k  estimated  compiled     at most 7,000,000 B\n"
        "2  26.0 MB    -            refused by the compiler\n"
        "4  13.0 MB    -            too large by its estimate\n"
        "8  6.9 MB     6,740,757 B  fits, chosen"
    )


def test_live_bytes_are_those_of_values_alive_together() -> None:
    def chain(x: jax.Array) -> jax.Array:
        for _ in range(10):
            x = jnp.sin(x)
        return x

    def kept(x: jax.Array) -> jax.Array:
        return sum(jnp.sin(x + n) for n in range(4)) * 0 + jnp.cos(x)  # pyright: ignore[reportReturnType]

    shape = jax.ShapeDtypeStruct((256,), jnp.float32)
    assert live_bytes(jax.make_jaxpr(chain)(shape)) == 2 * 1024  # one before, one after; the result is not counted
    assert live_bytes(jax.make_jaxpr(kept)(shape)) == 3 * 1024


@pytest.mark.parametrize("length", [2, 100])
def test_live_bytes_of_a_loop_count_one_turn(length: int) -> None:
    def turned(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(jnp.cos(c)), None), x, length=length)[0].sum()

    assert live_bytes(jax.make_jaxpr(turned)(jax.ShapeDtypeStruct((256,), jnp.float32))) == 3 * 1024


def test_live_bytes_of_a_renamed_value_are_counted_once() -> None:
    shape = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    assert live_bytes(jax.make_jaxpr(lambda x: jnp.sin(jnp.sin(x)).reshape(-1).sum())(shape)) == 2 * 1024
