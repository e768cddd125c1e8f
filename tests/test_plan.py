"""The printed plan against golden files, and what it says against what was compiled."""

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, SOURCES, WHOLE, over_pairs, probe_batch, probe_model_state, probe_params
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc.testing.probes import WIDE, encoding, terms, tokens, wide, wide_params

loss = PROBES["over_rows"]
tx = optax.adamw(3e-4)
DATA = sc.shard(sc.dp("data"))

PLANS: dict[str, tuple[sc.Pipeline, dict[str, int] | None]] = {
    "clip_outside": (sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(loss), {"data": 8}),
    "clip_inside": (sc.update(tx) @ sc.accumulate(4) @ sc.clip(1.0) @ DATA @ sc.grad(loss), {"data": 8}),
    "one_device": (sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ sc.grad(loss), None),
    "unit_size": (sc.update(tx) @ sc.accumulate(1) @ sc.scale(1) @ DATA @ sc.grad(loss), {"data": 1}),
    "everything": (
        sc.update(tx) @ sc.accumulate(2) @ sc.shard(sc.dp("replica")) @ sc.accumulate(2) @ sc.clip(1.0)
        @ sc.scale(0.5) @ sc.accumulate(2) @ DATA @ sc.scale(2.0) @ sc.grad(loss),
        {"replica": 2, "data": 2, "model": 2},
    ),
    "terms": (sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(terms), {"data": 8}),
    "guarded": (
        sc.ema(0.9) @ sc.skip_nonfinite() @ sc.update(tx) @ sc.loss_scale() @ sc.accumulate(4) @ DATA
        @ sc.grad(sc.cast(jnp.float16) @ sc.remat() @ tokens),
        {"data": 8},
    ),
    "rows_and_noise": (
        sc.update(tx) @ sc.noise(0.1) @ sc.accumulate(4) @ DATA @ sc.rows() @ sc.clip(1.0) @ sc.grad(loss), {"data": 8}
    ),
    "measuring": (sc.update(tx) @ sc.accumulate(4) @ DATA @ SOURCES["measuring"], {"data": 8}),
    "model_state_rules": (
        sc.update(tx) @ sc.accumulate(4) @ DATA @ sc.rows() @ SOURCES["recurrent"], {"data": 8},
    ),
    "model_state": (sc.update(tx) @ sc.accumulate(4) @ DATA @ SOURCES["stateful"], {"data": 8}),
    "epochs": (
        sc.epochs(4, minibatches=2) @ sc.update(tx) @ sc.accumulate(4) @ DATA @ sc.grad(loss), {"data": 8}
    ),
    "turns": (
        sc.skip_nonfinite() @ sc.ema(0.5) @ sc.alternate(
            w=sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(loss, wrt="w"),
            b=sc.update(tx) @ DATA @ sc.accumulate(2) @ sc.grad(loss, wrt="b"),
            every={"b": 5},
        ),
        {"data": 8},
    ),
    "repeated": (sc.repeat(2) @ sc.update(tx) @ sc.accumulate(4) @ DATA @ sc.grad(loss), {"data": 8}),
    "zero2": (
        sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4)
        @ sc.shard(sc.dp(("replica", "data"), zero=2, reduce_dtype=jnp.bfloat16))
        @ sc.shard(sc.tp({"deep/*": P("model")}, default=P())) @ sc.grad(WIDE["over_rows"]),
        {"replica": 2, "data": 2, "model": 2},
    ),
    "zero1_padded": (
        sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=1))
        @ sc.shard(sc.tp({"deep/*": P("model", "expert"), "out": P("model")}, default=P(), pad=True))
        @ sc.grad(WIDE["over_rows"]),
        {"data": 2, "model": 2, "expert": 2},
    ),
    "zero3_microbatch": (
        sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=3, gather="microbatch"))
        @ sc.grad(WIDE["over_rows"]),
        {"data": 8},
    ),
    "zero3_layer": (
        sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=3, gather="layer")) @ sc.grad(WIDE["over_rows"]),
        {"data": 8},
    ),
    "zero3_layer_step": (
        sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=3, gather=("layer", "step")))
        @ sc.grad(WIDE["over_rows"]),
        {"data": 8},
    ),
    "zero1_inside": (
        sc.update(tx) @ sc.accumulate(4) @ sc.clip(1.0) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(WIDE["over_rows"]),
        {"data": 8},
    ),
    "line_search": (
        sc.update(optax.lbfgs()) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ sc.grad(loss), {"data": 8}
    ),
    "line_search_zero1": (
        sc.update(optax.lbfgs()) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(loss), {"data": 8}
    ),
    "whole_batch": (sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ WHOLE["whole"], {"data": 8}),
    "zero3_layer_whole_batch": (
        sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=3, gather="layer"))
        @ sc.grad(sc.across(wide(over_pairs)) @ wide(encoding)),
        {"data": 8},
    ),
    "automatic_zero": (
        sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=3), mode="auto") @ sc.grad(loss),
        {"data": 8},
    ),
    "automatic": (sc.update(tx) @ sc.accumulate(4) @ sc.shard(sc.dp("data"), mode="auto") @ sc.grad(loss), {"data": 8}),
}  # fmt: skip


@cache
def lowered(name: str) -> sc.Lowered:
    pipeline, sizes = PLANS[name]
    step = sc.compile(pipeline, mesh=sizes and mesh_of(**sizes))
    batch = probe_batch(64)
    if step.rows_axis:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * step.steps_per_call), batch)
    params = wide_params() if name.startswith("zero") else probe_params()
    model_state = None if name == "turns" else probe_model_state(pipeline.transforms[-1], 64)
    return step.lower(step.init(params, model_state=model_state), batch)


@pytest.mark.parametrize("name", PLANS)
def test_plan_prints_as_its_golden_text(name: str, golden: Callable[[str, str, str], None]) -> None:
    golden("plans", name, str(lowered(name).plan))


# What is sharded takes several collectives, one for each leaf, and scalars besides: test_sharding.py counts bytes. XLA
# merges a reduction of the model state with that of the gradient, if both are sums in one dtype. Nobody knows how often
# a line search evaluates: tests/optimizers/test_whole_batch_loss.py compares one evaluation.
APART = ("zero", "automatic", "model_state_r", "line_search", "epochs")


@pytest.mark.parametrize("name", [name for name in PLANS if not name.startswith(APART)])
def test_plan_and_executable_agree_on_collectives(name: str) -> None:
    stage = lowered(name)
    planned = [(one.kind, one.executions, one.in_loop, set(one.axes)) for one in stage.plan.collectives]
    found = [(one.kind, one.executions, one.in_loop, set(one.axes)) for one in stage.compile().collectives()]
    assert sorted(planned, key=str) == sorted(found, key=str)


def test_plan_knows_the_loop_and_the_laws() -> None:
    plan = lowered("everything").plan
    assert plan.loop_length == 8
    names = {one.law.name for one in plan.laws}
    assert names == {"defer-reduce", "merge-scan", "merge-scale", "scale-past-mean", "drop-unit-scale"}
    assert plan.normal == plan.laws[-1].after
    assert lowered("one_device").plan.normal == lowered("one_device").plan.core


def test_plan_is_a_value() -> None:
    assert lowered("clip_outside").plan == lowered.__wrapped__("clip_outside").plan
    assert jax.tree.leaves(lowered("clip_outside").plan.rows) == ["data"]
