"""Each term of a loss is divided by its own count over the whole batch, whatever the split."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import SOURCES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equal_trees
from stepc.testing.probes import terms, tokens

GRADIENT = sc.update(optax.trace(0.0))  # an optimizer that keeps the gradient it is given
DATA = sc.shard(sc.dp("data"))


def batch_of(num_rows: int, *, seed: int, masked: str = "random") -> dict[str, np.ndarray]:
    """Rows of tokens with a mask: random; empty for half of the rows, so for whole microbatches; or all empty."""
    random = np.random.default_rng(seed)
    mask = random.integers(0, 2, size=(num_rows, 5)).astype(np.float32)
    if masked == "microbatches":
        mask[: num_rows // 2] = 0.0
    if masked == "all":
        mask[:] = 0.0
    numbers = random.normal(size=(num_rows, 5, 4)).astype(np.float32)
    return {"x": numbers[..., :3], "y": numbers[..., 3], "mask": mask}


def parts(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    """Three totals and their counts, as a mixture of experts has them."""
    error = jnp.tanh(jnp.matmul(rows["x"], params["w"]) + params["b"]) - rows["y"]
    routed = rows["mask"] * (rows["x"][..., 0] > 0)
    return [
        (jnp.sum(error**2 * rows["mask"]), jnp.sum(rows["mask"])),
        (jnp.sum(error * routed), jnp.sum(routed)),
        (jnp.sum(error**4), jnp.asarray(rows["y"].size, jnp.float32)),
    ]


def token_loss(params: Any, rows: Any) -> sc.Mean:
    return sc.Mean(*parts(params, rows)[0])


def experts_loss(params: Any, rows: Any) -> Any:
    main, balance, z = (sc.Mean(*one) for one in parts(params, rows))
    return main + 0.01 * balance + z * 1e-3


def whole(params: Any, batch: Any, weights: tuple[float, ...]) -> jax.Array:
    """The definition, on the whole batch at once."""
    found = parts(params, batch)[: len(weights)]
    return sum(
        w * jnp.where(count > 0, total / jnp.maximum(count, 1), 0.0)
        for w, (total, count) in zip(weights, found, strict=True)
    )


LOSSES = {"tokens": (token_loss, (1.0,)), "experts": (experts_loss, (1.0, 0.01, 1e-3))}


def gradient_and_loss(loss: Any, batch: Any, k: int, devices: int) -> tuple[Any, jax.Array]:
    step = sc.compile(GRADIENT @ sc.accumulate(k) @ DATA @ sc.grad(loss), mesh=mesh_of(data=devices))
    state, metrics = step(step.init(probe_params()), batch)
    return jax.device_get(state.opt_state.trace), metrics["loss"]


def assert_close(got: Any, expected: Any) -> None:
    # Sums in another order: a few roundings of float32, relative to the largest number of the gradient.
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(one))
        assert np.abs(one - two).max() <= 2e-6 * max(size, 1e-6)


@pytest.mark.parametrize("devices", [1, 2, 5, 8])
def test_tokens_equal_the_whole_batch_for_any_k(devices: int) -> None:
    for k in (1, 2, 3, 8):
        masked = ("random", "microbatches", "all")[(k + devices) % 3]
        batch = batch_of(2 * k * devices, seed=k, masked=masked)
        got, value = gradient_and_loss(token_loss, batch, k, devices)
        expected, grads = jax.value_and_grad(whole)(probe_params(), batch, (1.0,))
        assert_close(got, grads)
        assert abs(float(value - expected)) <= 2e-6 * max(float(expected), 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("devices", range(1, 9))
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_the_whole_batch_for_every_k_and_mesh(name: str, k: int, devices: int) -> None:
    loss, weights = LOSSES[name]
    for masked in ("random", "microbatches", "all"):
        batch = batch_of(2 * k * devices, seed=k, masked=masked)
        got, value = gradient_and_loss(loss, batch, k, devices)
        expected, grads = jax.value_and_grad(whole)(probe_params(), batch, weights)
        assert_close(got, grads)
        assert abs(float(value - expected)) <= 2e-6 * max(abs(float(expected)), 1e-6)


@pytest.mark.parametrize("masked", ["random", "microbatches", "all"])
@pytest.mark.parametrize(("k", "devices"), [(4, 1), (1, 8), (3, 5)])
def test_several_terms_equal_the_whole_batch(k: int, devices: int, masked: str) -> None:
    batch = batch_of(2 * k * devices, seed=3, masked=masked)
    got, value = gradient_and_loss(experts_loss, batch, k, devices)
    expected, grads = jax.value_and_grad(whole)(probe_params(), batch, (1.0, 0.01, 1e-3))
    assert_close(got, grads)
    assert abs(float(value - expected)) <= 2e-6 * max(abs(float(expected)), 1e-6)


@pytest.mark.parametrize(("k", "devices"), [(2, 1), (8, 1), (1, 8), (4, 4), (8, 2)])
def test_tokens_are_exact_on_whole_numbers(k: int, devices: int) -> None:
    batch = probe_batch(64)
    # Sixteen rows count, wherever they are: a division by a power of two is exact.
    batch["y"] = np.random.default_rng(1).permutation([2.0] * 16 + [-1.0] * 48).astype(np.float32)
    got = gradient_and_loss(tokens, batch, k, devices)
    assert_equal_trees(got, gradient_and_loss(tokens, batch, 1, 1), tolerance=0.0, of="a split and the whole batch")


def test_mean_of_means_is_another_number() -> None:
    """What `Mean` is for. A test on masks for which both agree would show nothing."""
    batch = batch_of(16, seed=0)

    def mean(params: Any, rows: Any) -> jax.Array:
        total, count = parts(params, rows)[0]
        return total / count

    wrong, _ = gradient_and_loss(mean, batch, 8, 1)
    right, _ = gradient_and_loss(token_loss, batch, 8, 1)
    assert np.abs(wrong["w"] - right["w"]).max() > 0.01 * np.abs(right["w"]).max()


def compiled(source: sc.Transform, mesh: Any, num_rows: int = 64) -> tuple[Any, sc.Compiled]:
    step = sc.compile(sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ source, mesh=mesh)
    lowered = step.lower(step.init(probe_params()), probe_batch(num_rows))
    return lowered, lowered.compile()


def test_one_count_needs_no_further_reduction() -> None:
    lowered, program = compiled(sc.grad(tokens), mesh_of(data=8))
    (row,) = program.collectives()
    assert (row.kind, row.executions, row.in_loop) == ("all-reduce", 1, False)
    assert row.bytes == 4 * (3 + 1 + 2)  # w, b, the total and the count
    assert "divide by the count that was summed with it" in str(lowered.plan)


def test_several_counts_need_one_more_reduction_of_scalars() -> None:
    lowered, program = compiled(SOURCES["terms"], mesh_of(data=8))
    first, second = sorted(program.collectives(), key=lambda row: row.bytes)
    assert (first.bytes, first.executions, first.in_loop) == (4 * 2, 1, False)  # the two counts that rows decide
    assert (second.executions, second.in_loop) == (1, False)
    assert [one.reason for one in lowered.plan.collectives][0] == "its terms have counts of their own"
    assert "count first" in str(lowered.plan)


def test_counting_costs_no_forward_computation() -> None:
    def one_term(params: Any, rows: Any) -> jax.Array:
        found = terms(params, rows)
        return sum(term.total for term in found.terms)

    with_counts, _ = compiled(sc.grad(terms), None or mesh_of(data=1))
    without, _ = compiled(sc.grad(one_term), mesh_of(data=1))
    assert with_counts.stablehlo().count("dot_general") == without.stablehlo().count("dot_general")
    assert str(with_counts.jaxpr()).count("dot_general") == str(without.jaxpr()).count("dot_general")
    assert str(with_counts.jaxpr()).count("scan[") == 2


def test_terms_with_one_count_are_one_term() -> None:
    def loss(params: Any, rows: Any) -> Any:
        mask = (rows["y"] > 0).astype(jnp.float32)
        count = jnp.sum(mask)
        error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
        return sc.Mean(jnp.sum(error**2 * mask), count) + 0.1 * sc.Mean(jnp.sum(error * mask), count)

    lowered, program = compiled(sc.grad(loss), mesh_of(data=8))
    assert len(program.collectives()) == 1
    assert "count first" not in str(lowered.plan)


def test_number_as_a_count_needs_no_counting() -> None:
    def loss(params: Any, rows: Any) -> Any:
        error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
        return sc.Mean(jnp.sum(error**2), rows["y"].shape[0]) + 0.5 * jnp.sum(params["w"] ** 2)

    _, program = compiled(sc.grad(loss), mesh_of(data=8))
    assert len(program.collectives()) == 1
    got, _ = gradient_and_loss(loss, probe_batch(64), 4, 2)
    expected = jax.grad(lambda p, b: jnp.mean((b["x"] @ p["w"] + p["b"] - b["y"]) ** 2) + 0.5 * jnp.sum(p["w"] ** 2))
    assert_close(got, expected(probe_params(), probe_batch(64)))


def test_loss_that_prints_parameters_is_not_taken_for_a_count_that_depends_on_them() -> None:
    def loss(params: Any, rows: Any) -> Any:
        jax.debug.callback(lambda _: None, params["w"])
        return jax.jit(terms)(params, rows)

    got, _ = gradient_and_loss(loss, probe_batch(16), 2, 2)
    expected, _ = gradient_and_loss(terms, probe_batch(16), 1, 1)
    assert_close(got, expected)


def test_clip_inside_makes_values_of_equal_weight() -> None:
    batch = probe_batch(32)
    step = sc.compile(GRADIENT @ sc.accumulate(4) @ sc.clip(1.0) @ sc.grad(tokens))
    state, _ = step(step.init(probe_params()), batch)
    clipped = []
    for j in range(4):
        rows = jax.tree.map(lambda leaf, j=j: leaf[j::4], batch)
        grads = jax.grad(lambda p, rows=rows: tokens(p, rows).total / tokens(p, rows).count)(probe_params())
        norm = optax.tree.norm(grads)
        clipped.append(jax.tree.map(lambda leaf, norm=norm: leaf * jnp.minimum(1.0, 1.0 / norm), grads))
    assert_close(state.opt_state.trace, jax.tree.map(lambda *leaves: sum(leaves) / 4, *clipped))


def test_arithmetic_of_terms() -> None:
    one, two = sc.Mean(6.0, 3), sc.Mean(8.0, 4)
    total = 2 * one - two / 4 + 1.0
    assert [(term.total, term.count) for term in total.terms] == [(12.0, 3), (-2.0, 4), (1.0, 1)]
    assert [term.total for term in (-one).terms] == [-6.0]
    assert [term.total for term in (np.float32(2) * one).terms] == [12.0]
    assert [term.total for term in sum([one, two]).terms] == [0, 6.0, 8.0]
    for wrong in (lambda: one * two, lambda: one / two):
        with pytest.raises(TypeError, match="cannot (multiply|divide) two means"):
            wrong()
