"""A schedule becomes one pure function. Only it names scan, only it and `devices` shard_map. It decides nothing.

The region that computes gradients is manual over the mesh axes that rows lie along and automatic over the
others; what devices say to each other in it stands in `devices`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from stepc.compiler import devices, tally
from stepc.compiler import flow as flows
from stepc.compiler.devices import Place
from stepc.compiler.ending import ending_of
from stepc.compiler.flow import Cell, Flow, Given
from stepc.compiler.instructions import (
    Again,
    Apply,
    AverageCarry,
    Compute,
    Count,
    CountFirst,
    Gather,
    Instruction,
    Loop,
    Multiply,
    Optimize,
    Reduce,
    Scatter,
    Schedule,
    Settle,
    Unscale,
    Vectorise,
)
from stepc.compiler.loss import checked_loss, num_rows
from stepc.compiler.making import Laying, Made, Sight, made
from stepc.compiler.parts import is_scattered
from stepc.compiler.schedule import draws, owes
from stepc.language.kinds import Batch, Grads, Params
from stepc.language.meaning import tag_of
from stepc.language.state import State

SCAN_NAME = "microbatches"  # the named scope of the loop, to find it again in compiled text
STEPS_NAME = "steps"  # that of `repeat`


def lower(schedule: Schedule, place: Place) -> Callable[[State, Batch], Made]:
    """One dispatch as a pure function."""
    match schedule:
        case (Again(node, body),):
            step = lower(body, place)

            def turn(state: State, batch: Batch) -> tuple[State, tuple[Any, Any]]:
                found = step(state, batch)
                return found.state, (found.metrics, found.watch)

            def steps(state: State, batches: Batch) -> Made:
                with jax.named_scope(STEPS_NAME):
                    state, (metrics, watch) = jax.lax.scan(turn, state, batches, length=node.size)
                return Made(state, metrics, watch)

            return steps
        case _:
            return partial(_step, schedule, place)


def _step(schedule: Schedule, place: Place, state: State, batch: Batch) -> Made:
    inside = max((index + 1 for index, one in enumerate(schedule) if owes((one,))), default=0)
    optimize = schedule[-1]
    if not isinstance(optimize, Optimize):
        raise ValueError("a schedule ends in an update")
    key = jax.random.fold_in(state.rng, state.step) if draws(schedule) else None
    scale = None if optimize.rescale is None else jax.tree.leaves(state.slots[optimize.rescale[0]])[0]
    numbers = jnp.arange(num_rows(batch), dtype=jnp.int32) if place.numbered else None
    given, cell = Given(state.params, state.carry, key, scale, None), Cell(batch, numbers)

    def region(params: Params, given: Given, cell: Cell) -> tuple[Flow, Grads, jax.Array]:
        given = replace(given, params=params)
        if cell.numbers is not None:
            given = replace(given, start=cell.numbers[0], width=num_rows(cell.rows))
        flow = _run(schedule[:inside], None, cell, given, place)
        return replace(flow, grads=(), finite=None), flow.grads, flow.finite[None]

    flow, finite = None, None
    if inside:
        rows, params = PartitionSpec(place.rows), place.manual_specs(divided=place.divided)
        grads = place.manual_specs(divided=is_scattered(schedule))
        spaced = jax.shard_map(
            region, mesh=place.mesh, in_specs=(params, PartitionSpec(), rows), out_specs=(PartitionSpec(), grads, rows),
            axis_names=set(place.rows), check_vma=False,
        )  # fmt: skip
        flow, grads, finite = spaced(given.params, replace(given, params=()), cell)
        flow = replace(flow, grads=grads)
    last, ending = ending_of(schedule)
    flow = _run(schedule[inside:last], flow, cell, given, place)
    flow = replace(flow, grads=place.laid(flow.grads, divided=True))
    keys = tuple(_keys_of(one, cell, given, place) for one in ending.applies)
    held, value, squares = ending.measured(flow, keys, given.params)
    sight = Sight(flow.finite[None] if finite is None else finite, squares)
    laying = Laying(partial(place.divide, divided=True), partial(place.divide, divided=place.divided))
    return made(optimize, ending, held, tally.reported(value.metrics), sight, state, laying)


def _run(schedule: Schedule, flow: Flow | None, cell: Cell, given: Given, place: Place) -> Any:
    for instruction in schedule:
        if isinstance(instruction, CountFirst):
            counts = _run(instruction.body, None, cell, given, place)
            values = tuple(counts.metrics[str(n)][0].value for n in range(len(counts.metrics)))
            given = replace(given, counts=values, parts=int(counts.count))
        elif isinstance(instruction, Gather):
            given = devices.gathered(instruction, given, place)
        else:
            flow = _instruct(instruction, flow, cell, given, place)
    return flow


def _instruct(instruction: Instruction, flow: Any, cell: Cell, given: Given, place: Place) -> Flow:
    match instruction:
        case Compute(node):
            call = devices.layered(instruction, checked_loss(node), given, place)
            return flows.computed(instruction, call, cell, given)
        case Count(node):
            return flows.counted(node, cell, given)
        case Loop():
            return _loop(instruction, cell, given, place)
        case Vectorise(body):
            return _vectorise(body, cell, given, place)
        case Reduce():
            return devices.reduced(instruction, flow, given, place)
        case Scatter():
            return devices.scattered(instruction, flow, place)
        case AverageCarry():
            return devices.averaged(instruction, flow, place)
        case Multiply(factor):
            return replace(flow, grads=jax.tree.map(lambda leaf: leaf * factor, flow.grads))
        case Unscale():
            return replace(flow, grads=jax.tree.map(lambda leaf: leaf / given.scale, flow.grads))
        case Settle():
            return flows.settled(instruction, flow, given.params)
        case Apply(node):
            value, told = node.measured(flow.grads)
            grads, added = flows.applied(node, flow.grads, value, _keys_of(instruction, cell, given, place))
            return flows.opened(grads, {**told, **added}, flow)
        case Optimize() | Again() | CountFirst() | Gather():
            raise ValueError(f"{type(instruction).__name__} has another place")
        case _:
            assert_never(instruction)


def _loop(loop: Loop, cell: Cell, given: Given, place: Place) -> Flow:
    # [n, ...] -> [n / size, size, ...]: part j is the rows i with i mod size = j, without moving one.
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, loop.size, *leaf.shape[1:]), cell)
    # Inlined, so the program holds no trace of it; jitted, so the shapes and the loop share one trace of the loss.
    body = jax.jit(lambda cell, given: _run(loop.body, None, cell, given, place), inline=True)

    def part(index: jax.Array) -> Cell:
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False, allow_negative_indices=False)
        return jax.tree.map(take, parts)

    # The number of the turn is carried, not scanned over: an array of numbers would be read for every row.
    def turn(so_far: tuple[jax.Array, Flow, Any], _: None) -> tuple[tuple[jax.Array, Flow, Any], jax.Array]:
        index, total, carry = so_far
        flow = body(part(index), replace(given, carry=carry))
        return (index + 1, flows.added(total, flow, loop.dtype), flow.carry), flow.finite

    first = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: body(part(first), given))
    with jax.named_scope(SCAN_NAME):
        start = (first, flows.none_yet(shapes, loop.dtype), given.carry)
        (_, total, carry), finite = jax.lax.scan(turn, start, None, length=loop.size)
    return flows.times(replace(total, carry=carry, finite=finite.reshape(-1)), loop.size)


def _vectorise(body: Schedule, cell: Cell, given: Given, place: Place) -> Flow:
    singles = jax.tree.map(lambda leaf: leaf[:, None], cell)
    flow = jax.vmap(lambda single: _run(body, None, single, given, place))(singles)
    return flows.over_lanes(flow, num_rows(cell.rows))


def _keys_of(one: Apply, cell: Cell, given: Given, place: Place) -> tuple[Any, ...]:  # Any: a typed key
    """The key of a word that draws, from the number of the cell's first row; it spans devices that are added up."""
    if one.name is None:
        return ()
    number = cell.numbers[0]
    if given.start is not None:
        for axis in one.summed:
            inner = place.size_of(place.rows[place.rows.index(axis) + 1 :])
            number = number - devices.coordinate(axis, given, place) * inner * given.width
    return (jax.random.fold_in(jax.random.fold_in(given.key, tag_of(one.name)), number),)
