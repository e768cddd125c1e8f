"""Losses of the whole batch that people train, each by value: that of the whole batch at once, in plain JAX."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equal_trees

SIZE, WIDTH, CLASSES = 48, 8, 5


class Case(NamedTuple):
    """A head of an encoder, and the same loss of a whole batch, written without them."""

    head: Any
    encode: Any
    plain: Any


def embedded(params: Any, x: Any) -> jax.Array:
    z = jnp.tanh(x @ params["w"]) @ params["out"]
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def supcon(params: Any, z: Any) -> jax.Array:
    """Khosla et al. 2020: each row against all others, those of its class are right; labels are part of z."""
    logits = z["x"] @ z["x"].T / jnp.exp(params["scale"])
    others = 1.0 - jnp.eye(len(logits))
    same = (z["label"][:, None] == z["label"][None, :]) * others
    log_p = logits - jax.nn.logsumexp(logits, axis=1, where=others > 0, keepdims=True)
    num_same = same.sum(axis=1)
    mean_log_p = (same * log_p).sum(axis=1) / jnp.maximum(num_same, 1.0)
    return jnp.mean(-mean_log_p * (num_same > 0))


def supcon_by_rows(params: Any, rows: Any) -> jax.Array:
    """One row after another."""
    z, labels = embedded(params, rows["x"]), rows["label"]
    total = jnp.float32(0.0)
    for i in range(len(labels)):
        others = np.array([j for j in range(len(labels)) if j != i])
        logits = z[others] @ z[i] / jnp.exp(params["scale"])
        log_p = logits - jax.nn.logsumexp(logits)
        same = labels[others] == labels[i]
        total -= jnp.where(same.any(), jnp.sum(same * log_p) / jnp.maximum(same.sum(), 1), 0.0)
    return total / len(labels)


def vicreg(params: Any, z: Any) -> jax.Array:
    """Bardes, Ponce, LeCun 2022: invariance, variance, covariance."""

    def of_view(z: Any) -> Any:
        centred = z - z.mean(axis=0, keepdims=True)
        covariance = centred.T @ centred / (len(z) - 1)
        apart = jnp.sum(covariance**2) - jnp.sum(jnp.diagonal(covariance) ** 2)
        return jnp.mean(jax.nn.relu(1.0 - jnp.sqrt(jnp.diagonal(covariance) + 1e-4))) + apart / WIDTH

    return jnp.mean((z["one"] - z["two"]) ** 2) + of_view(z["one"]) + of_view(z["two"]) + 0.0 * params["scale"]


def barlow(params: Any, z: Any) -> jax.Array:
    """Zbontar et al. 2021: of sums over rows alone, so nothing with rows is gathered."""
    size = z["size"].value
    mean = {name: z[name].value / size for name in ("one", "two")}
    spread = {name: jnp.sqrt(z[f"{name}2"].value / size - mean[name] ** 2) for name in ("one", "two")}
    cross = z["cross"].value / size - mean["one"][:, None] * mean["two"][None, :]
    cross = cross / (spread["one"][:, None] * spread["two"][None, :])
    return jnp.sum((cross - jnp.eye(WIDTH)) ** 2) + params["scale"] ** 2


def two_views(params: Any, rows: Any) -> Any:
    return {"one": embedded(params, rows["x"]), "two": embedded(params, rows["y"])}


def moments(params: Any, rows: Any) -> Any:
    z = two_views(params, rows)
    sums = {name: sc.Sum(one.sum(axis=0)) for name, one in z.items()}
    squares = {f"{name}2": sc.Sum((one**2).sum(axis=0)) for name, one in z.items()}
    return {**sums, **squares, "cross": sc.Sum(z["one"].T @ z["two"]), "size": sc.Sum(len(rows["x"]))}


def barlow_of_views(params: Any, rows: Any) -> jax.Array:
    z = {name: (one - one.mean(axis=0)[None]) / one.std(axis=0)[None] for name, one in two_views(params, rows).items()}
    return jnp.sum((z["one"].T @ z["two"] / len(rows["x"]) - jnp.eye(WIDTH)) ** 2) + params["scale"] ** 2


def advantages(params: Any, z: Any) -> Any:
    """Policy gradient with advantages that are normalised over the batch, and a mean of the rows that count."""
    normal = (z["advantage"] - z["advantage"].mean()) / (z["advantage"].std() + 1e-6)
    return sc.Mean(-jnp.sum(z["log_p"] * normal * z["mask"]), z["mask"].sum()) + 0.1 * z["entropy"]


def policy(params: Any, rows: Any) -> Any:
    log_p = jax.nn.log_softmax(rows["x"] @ params["w"] @ params["out"] * params["scale"])
    entropy = sc.Mean(jnp.sum(jnp.exp(log_p) * log_p), len(log_p))
    chosen = jnp.take_along_axis(log_p, rows["label"][:, None], axis=1)[:, 0]
    return {"log_p": chosen, "advantage": rows["y"][:, 0], "mask": rows["y"][:, 1] > 0, "entropy": entropy}


def policy_of_batch(params: Any, rows: Any) -> jax.Array:
    log_p = jax.nn.log_softmax(rows["x"] @ params["w"] @ params["out"] * params["scale"])
    advantage = rows["y"][:, 0]
    normal = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-6)
    chosen, mask = log_p[jnp.arange(len(log_p)), rows["label"]], (rows["y"][:, 1] > 0).astype(jnp.float32)
    return -jnp.sum(chosen * normal * mask) / jnp.sum(mask) + 0.1 * jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=1))


CASES = {
    "supcon": Case(supcon, lambda p, b: {"x": embedded(p, b["x"]), "label": b["label"]}, supcon_by_rows),
    "vicreg": Case(vicreg, two_views, lambda p, b: vicreg(p, two_views(p, b))),
    "barlow": Case(barlow, moments, barlow_of_views),
    "advantages": Case(advantages, policy, policy_of_batch),
}


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (3, 1), (2, 8)])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_whole_batch(name: str, k: int, devices: int) -> None:
    case, random = CASES[name], np.random.default_rng(0)
    shapes = {"w": (6, 16), "out": (16, WIDTH)}
    params = {one: random.normal(size=shape).astype(np.float32) / 3 for one, shape in shapes.items()}
    params = jax.tree.map(jnp.asarray, {**params, "scale": np.float32(0.5)})
    rows = {one: random.normal(size=(SIZE, 6)).astype(np.float32) for one in ("x", "y")}
    rows["label"] = random.integers(0, CLASSES, size=SIZE).astype(np.int32)
    value, grads = jax.jit(jax.value_and_grad(case.plain))(params, jax.tree.map(jnp.asarray, rows))
    shared = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(sc.across(case.head) @ case.encode)
    step = sc.compile(sc.update(optax.sgd(1.0)) @ shared, mesh=mesh_of(data=devices))
    state, metrics = step(step.init(params), rows)
    got = jax.tree.map(lambda old, new: old - new, params, jax.device_get(state.params))
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    # The gradient is a difference of parameters, rounded as they are.
    assert_equal_trees(got, grads, tolerance=2e-5, of=name)
