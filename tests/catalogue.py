"""A sample of every transform, the probe losses, and the axis sizes that samples name. Tests run over all of them."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import optax

import stepc as sc
from stepc._core.nodes import DifferentiateNode, Node
from stepc._language.transforms.grad import Grad
from stepc.testing.probes import EXACT_SOURCES as EXACT_SOURCES
from stepc.testing.probes import PROBES as PROBES
from stepc.testing.probes import SOURCES as SOURCES
from stepc.testing.probes import WHOLE as WHOLE
from stepc.testing.probes import Evaluating
from stepc.testing.probes import over_pairs as over_pairs
from stepc.testing.probes import probe_batch as probe_batch
from stepc.testing.probes import probe_model_state as probe_model_state
from stepc.testing.probes import probe_params as probe_params

AXES = {"data": 2, "replica": 4}


def norm_of_each_leaf(grads: Any, params: Any) -> dict[str, Any]:
    """Two vectors by leaf, for `measure`: the norms of the gradient, and of the parameters."""
    norms = [jnp.stack([jnp.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(tree)]) for tree in (grads, params)]
    return {"norms": norms[0], "param_norms": norms[1]}


# Exact on whole numbers: sums, and products with powers of two. Compared bitwise.
EXACT = {
    "accumulate": sc.accumulate(4),
    "accumulate_one": sc.accumulate(1),
    "scale": sc.scale(0.5),
    "scale_negative": sc.scale(-2.0),
    "shard": sc.shard(sc.dp("data")),
    "rows": sc.rows(),
    "loss_scale": sc.loss_scale(initial=8.0, interval=2),
}
# Divisions and roots: compared up to rounding.
ROUNDED = {
    "clip": sc.clip(1.0),
    "clip_loose": sc.clip(1e6),
    "clip_zero": sc.clip(2.0, nonfinite="zero"),
    "noise": sc.noise(0.25),
    "sam": sc.sam(0.125),
    "measure": sc.measure(norm_of_each_leaf),
    "accumulate_narrow": sc.accumulate(4, dtype=jnp.bfloat16),
}
UPDATES = {
    "update": sc.update(optax.sgd(0.5)),
    "update_momentum": sc.update(optax.sgd(0.5, momentum=0.5)),
    "update_adamw": sc.update(optax.adamw(1e-3)),
    "update_extra_args": sc.update(optax.contrib.reduce_on_plateau()),
    "update_evaluating": sc.update(Evaluating()),
}
STEPS = {
    "skip_nonfinite": sc.skip_nonfinite(limit=2),
    "ema": sc.ema(0.5),
    "ema_every": sc.ema(0.5, every=2),
    "repeat": sc.repeat(2),
    "epochs": sc.epochs(2, minibatches=2),
}
LOSSES = {
    "cast": sc.cast(jnp.bfloat16),
    "cast_any": sc.cast(jnp.float16, params=None),
    "remat": sc.remat(),
    "remat_dots": sc.remat("dots_saveable"),
    "remat_offload": sc.remat("offload_dot_with_no_batch_dims"),
}
HEADS = {"across": sc.across(over_pairs)}
GRADS = {"grad": sc.grad(PROBES["over_rows"])}
TURNS = {
    "alternate": sc.alternate(
        w=sc.update(optax.sgd(0.5)) @ sc.grad(PROBES["over_rows"], wrt="w"),
        b=sc.update(optax.sgd(0.25, momentum=0.5)) @ sc.grad(PROBES["over_rows"], wrt="b"),
        every={"b": 2},
    )
}
SAMPLES = {**EXACT, **ROUNDED, **UPDATES, **STEPS, **LOSSES, **HEADS, **GRADS, **TURNS}


def fits(name: str, source: sc.Transform) -> bool:
    """Whether a pipeline may have both.

    A row that `epochs` shuffles has no model state of its own, and a head is given no single rows.
    """
    if name == "rows" and isinstance(source, Grad) and isinstance(source.loss, sc.Pipeline):
        return False
    rules = source.model_state.by_pattern if isinstance(source, Grad) and source.model_state is not None else ()  # pyright: ignore
    return not (name == "epochs" and any(rule == "rows" for _, rule in rules))


def every_probe(params: Any, rows: Any) -> jax.Array:
    """The sum of the probes, exact as they are: one program in which a wrong split shows if any of them notices it."""
    return sum((probe(params, rows) for probe in PROBES.values()), start=jnp.float32(0.0))


# One gradient for all probes that are alike to a program, and one for each that is not.
KINDS_OF_SOURCES = {
    "every_probe": sc.grad(every_probe),
    **{name: source for name, source in SOURCES.items() if name not in PROBES},
    **WHOLE,
}


def with_jitted_loss(node: Node) -> Node:
    """The node, its loss traced once for all local microbatches of one shape: the evaluator calls it for each."""
    return replace(node, loss=_jitted(node.loss)) if isinstance(node, DifferentiateNode) else node


_jitted = cache(jax.jit)
# The same sources for tests that compare two naive readings, each of which calls the loss for every microbatch.
JITTED_SOURCES = {
    name: replace(source, loss=replace(source.loss, value=_jitted(source.loss.value)))  # pyright: ignore
    for name, source in KINDS_OF_SOURCES.items()
    if name not in WHOLE  # their encoder returns numbers that are no arrays
}
