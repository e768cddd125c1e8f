"""`measure` by hand: what it sees, where it stands, and what is reported."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equivalent

PARAMS = {"w": jnp.asarray([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.asarray([1.0, -0.5])}
BATCH = {"x": jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)}


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean(jnp.tanh(rows["x"] @ params["w"] + params["b"][None]) ** 2)


def norms(grads: Any, params: Any) -> dict[str, Any]:
    both = jax.tree.map(lambda grad, leaf: jnp.stack([jnp.abs(grad).sum(), jnp.abs(leaf).sum()]), grads, params)
    return {"sizes": jnp.stack(jax.tree.leaves(both)), "largest": jnp.max(jnp.abs(grads["w"]))}


def stepped(middle: Any, *, mesh: Any = None) -> tuple[Any, Any]:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ middle @ sc.grad(loss), mesh=mesh)
    state, metrics = step(step.init(PARAMS), BATCH)
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_measure_outside_of_the_means_sees_the_gradient_of_the_whole_batch_and_changes_nothing(zero: int) -> None:
    split = sc.accumulate(2) @ sc.shard(sc.dp("data", zero=zero))
    params, metrics = stepped(sc.measure(norms) @ split, mesh=mesh_of(data=4))
    expected = norms(jax.grad(loss)(PARAMS, BATCH), PARAMS)
    assert metrics["sizes"].shape == (2, 2)
    np.testing.assert_allclose(metrics["sizes"], expected["sizes"], rtol=1e-5)  # sums in another order
    np.testing.assert_allclose(metrics["largest"], expected["largest"], rtol=1e-5)
    chex.assert_trees_all_equal(params, stepped(split, mesh=mesh_of(data=4))[0])


def test_measure_inside_of_a_scan_reports_the_mean_over_microbatches() -> None:
    _, metrics = stepped(sc.accumulate(4) @ sc.measure(norms))
    parts = [jax.grad(loss)(PARAMS, {"x": BATCH["x"][j::4]}) for j in range(4)]
    expected = np.mean([norms(part, PARAMS)["largest"] for part in parts])
    np.testing.assert_allclose(metrics["largest"], expected, rtol=1e-5)


def test_measure_on_both_sides_of_clip_sees_the_gradient_before_and_after() -> None:
    def before(grads: Any, params: Any) -> dict[str, Any]:
        return {"before": optax.tree.norm(grads)}

    def after(grads: Any, params: Any) -> dict[str, Any]:
        return {"after": optax.tree.norm(grads)}

    _, metrics = stepped(sc.measure(after) @ sc.clip(0.125) @ sc.measure(before) @ sc.accumulate(2))
    assert metrics["before"] == metrics["grad_norm"]
    assert metrics["after"] == pytest.approx(0.125, rel=1e-6)


@pytest.mark.parametrize("gather", ["step", "microbatch", "layer"])
def test_measure_inside_of_the_loop_is_given_gathered_parameters(gather: str) -> None:
    middle = sc.accumulate(2) @ sc.measure(norms) @ sc.shard(sc.dp("data", zero=3, gather=gather))
    step = sc.compile(sc.update(optax.sgd(0.5)) @ middle @ sc.grad(loss), mesh=mesh_of(data=2))
    assert_equivalent(step, step.init(PARAMS), BATCH)


def test_measure_that_returns_no_dict_is_refused() -> None:
    def total(grads: Any, params: Any) -> Any:
        return optax.tree.norm(grads)

    with pytest.raises(sc.ConfigError) as raised:
        stepped(sc.measure(total))
    assert str(raised.value).splitlines()[0] == "The function of `measure(total)` does not return metrics."
    assert "expected  a dict of arrays by name" in str(raised.value)


def test_measure_of_what_is_no_array_is_named() -> None:
    def nested(grads: Any, params: Any) -> Any:
        return {"total": optax.tree.norm(grads), "by_layer": {"w": 1.0}, "nothing": None}

    with pytest.raises(sc.ConfigError) as raised:
        stepped(sc.measure(nested))
    assert str(raised.value) == (
        "The function of `measure(nested)` does not return metrics.\n\n"
        "  metric 'by_layer'  expected an array, got dict\n"
        "  metric 'nothing'   expected an array, got NoneType"
    )


@pytest.mark.parametrize("name", ["loss", "skipped", "sizes"])
def test_measure_whose_name_is_taken_is_refused(name: str) -> None:
    def again(grads: Any, params: Any) -> dict[str, Any]:
        return {name: jnp.zeros(())}

    with pytest.raises(sc.ConfigError) as raised:
        stepped(sc.measure(again) @ sc.measure(norms))
    assert str(raised.value).splitlines()[0] == "`measure(again)` adds a metric whose name is taken."
    assert f"taken  {name}" in str(raised.value)


def test_measure_of_what_is_no_function_is_refused() -> None:
    with pytest.raises(sc.FieldTypeError, match="fn must be a function"):
        sc.measure(3)  # pyright: ignore[reportArgumentType]


def test_exception_of_the_function_passes_through() -> None:
    def wrong(grads: Any, params: Any) -> dict[str, Any]:
        return {"norm": grads["v"]}

    with pytest.raises(KeyError, match="v"):
        stepped(sc.measure(wrong))


def test_measure_is_given_what_is_trained_and_none_for_what_is_frozen() -> None:
    seen: list[Any] = []

    def trained(grads: Any, params: Any) -> dict[str, Any]:
        seen.append((grads["b"], params["b"]))
        return {"sizes": jnp.stack([optax.tree.norm(grads), optax.tree.norm(params)])}

    middle = sc.measure(trained) @ sc.accumulate(2)
    step = sc.compile(sc.update(optax.sgd(0.5)) @ middle @ sc.grad(loss, wrt="w"))
    state = step.init(PARAMS)
    assert_equivalent(step, state, BATCH)
    _, metrics = step(state, BATCH)
    assert set(seen) == {(None, None)}
    np.testing.assert_allclose(metrics["sizes"][1], jnp.linalg.norm(PARAMS["w"]), rtol=1e-6)
