"""A user's program. `test_user_program.py` type-checks it and never runs it: nothing it uses of stepc may be `Any`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax

import stepc as sc

Arrays = dict[str, jax.Array]


def loss(params: Arrays, rows: Arrays) -> sc.Mean:
    error = rows["x"] @ params["w"] - rows["y"]
    return sc.Mean((jnp.square(error) * rows["mask"]).sum(), rows["mask"].sum())


def batches() -> Iterator[dict[str, np.ndarray]]:
    for seed in range(100):
        x = np.random.default_rng(seed).normal(size=(30, 3))
        batch, mask = sc.pad_batch({"x": x, "y": x.sum(axis=1)}, 32)
        yield {**batch, "mask": mask}


schedule = optax.cosine_decay_schedule(1e-3, 100)
partial = sc.ema(0.999) @ sc.skip_nonfinite() @ sc.update(optax.adamw(schedule)) @ sc.clip(1.0)
pipeline = partial @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(sc.cast(jnp.bfloat16) @ loss)
step = sc.compile(pipeline, mesh=jax.make_mesh((8,), ("data",)), budget=sc.Budget(gradient_reductions=1))
state = step.init({"w": np.zeros(3, np.float32)}, seed=0)
run = sc.run(step, state, batches(), steps=100, loggers=[sc.Console()], on_error=sc.Skip(limit=3))
compiled = step.lower(state, next(batches())).compile()

assert_type(sc.clip(1.0) @ sc.grad(loss), sc.Pipeline)
assert_type(partial, sc.Pipeline)
assert_type(pipeline, sc.Pipeline)
assert_type(step, sc.Step)
assert_type(state, sc.State)
assert_type(step(state, next(batches()))[0], sc.State)
assert_type(step.reference(state, next(batches()))[0], sc.State)
assert_type(sc.reference(pipeline, axes={"data": 8}), sc.Reference)
assert_type(run, sc.Run)
assert_type(run.steps, int)
assert_type(compiled, sc.Compiled)
assert_type(compiled.hlo(), str)
assert_type([row.bytes for row in compiled.collectives()], list[int])


@dataclass(frozen=True, repr=False)
class Signs(sc.Transform):
    takes = sc.Kind.GRADIENT
    gives = sc.Kind.GRADIENT

    def reference(self, inner: sc.Fn) -> sc.Fn:
        def apply(state: sc.State, microbatch: sc.Microbatch) -> sc.Gradient:
            gradient: sc.Gradient = inner.apply(state, microbatch)
            return gradient.map(signs)

        return sc.Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[sc.nodes.MapNode, ...]:
        return (sc.nodes.MapNode(signs),)


def signs(grads: Arrays) -> tuple[Arrays, Arrays]:
    return jax.tree.map(jnp.sign, grads), {}


assert_type(Signs() @ sc.grad(loss), sc.Pipeline)
