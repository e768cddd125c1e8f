"""A schedule becomes one pure function. The only file that names scan and shard_map. It decides nothing.

The region that computes gradients is manual over the mesh axes that rows lie along and automatic over the
others. Its reductions stand in a region of their own that is manual over all axes: in a partly automatic
region XLA gathers model-sharded operands of tiled collectives, and bfloat16 sums abort the process on CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, assert_never

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from stepc.compiler.check import checked_loss
from stepc.compiler.schedule import (
    Apply,
    Compute,
    Divide,
    Instruction,
    Loop,
    Multiply,
    Optimize,
    Reduce,
    Schedule,
    owes,
)
from stepc.language.kinds import Batch, Grads, Metrics, Params, Rows

# What flows from one instruction to the next. The metrics stand first: in a scan's carry, scalars after the gradient
# cost XLA's buffer assignment half a megabyte on the demo's GPT (measured, jax 0.10.2 on CPU).
Flow: TypeAlias = tuple[Metrics, Grads]
SCAN_NAME = "microbatches"  # the named scope of the loop, to find it again in compiled text


@dataclass(frozen=True)
class Place:
    """Where the program runs.

    Args:
      mesh: a mesh of Auto axes, or None for a single device.
      rows: the axes that rows lie along, the outermost first.
      params: a tree of PartitionSpec, one for each parameter; they name no axis of `rows`.
    """

    mesh: Mesh | None
    rows: tuple[str, ...]
    params: Any  # Any: the tree of the parameters

    @property
    def others(self) -> frozenset[str]:
        """The axes that stay automatic."""
        return frozenset(self.mesh.axis_names if self.mesh else ()) - set(self.rows)


def lower(schedule: Schedule, place: Place) -> Callable[[Params, Any, Batch], tuple[Params, Any, Metrics]]:
    """One step as a pure function `(params, opt_state, batch) -> (params, opt_state, metrics)`."""
    inside = max((index + 1 for index, one in enumerate(schedule) if owes((one,))), default=0)

    def region(params: Params, rows: Rows) -> Flow:
        return _run(schedule[:inside], None, params, rows, place)

    def step(params: Params, opt_state: Any, batch: Batch) -> tuple[Params, Any, Metrics]:
        flow = None
        if inside:
            rows = PartitionSpec(place.rows)
            spaced = jax.shard_map(
                region, mesh=place.mesh, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec(),
                axis_names=set(place.rows), check_vma=False,
            )  # fmt: skip
            flow = spaced(params, batch)
        flow = _run(schedule[inside:-1], flow, params, batch, place)
        return _optimize(schedule[-1], flow, params, opt_state)

    return step


def _run(schedule: Schedule, flow: Flow | None, params: Params, rows: Rows, place: Place) -> Any:
    for instruction in schedule:
        flow = _instruct(instruction, flow, params, rows, place)
    return flow


def _instruct(instruction: Instruction, flow: Any, params: Params, rows: Rows, place: Place) -> Flow:
    match instruction:
        case Compute(node):
            value, grads = jax.value_and_grad(checked_loss(node))(params, rows)
            return {"loss": value}, grads
        case Loop(size, body):
            return _loop(size, body, params, rows, place)
        case Reduce(axes):
            return _reduce(flow, axes, place)
        case Multiply(factor):
            metrics, grads = flow
            return metrics, jax.tree.map(lambda leaf: leaf * factor, grads)
        case Divide(count):
            return jax.tree.map(lambda leaf: leaf / count, flow)
        case Apply(node):
            metrics, grads = flow
            grads, added = node.function(grads, *node.arguments)
            return {**metrics, **added}, grads
        case Optimize():
            raise ValueError("an update stands last, and only once")
        case _:
            assert_never(instruction)


def _loop(size: int, body: Schedule, params: Params, rows: Rows, place: Place) -> Flow:
    # [n, ...] -> [n / size, size, ...]: part j is the rows i with i mod size = j, without moving one.
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), rows)
    # Inlined, so the program holds no trace of it; jitted, so the shapes and the loop share one trace of the loss.
    cell = jax.jit(lambda params, rows: _run(body, None, params, rows, place), inline=True)

    def part(index: jax.Array) -> Rows:
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False, allow_negative_indices=False)
        return jax.tree.map(take, parts)

    # The number of the turn is carried, not scanned over: an array of numbers would be read for every row.
    def turn(carry: tuple[jax.Array, Flow], _: None) -> tuple[tuple[jax.Array, Flow], None]:
        index, total = carry
        return (index + 1, jax.tree.map(jnp.add, total, cell(params, part(index)))), None

    first = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: cell(params, part(first)))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    with jax.named_scope(SCAN_NAME):
        (_, total), _ = jax.lax.scan(turn, (first, zeros), None, length=size)
    return total


def _reduce(flow: Flow, axes: tuple[str, ...], place: Place) -> Flow:
    def add_up(flow: Flow) -> Flow:
        return jax.lax.psum(flow, axes)

    if not place.others:
        return add_up(flow)
    specs = (jax.tree.map(lambda _: PartitionSpec(), flow[0]), place.params)
    # All axes are manual in here; the mesh is the context's, as jax demands of a nested region.
    return jax.shard_map(
        add_up, in_specs=(specs,), out_specs=specs, axis_names=set(place.others), check_vma=False
    )(flow)  # fmt: skip


def _optimize(instruction: Instruction, flow: Any, params: Params, opt_state: Any) -> tuple[Params, Any, Metrics]:
    match instruction:
        case Optimize(node):
            optimizer = optax.with_extra_args_support(node.optimizer)
            metrics, grads = flow
            updates, opt_state = optimizer.update(grads, opt_state, params, value=metrics["loss"], grad=grads)
            return optax.apply_updates(params, updates), opt_state, metrics
        case _:
            raise ValueError("a schedule ends in an update")
