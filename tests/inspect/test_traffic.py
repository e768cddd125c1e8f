"""Bytes moved, for programs where they can be worked out by hand or XLA counts them rightly itself."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from by_hand import BYTES, DUMPS
from jax import lax

from stepc.inspect import cost
from stepc.inspect.cost import traffic
from stepc.inspect.hlo import parse

S = jax.ShapeDtypeStruct


def compiled(f: Callable[..., object], *shapes: tuple[int, ...]) -> jax.stages.Compiled:
    return jax.jit(f).lower(*(S(shape, jnp.float32) for shape in shapes)).compile()


def grad_of_layers(w: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    return jax.grad(lambda w: jnp.mean((jnp.tanh(x @ w) @ v) ** 2))(w)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda x, y: jnp.tanh(x) * y + 1, [(1000,), (1000,)]),
        (lambda x, y: x @ y, [(64, 32), (32, 16)]),
        (grad_of_layers, [(256, 512), (512, 128), (64, 256)]),
    ],
)
def test_traffic_without_loops_is_what_xla_counts(f: Callable[..., object], shapes: list[tuple[int, ...]]) -> None:
    program = compiled(f, *shapes)
    reported = program.cost_analysis()
    assert reported is not None
    assert cost(program).bytes == reported["bytes accessed"]


@pytest.mark.parametrize("length", [1, 4, 32])
def test_traffic_of_a_loop_grows_with_its_trip_count(length: int) -> None:
    def looped(x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, length=length)[0]

    once, more = (traffic(parse(compiled(f, (64, 64)).as_text() or "")) for f in (lambda x: jnp.sin(x @ x), looped))
    assert once is not None and more is not None
    each = 64 * 64 * 4
    assert 4 * each <= once  # the product reads an array and writes one, the sine reads it and writes one
    # And the copies of what is carried, and the counter.
    assert length * once <= more <= length * (once + 4 * each) + 4 * each


def test_traffic_of_a_slice_in_a_loop_is_that_of_the_slice() -> None:
    def total(xs: jax.Array) -> jax.Array:
        return lax.scan(lambda c, x: (c + x, None), jnp.zeros(256), xs)[0]

    small, large = (cost(compiled(total, (n, 256))).bytes for n in (8, 64))
    assert small is not None and large is not None
    assert large <= 9 * small  # eight times the iterations, without more bytes in each


def test_traffic_of_an_update_in_place_is_that_of_the_update() -> None:
    program = jax.jit(lambda x, y: lax.dynamic_update_slice(x, y, (0, 0)), donate_argnums=0)
    text = program.lower(S((1000, 100), jnp.float32), S((1, 100), jnp.float32)).compile()
    moved = cost(text).bytes
    assert moved is not None and moved <= 4 * 400


def test_traffic_in_loop_of_unknown_length_is_unknown() -> None:
    program = compiled(lambda w: lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w), (16, 16))
    assert cost(program).bytes is None
    assert cost(program).intensity is None
    assert "unknown" in str(cost(program))


def test_traffic_on_a_tpu_leaves_out_the_fast_memory() -> None:
    (path,) = DUMPS.glob("tpu-overlapped-*")
    text = path.read_text()
    everywhere = cost(text.replace("S(1)", "")).bytes
    main = cost(text).bytes
    assert main is not None and everywhere is not None
    assert 2 * BYTES <= main < everywhere
