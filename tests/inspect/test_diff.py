"""What changed between two programs: known changes are found, and nothing else is."""

import jax
import jax.numpy as jnp
import optax
import pytest
from by_hand import DUMPS, compiled, mesh_of_rank
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.inspect import diff

S = jax.ShapeDtypeStruct


def test_diff_of_a_program_with_itself_is_nothing() -> None:
    program = compiled("kinds", mesh_of_rank(2, jax.devices()))
    assert not diff(program, program)
    assert str(diff(program, program)) == "nothing changed"


def test_diff_of_one_reduction_and_one_a_microbatch_names_both() -> None:
    mesh = mesh_of_rank(1, jax.devices())
    found = diff(compiled("once", mesh), compiled("each", mesh))
    assert [(row.executions, row.in_loop) for row in (*found.removed, *found.added)] == [(1, False), (3, True)]
    lines = str(found).splitlines()
    assert lines[0] == "collectives"
    assert lines[1].startswith("  - 1 x all-reduce of 4.2 MB over data: by_hand.py:")
    assert lines[2].startswith("  + 3 x all-reduce of 4.2 MB over data in while x3: by_hand.py:")


def test_diff_of_steps_of_stepc_names_axes_and_memory() -> None:
    def step(k: int) -> sc.Compiled:
        pipeline = (
            sc.update(optax.adam(1e-3)) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(PROBES["over_rows"])
        )
        made = sc.compile(pipeline, mesh=mesh_of(data=8))
        return made.lower(made.init(probe_params()), probe_batch(64)).compile()

    assert not diff(step(4), step(4))
    found = diff(step(1), step(8))
    assert not found.removed and not found.added  # one reduction of the same bytes, whatever k
    assert "temporaries" in [change.name for change in found.changes]


def test_diff_of_a_donation_shows_the_memory_it_saves() -> None:
    vector = S((1000,), jnp.float32)
    kept, donated = (
        jax.jit(lambda x, y: x - y, donate_argnums=given).lower(vector, vector).compile() for given in ((), 0)
    )
    found = diff(kept, donated)
    assert {change.name: (change.before, change.after) for change in found.changes} == {
        "aliased": (0, 4000),
        "total": (12000, 8000),
        "results that reuse the buffer of an argument": (0, 1),
    }
    assert "total    12.0 kB -> 8.0 kB  (-4.0 kB, -33.3%)" in str(found)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_diff_of_texts_compares_what_texts_have(platform: str) -> None:
    once, layers = (next(DUMPS.glob(f"{platform}-{name}-*")).read_text() for name in ("once", "layers"))
    found = diff(once, layers)
    assert [row.executions for row in found.added] == [6]
    assert {change.of for change in found.changes} == {"cost"}


def test_diff_of_an_unknown_number_says_so() -> None:
    def looped(length: int | None) -> jax.stages.Compiled:
        if length is None:
            return (
                jax.jit(lambda w: jax.lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w))
                .lower(S((16, 16), jnp.float32))
                .compile()
            )
        return jax.jit(lambda w: w @ w).lower(S((16, 16), jnp.float32)).compile()

    assert "flops        8,192 -> unknown" in str(diff(looped(1), looped(None)))
