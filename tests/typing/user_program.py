# pyright: strict
"""A user's program. `test_user_program.py` type-checks it and never runs it: nothing it uses of stepc may be `Any`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax  # pyright: ignore[reportMissingTypeStubs]

import stepc as sc

Arrays = dict[str, jax.Array]
HostArrays = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]


def loss(params: Arrays, rows: Arrays) -> sc.Mean:
    error = rows["x"] @ params["w"] - rows["y"]
    return sc.Mean((jnp.square(error) * rows["mask"]).sum(), rows["mask"].sum())


def batches() -> Iterator[HostArrays]:
    for seed in range(100):
        x = np.random.default_rng(seed).normal(size=(30, 3)).astype(np.float32)
        rows: HostArrays = {"x": x, "y": np.asarray(x.sum(axis=1))}
        batch, mask = sc.pad_batch(rows, 32)
        yield {**assert_type(batch, HostArrays), "mask": mask.astype(np.float32)}


class Losses:
    def __init__(self) -> None:
        self.logged: list[float] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append(metrics["loss"])


def copies(step: int, metrics: Mapping[str, float], snapshot: Callable[[], object]) -> None:
    print(step, metrics["loss"], snapshot())


def judged(state: sc.State, rows: Arrays) -> dict[str, sc.Mean]:
    return {"loss": loss(state.params, rows)}


schedule = optax.cosine_decay_schedule(1e-3, 100)
partial = sc.ema(0.999) @ sc.skip_nonfinite() @ sc.update(optax.adamw(schedule)) @ sc.clip(1.0)
pipeline = partial @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(sc.cast(jnp.bfloat16) @ loss)
mesh = jax.make_mesh((8,), ("data",))  # pyright: ignore[reportUnknownMemberType]
step = sc.compile(pipeline, mesh=mesh, budget=sc.Budget(gradient_reductions=1))
state = step.init({"w": np.zeros(3, np.float32)}, seed=0)
state, metrics = step(state, next(batches()))
run = sc.run(
    step, state, sc.Data(batches(), prefetch=2), steps=100, loggers=[sc.Console(), Losses()], hooks=[(10, copies)],
    on_error={"data": sc.Retry(), "nonfinite": sc.Skip(limit=3)}, checkpoint=sc.Checkpoints("runs/first", every=10),
    eval=sc.Eval(10, judged, [next(batches())]), watchdog=sc.Watchdog(warn_seconds=60), buffers=sc.Buffers(in_flight=4),
    reject_if=lambda metrics: "it leapt" if metrics["loss"] > 10 else None, profile=sc.Profile(1, 2, "traces"),
)  # fmt: skip
compiled = step.lower(run.state, next(batches())).compile()
compiled.check(sc.Budget(donated=True), traces=step.traces)

assert_type(sc.clip(1.0) @ sc.grad(loss), sc.Pipeline)
assert_type(partial, sc.Pipeline)
assert_type(pipeline, sc.Pipeline)
assert_type(step, sc.Step)
assert_type(state, sc.State)
assert_type(metrics["loss"], jax.Array)
assert_type(step.reference(state, next(batches())), tuple[sc.State, Arrays])
assert_type(sc.reference(pipeline, axes={"data": 8}), sc.Reference)
assert_type(sc.reference(pipeline, axes={"data": 8})(state, next(batches())), tuple[sc.State, Arrays])
assert_type(run, sc.Run[sc.State])
assert_type((run.state, run.steps, run.metrics), tuple[sc.State, int, dict[str, float | np.ndarray]])
assert_type(sc.restore("runs/first", like=state, only="params/**"), sc.State)
assert_type(step.lower(state, next(batches())), sc.Lowered)
assert_type(compiled, sc.Compiled)
assert_type(compiled.hlo(), str)
assert_type([row.bytes for row in compiled.collectives()], list[int])
assert_type([leaf.aliased for leaf in compiled.donated()], list[bool])
assert_type(compiled.memory().total, int)


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

try:
    sc.run(step, state, batches())
except sc.StepError as error:
    assert_type((error.phase, error.step, error.state_ok), tuple[str, int, bool])
except sc.Preempted as preempted:
    assert_type(preempted.run.steps, int)
