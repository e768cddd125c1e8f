"""Probe losses, which expose a wrong split or a wrong law, and batches of whole numbers on which sums are exact.

A mean over rows alone is blind: a wrongly split batch has the same mean. So one probe depends on which rows share a
call, one on the order of the rows, and one on the keys it is given. Batches hold small whole numbers. With part counts
that are powers of two every sum is then exact in float32, and results are compared with `==`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from stepc._language.model_state import ModelStateRules
from stepc._language.state import KEYS
from stepc._language.terms import Last, Max, Mean, Min, Sum, Sums
from stepc._language.transforms.across import across
from stepc._language.transforms.grad import Grad, grad

Probe: TypeAlias = Callable[[Any, Any], Float[Array, ""]]  # Any, twice: the trees of `probe_params` and `probe_batch`
Tree: TypeAlias = dict[str, Any]  # Any: arrays


def over_rows(params: Tree, rows: Tree) -> Float[Array, ""]:
    """A mean over rows: half the squared error of a linear prediction."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    return jnp.mean(error * error) * 0.5


def coupling_rows(params: Tree, rows: Tree) -> Float[Array, ""]:
    """A product of two means: it depends on which rows share a call."""
    return jnp.mean(jnp.matmul(rows["x"], params["w"]) + params["b"]) * jnp.mean(rows["y"])


def in_order(params: Tree, rows: Tree) -> Float[Array, ""]:
    """A mean weighted by the position of each row: it depends on the order of the rows as well."""
    weights = jnp.arange(rows["y"].shape[0], dtype=jnp.float32)
    return jnp.mean(weights * (jnp.matmul(rows["x"], params["w"]) + params["b"]) * rows["y"])


def drawing(params: Tree, rows: Tree, keys: Any) -> Float[Array, ""]:  # Any: typed keys, one per row
    """A mean over rows with dropout: it depends on the key of each row."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    error = jnp.matmul(rows["x"] * kept * 2.0, params["w"]) + params["b"] - rows["y"]
    return jnp.mean(error * error) * 0.5


def drawing_per_call(params: Tree, rows: Tree, key: Any) -> Float[Array, ""]:  # Any: a typed key
    """The same, with one key per call."""
    return drawing(params, rows, jax.random.split(key, rows["y"].shape[0]))


def tokens(params: Tree, rows: Tree) -> Mean:
    """A mean over the rows whose `y` is positive: a whole microbatch may count nothing."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    mask = (rows["y"] > 0).astype(jnp.float32)
    return Mean(jnp.sum(error * error * mask), jnp.sum(mask))


def terms(params: Tree, rows: Tree) -> Sums:
    """Three terms with three counts, as a mixture of experts has them: tokens, a balance, and a plain scalar."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    routed = (rows["x"][:, 0] > 0).astype(jnp.float32)
    balance = Mean(jnp.sum(error * routed), jnp.sum(routed))
    return tokens(params, rows) + 0.5 * balance + 0.25 * jnp.sum(params["w"] * params["w"])


def measuring(params: Tree, rows: Tree) -> tuple[Float[Array, ""], Tree]:
    """A mean over rows that reports a metric of every kind."""
    error = jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]
    metrics = {
        "plain": jnp.mean(error),
        "mean": Mean(jnp.sum(error), jnp.sum(rows["y"] > 0)),
        "sum": Sum(jnp.sum(error)),
        "num": Sum(jnp.sum(rows["y"] > 0)),
        "max": Max(jnp.max(error)),
        "min": Min(jnp.min(rows["y"])),
        "last": Last(error[-1]),
    }
    return over_rows(params, rows), metrics


def stateful(params: Tree, rows: Tree, model_state: Tree) -> tuple[Float[Array, ""], Tree]:
    """A loss with model state: it depends on what the calls before it have seen."""
    new = {"seen": model_state["seen"] + jnp.sum(rows["y"]), "calls": model_state["calls"] + 1}
    return over_rows(params, rows) + model_state["seen"] * params["b"], new


def recurrent(params: Tree, rows: Tree, model_state: Tree) -> tuple[Float[Array, ""], Tree]:
    """A loss with model state of every rule: hidden states by rows, a codebook, a range, a counter, a table, a key."""
    kept = jax.random.bernoulli(model_state["key"], 0.5, rows["y"].shape)
    hidden = 0.5 * model_state["hidden"] + rows["x"]
    read = model_state["code"] + model_state["table"][0] + model_state["mean"] + model_state["largest"]
    new = {
        **model_state,
        "hidden": hidden,
        "code": jnp.mean(rows["x"], axis=0),
        "largest": jnp.maximum(model_state["largest"], jnp.max(rows["y"])),
        "tokens": model_state["tokens"] + jnp.sum(rows["y"] > 0),
        "mean": model_state["mean"] + jnp.mean(rows["y"]),
        "calls": model_state["calls"] + 1,
    }
    error = jnp.matmul(hidden + read[None], params["w"]) + params["b"] - rows["y"]
    return jnp.mean(error * kept), new


def on_frozen(params: Tree, rows: Tree) -> Float[Array, ""]:
    """A mean over rows whose weights are trained on a frozen base: whole numbers of 8 bits, a bool and a typed key."""
    base = params["base"]
    offset = jnp.where(base["on"], base["codes"], 0) + jax.random.randint(base["key"], (3,), -1, 2, jnp.int8)
    return over_rows({"w": params["w"] + offset.astype(jnp.float32), "b": params["b"]}, rows)


def encoding(params: Tree, rows: Tree) -> Tree:
    """An encoder: a leaf through which a gradient flows, two through which none does, a sum and a mean."""
    a = jnp.matmul(rows["x"], params["w"]) + params["b"]
    positive = (rows["y"] > 0).astype(jnp.float32)
    return {
        "a": a,
        "x": rows["x"] * a[:, None],
        "y": rows["y"].astype(jnp.int32),
        "load": Sum(jnp.sum(a * positive)),
        "mean": Mean(jnp.sum(a * jnp.sign(rows["y"])), rows["y"].shape[0]),
    }


def over_pairs(params: Tree, z: Tree) -> Float[Array, ""]:
    """A head that couples neighbours, in their order, and multiplies sums: it depends on the batch being whole.

    The numbers stay small, so that products of two sums are exact for 64 rows.
    """
    size, sign = z["a"].shape[0], jnp.sign(z["y"]).astype(jnp.float32)
    weights = (jnp.arange(size) % 3).astype(jnp.float32) * (jnp.roll(sign, 1) - 2 * jnp.roll(sign, -1))
    pairs = weights * z["a"] + jnp.sum(z["x"], axis=1)
    return jnp.mean(pairs) + (z["load"].value / size) * z["mean"].value + params["b"] * jnp.mean(z["a"])


def over_pairs_with_terms(params: Tree, z: Tree) -> tuple[Sums, Tree]:
    """The same among terms with counts of their own, and metrics of every kind."""
    a, positive = z["a"], (z["y"] > 0).astype(jnp.float32)
    value = 0.5 * over_pairs(params, z) + Mean(jnp.sum(a * positive), jnp.sum(positive)) + z["mean"]
    metrics = {
        "plain": jnp.mean(a),
        "mean": Mean(jnp.sum(a), jnp.sum(positive)),
        "num": Sum(jnp.sum(z["y"] > 0)),
        "max": Max(jnp.max(a)),
        "min": Min(jnp.min(z["y"])),
        "last": Last(a[-1]),
    }
    return value, metrics


def encoding_drawn(params: Tree, rows: Tree, keys: Any) -> Tree:  # Any: typed keys, one per row
    """The encoder with dropout."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(keys)
    return encoding(params, {**rows, "x": rows["x"] * kept * 2.0})


def encoding_recurrent(params: Tree, rows: Tree, model_state: Tree) -> tuple[Tree, Tree]:
    """The encoder with model state of every rule."""
    _, new = recurrent(params, rows, model_state)
    read = model_state["code"] + model_state["table"][0] + model_state["mean"] + model_state["largest"]
    return encoding(params, {**rows, "x": new["hidden"] + read[None]}), new


PROBES = MappingProxyType({"over_rows": over_rows, "coupling_rows": coupling_rows, "in_order": in_order})
RECURRENT = {"hidden": "rows", "code": "average", "largest": "max", "tokens": "sum", "table": "constant"}
# The same as `grad(...)`. Exact ones give the same bits in any order of summation. The others divide by counts that are
# not powers of two, where XLA may multiply by the reciprocal.
EXACT_SOURCES = MappingProxyType(
    {
        **{name: grad(probe) for name, probe in PROBES.items()},
        "drawing": grad(drawing, rng="example"),
        "drawing_per_call": grad(drawing_per_call, rng="microbatch"),
        "measuring": grad(measuring, has_aux=True),
        "stateful": grad(stateful, model_state=True),
        "recurrent": grad(recurrent, model_state=RECURRENT),
        "on_frozen": grad(on_frozen, wrt=("w", "b")),
    }
)
# Losses of the whole batch.
EXACT_WHOLE = MappingProxyType(
    {
        "whole": grad(across(over_pairs) @ encoding),
        "whole_drawn": grad(across(over_pairs) @ encoding_drawn, rng="example"),
    }
)
WHOLE = MappingProxyType(
    {
        **EXACT_WHOLE,
        "whole_terms": grad(across(over_pairs_with_terms) @ encoding, has_aux=True),
        "whole_recurrent": grad(across(over_pairs) @ encoding_recurrent, model_state=RECURRENT),
    }
)
SOURCES: MappingProxyType[str, Grad] = MappingProxyType({**EXACT_SOURCES, "tokens": grad(tokens), "terms": grad(terms)})


@dataclass(frozen=True)
class Evaluating:
    """An optimizer that asks for the loss of the whole batch: where it stands, and one step aside with its derivatives.

    It goes down the gradient there, and keeps the values and a product of the Hessian.
    """

    rate: float = 0.5

    def init(self, params: Tree) -> Tree:
        return {"here": 0.0, "aside": 0.0, "product": jax.tree.map(jnp.zeros_like, params)}

    def update(self, grads: Tree, state: Tree, params: Tree, *, value_fn: Callable[[Tree], Any]) -> tuple[Tree, Tree]:
        aside, ones = jax.tree.map(lambda leaf: leaf - 1.0, params), jax.tree.map(jnp.ones_like, params)
        (value, grads), (_, product) = jax.jvp(jax.value_and_grad(value_fn), (aside,), (ones,))
        updates = jax.tree.map(lambda leaf: -self.rate * leaf, grads)
        return updates, {"here": value_fn(params), "aside": value, "product": product}


def probe_params(source: Grad | None = None) -> Tree:
    """Whole-number parameters: a vector of three and a scalar; and the frozen base of `on_frozen`."""
    trained = {"w": np.array([2.0, -1.0, 1.0], np.float32), "b": np.array(1.0, np.float32)}
    if source is None or source.wrt == "**":
        return trained
    base = {"codes": np.array([1, -2, 3], np.int8), "on": np.array(True), "key": jax.random.key(5, impl=KEYS)}
    return {**trained, "base": base}


def probe_model_state(source: Grad, num_rows: int) -> Tree | None:
    """The initial model state of `stateful`, or of `recurrent`; None for a loss without model state."""
    zero, calls = np.zeros((), np.float32), np.zeros((), np.int32)
    match source.model_state:
        case None:
            return None
        case ModelStateRules(()):
            return {"seen": zero, "calls": calls}
        case _:
            return {
                "hidden": np.arange(num_rows * 3, dtype=np.float32).reshape(num_rows, 3) % 5 - 2,
                "code": np.zeros(3, np.float32),
                "largest": np.float32(-9),
                "tokens": np.array(7, np.int32),
                "table": np.array([[1, -1, 2]], np.float32),
                "kept": np.array([100, -100, 64, 7], np.int8),
                "mean": zero,
                "calls": calls,
                "key": jax.random.key(7, impl=KEYS),
            }


def probe_batch(num_rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Whole numbers from -3 to 3: `x` is [num_rows, 3], `y` is [num_rows]."""
    random = np.random.default_rng(seed)
    numbers = random.integers(-3, 4, size=(num_rows, 4)).astype(np.float32)
    return {"x": numbers[:, :3], "y": numbers[:, 3]}


def wide(probe: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:  # Any: as of `Probe`; and an encoder's z
    """A probe, an encoder or a head whose parameters can be sharded.

    The vector of three is a weighted sum over two axes of eight. Every element of a parameter has a different
    gradient, so a misplaced shard shows.
    """
    across, along = np.array([1, -1, 2, -2, 1, -1, 2, 1], np.float32), np.array([1, 2, -1, 1, -2, 1, 1, -1], np.float32)

    def loss(params: Tree, rows: Tree) -> Any:  # Any: what the probe returns
        w = jnp.einsum("a,aib,b->i", across, params["deep"]["w"].astype(jnp.float32), along)
        return probe({"w": w, "b": params["b"] + jnp.sum(params["out"] * np.tile(along, 2))}, rows)

    loss.__name__ = f"wide_{probe.__name__}"
    return loss


WIDE = MappingProxyType({name: wide(probe) for name, probe in PROBES.items()})


def wide_params(*, deep: Any = jnp.float32) -> Tree:  # Any: a dtype
    """Whole-number parameters of a `wide` probe: `deep/w` is [8, 3, 8], `out` is [16], `b` a scalar.

    Args:
      deep: the dtype of `deep/w`; one of whole numbers, if it is to be frozen.
    """
    random = np.random.default_rng(0)
    rare = (random.integers(0, 12, size=(8, 3, 8)) == 0) * random.choice([-1, 1], size=(8, 3, 8))
    out = random.integers(-1, 2, size=16)
    return {"deep": {"w": rare.astype(deep)}, "out": out.astype(np.float32), "b": np.array(1.0, np.float32)}
