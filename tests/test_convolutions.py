"""On a CPU the convolutions of a loop are computed channels last, whatever order the loss and its gradient have."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc.inspect.hlo import parse
from stepc.testing import assert_equivalent

ROWS = 16
NHWC = ("NHWC", "HWIO", "NHWC")
CHANNELS_LAST = {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}

Loss = Callable[[Any, Any], jax.Array]
SGD = sc.update(optax.sgd(0.1))


def convolved(params: Any, rows: jax.Array, **options: Any) -> jax.Array:
    """The mean square of two convolutions, one after another."""
    options = {"window_strides": (1,) * (rows.ndim - 2), "padding": "SAME", "dimension_numbers": NHWC, **options}
    for name in ("first", "second"):
        rows = jax.lax.conv_general_dilated(rows, params[name], **options)
    return jnp.mean(rows**2)


# Of each: the loss, the shape of its kernels, the shape of its rows.
CASES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "channels last": (convolved, (3, 3, 4, 4), (ROWS, 6, 5, 4)),
    "channels first": (
        partial(convolved, dimension_numbers=("NCHW", "OIHW", "NCHW")), (4, 4, 3, 2), (ROWS, 4, 6, 5),
    ),
    "strides": (partial(convolved, window_strides=(2, 1)), (3, 3, 4, 4), (ROWS, 6, 5, 4)),
    "dilated kernel": (partial(convolved, rhs_dilation=(2, 1)), (3, 3, 4, 4), (ROWS, 6, 5, 4)),
    "dilated rows": (
        partial(convolved, lhs_dilation=(2, 1), padding=((1, 2), (2, 1))), (3, 3, 4, 4), (ROWS, 4, 5, 4),
    ),
    "one dimension": (partial(convolved, dimension_numbers=("NWC", "WIO", "NWC")), (3, 4, 4), (ROWS, 6, 4)),
    "three dimensions": (
        partial(convolved, dimension_numbers=("NCDHW", "OIDHW", "NCDHW")), (4, 4, 3, 1, 2), (ROWS, 4, 3, 4, 3),
    ),
    "mixed": (partial(convolved, dimension_numbers=("NWCH", "HOWI", "NWCH")), (3, 4, 2, 4), (ROWS, 6, 4, 5)),
    "groups": (partial(convolved, feature_group_count=2), (3, 3, 2, 4), (ROWS, 6, 5, 4)),
}  # fmt: skip


def made(kernel: tuple[int, ...], rows: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """Parameters and a batch of small whole numbers."""
    random = np.random.default_rng(0)
    first, second, batch = (jnp.asarray(random.integers(-2, 3, shape), jnp.float32) for shape in (kernel, kernel, rows))
    return {"first": first, "second": second}, batch


def orders(step: sc.Step, state: sc.State, batch: Any) -> set[str]:
    """The orders of dimensions of the convolutions of its compiled program."""
    text = step.lower(state, batch).compile().hlo()
    return {found.group(1) for found in re.finditer(r" convolution\(.*dim_labels=([^,\s]+)", text)}


@pytest.mark.parametrize("name", CASES)
def test_convolutions_of_a_loop_are_channels_last_and_equal_their_reference(name: str) -> None:
    loss, kernel, rows = CASES[name]
    params, batch = made(kernel, rows)
    outside, step = (sc.compile(SGD @ sc.accumulate(k) @ sc.grad(loss)) for k in (1, 4))
    state = step.init(params)
    assert_equivalent(step, state, batch)
    if name != "groups":  # XLA makes others of those; and it exchanges rows and kernel of some, there as here
        assert orders(step, state, batch) <= CHANNELS_LAST | orders(outside, state, batch)
    assert step.lower(state, batch).plan.reordered >= 2  # at least the gradients of two kernels


def scanned(params: Any, rows: jax.Array) -> jax.Array:
    """A loop of the loss's own."""

    def layer(rows: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(jax.lax.conv_general_dilated(rows, kernel, (1, 1), "SAME", dimension_numbers=NHWC)), None

    kernels = jnp.stack([params["first"], params["second"]])
    return jnp.mean(jax.lax.scan(layer, rows, kernels)[0] ** 2)


LOOPS: dict[str, tuple[sc.Pipeline, int]] = {
    "accumulate, on two devices": (SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(convolved), 2),
    "of rows": (SGD @ sc.accumulate(2) @ sc.rows() @ sc.clip(1.0) @ sc.grad(convolved), 1),
    "of epochs": (sc.epochs(2, minibatches=2) @ SGD @ sc.grad(convolved), 1),
    "of the loss": (SGD @ sc.grad(scanned), 1),
    "of a rematerialised loss": (SGD @ sc.accumulate(2) @ sc.grad(sc.remat() @ convolved), 1),
}


@pytest.mark.parametrize("name", LOOPS)
def test_convolutions_of_any_loop_are_channels_last(name: str) -> None:
    pipeline, devices = LOOPS[name]
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(params)
    assert_equivalent(step, state, batch)
    assert orders(step, state, batch) <= CHANNELS_LAST


def test_step_in_a_loop_of_the_users_own_has_them_channels_last() -> None:
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    step = sc.compile(SGD @ sc.accumulate(2) @ sc.grad(convolved))
    batches = jnp.stack([batch, batch])
    run = jax.jit(lambda state, batches: jax.lax.scan(step.function, state, batches))
    text = run.lower(step.init(params), batches).compile().as_text()
    assert set(re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)) <= CHANNELS_LAST


def test_program_without_a_loop_is_left_alone() -> None:
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    step = sc.compile(SGD @ sc.grad(convolved))
    lowered = step.lower(step.init(params), batch)
    assert lowered.plan.reordered == 0
    assert "transpose" not in str(lowered.jaxpr())


def test_plan_says_how_many() -> None:
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    step = sc.compile(SGD @ sc.accumulate(2) @ sc.grad(convolved))
    told = "3 convolutions in a loop, computed channels last: XLA's CPU backend computes no other order fast there"
    assert told in str(step.lower(step.init(params), batch).plan)


def test_reordered_convolutions_name_the_line_of_the_loss() -> None:
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    step = sc.compile(SGD @ sc.accumulate(2) @ sc.grad(convolved))
    module = parse(step.lower(step.init(params), batch).compile().hlo())
    every = [one for computation in module.computations.values() for one in computation.instructions.values()]
    sources = {module.source(one).partition(" ")[0] for one in every if one.opcode in ("convolution", "transpose")}
    line = convolved.__code__.co_firstlineno + 4
    assert sources == {f"test_convolutions.py:{line}"}


def test_every_leaf_of_the_state_is_still_donated() -> None:
    params, batch = made((3, 3, 4, 4), (ROWS, 6, 5, 4))
    params["frozen"] = jnp.ones((5, 3))
    gradient = sc.accumulate(2) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(convolved, wrt=("first", "second"))
    step = sc.compile(sc.skip_nonfinite() @ sc.update(optax.adam(0.1)) @ gradient, mesh=mesh_of(data=2))
    donated = step.lower(step.init(params), batch).compile().donated()
    assert all(leaf.donated and leaf.aliased for leaf in donated)
