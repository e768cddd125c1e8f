"""What flows from one instruction of a schedule to the next, and what adds up in it. It knows no loop and no mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from stepc._compiler.collectives import (
    ManualRegion,
    all_gather,
    all_reduce,
    average_model_state,
    axis_index,
    gather_by_layer,
    reduce_scatter,
)
from stepc._compiler.gradient import (
    GradientSum,
    LocalMicrobatch,
    StepInputs,
    add_sums,
    scale_counts,
    sum_over_vmap,
    zero_sum,
)
from stepc._compiler.loss import Call, checked_loss, counts_of, keys_of, num_rows
from stepc._compiler.metrics import (
    Diagnostics,
    MetricAccumulator,
    accumulate_metric,
    final_metrics,
)
from stepc._compiler.schedule import (
    AllGather,
    AllReduce,
    Apply,
    AverageModelState,
    Compute,
    Count,
    CountFirst,
    DivideByCount,
    Instruction,
    Multiply,
    Optimize,
    ReduceScatter,
    RepeatSteps,
    ScanMicrobatches,
    Schedule,
    Unscale,
    Vmap,
    draws,
    gradient_is_sharded,
    has_reduction,
)
from stepc._compiler.validation import check_fixed_point, check_gradient
from stepc._core.nodes import DifferentiateNode, MapNode
from stepc._language.kinds import Batch, Grads, Metrics, Params
from stepc._language.semantics import draw_tag
from stepc._language.state import SkipCounts, State, leaves_by_path
from stepc._language.terms import (
    LossOutcome,
    Sums,
    accumulation_dtype,
    divide_by_count,
    is_static,
    merge_terms,
    sum_arrays,
    sum_of_squares,
)


def compute_gradient(instruction: Compute, call: Call, cell: LocalMicrobatch, given: StepInputs) -> GradientSum:
    """The loss and its gradient on one cell."""
    node = instruction.node
    keys = None if node.rng is None else keys_of(node, given.key, cell.numbers)

    def scaled(params: Params) -> tuple[jax.Array, LossOutcome]:
        outcome = call(params, cell.rows, keys, given.model_state)
        terms = merge_terms(outcome.terms)
        total = _total(terms, given) if instruction.counts_first else terms[0].total
        return total * given.scale if instruction.rescaled else total, outcome

    (_, outcome), grads = jax.value_and_grad(scaled, has_aux=True)(given.params)
    sums = jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads)
    finite = jnp.isfinite(sum_arrays([term.total for term in outcome.terms]))[None]
    metrics = {
        "loss": accumulate_metric(Sums(outcome.terms)),
        **{name: accumulate_metric(one) for name, one in outcome.metrics.items()},
    }
    return GradientSum(metrics, sums, outcome.model_state, finite, instruction.count)


def compute_counts(node: DifferentiateNode, cell: LocalMicrobatch, given: StepInputs) -> GradientSum:
    """The counts of one cell, as a flow of nothing else."""
    keys = None if node.rng is None else keys_of(node, given.key, cell.numbers)
    counts = counts_of(node, given.params, given.model_state, cell.rows, keys)
    return GradientSum(
        {str(n): (MetricAccumulator(one, None, "sum"),) for n, one in enumerate(counts)}, (), None, jnp.ones(1, bool)
    )


def divide_sum(instruction: DivideByCount, flow: GradientSum, params: Params) -> GradientSum:
    """The sum becomes a value."""

    def divided(count: Any) -> Grads:  # Any: a number, or a scalar
        return flow.grads if count is None else jax.tree.map(lambda leaf: divide_by_count(leaf, count), flow.grads)

    match instruction.by:
        case "nothing":
            value = divided(None)
        case "count":
            value = divided(next(one.count for one in flow.metrics["loss"] if one.count is not None))
        case _:
            value = divided(None if flow.count == 1 else flow.count)
    return replace(flow, grads=jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), params, value), count=1.0)


def reopen_sum(grads: Grads, added: dict[str, jax.Array], flow: GradientSum) -> GradientSum:
    """A value becomes a sum of one part again, with metrics of its own."""
    sums = jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), grads)
    metrics = {name: (MetricAccumulator(jnp.asarray(value), None, "mean", 1.0),) for name, value in added.items()}
    return replace(flow, grads=sums, metrics={**flow.metrics, **metrics})


def _total(terms: tuple[Any, ...], given: StepInputs) -> jax.Array:
    """Each term divided by its count over the whole sum, and added up."""
    found = iter(given.counts)
    wholes = [given.parts * term.count if is_static(term.count) else next(found) for term in terms]
    parts = [divide_by_count(term.total, whole) for term, whole in zip(terms, wholes, strict=True)]
    return sum_arrays(parts)


def apply_map(node: MapNode, grads: Grads, value: Any, keys: tuple[Any, ...]) -> tuple[Grads, dict[str, Any]]:
    """What a transform makes of a gradient, which is one, and its metrics. Any: what it measured; typed keys; scalars."""
    returned = node.applied(grads, value, *keys)
    check_gradient(node.written, returned, grads)
    return returned


class HeldGradient(NamedTuple):
    """All that the second time needs: the sum, what was measured, the keys of what draws."""

    flow: GradientSum
    measures: tuple[Any, ...]  # Any: what each transform measured, or None
    keys: tuple[tuple[Any, ...], ...]  # Any: a typed key for each transform that draws


@dataclass(frozen=True)
class FinalMaps:
    """The last division, and the last transforms that keep what is finite finite."""

    settle: DivideByCount
    applies: tuple[Apply, ...]

    def measured(
        self, flow: GradientSum, keys: tuple[tuple[Any, ...], ...], params: Params
    ) -> tuple[HeldGradient, GradientSum, Any]:
        """What is held for the second time, the value with all its metrics, and the sums of squares of the first."""
        value = divide_sum(self.settle, flow, params)
        squares = jax.tree.map(sum_of_squares, value.grads)
        measures = []
        for one, key in zip(self.applies, keys, strict=True):
            measure, told = one.node.measured(value.grads)
            value = _applied(one, reopen_sum(value.grads, told, value), measure, key, params)
            measures.append(measure)
        return HeldGradient(flow, tuple(measures), keys), value, squares

    def finished(self, held: HeldGradient, params: Params) -> Grads:
        """What the optimizer is given."""
        value = divide_sum(self.settle, held.flow, params)
        for one, measure, key in zip(self.applies, held.measures, held.keys, strict=True):
            value = _applied(one, value, measure, key, params)
        return value.grads


def final_maps_of(schedule: Schedule) -> tuple[int, FinalMaps]:
    """Where it begins, and what it is. The optimizer is the last instruction."""
    place, applies = len(schedule) - 2, []
    while place > 1:
        match schedule[place - 1 : place + 1]:
            case (Apply(node) as one, DivideByCount("cells", 1.0, False)) if node.keeps_finite:
                applies.append(one)
                place -= 2
            case _:
                break
    settle = schedule[place]
    if not isinstance(settle, DivideByCount):
        raise ValueError("a gradient is settled before the optimizer takes it")
    return place, FinalMaps(settle, tuple(reversed(applies)))


def _applied(one: Apply, flow: GradientSum, measure: Any, key: tuple[Any, ...], params: Params) -> GradientSum:
    grads, told = apply_map(one.node, flow.grads, measure, key)
    flow = reopen_sum(grads, told, flow)
    return replace(flow, grads=jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), params, flow.grads))


class StepOutputs(NamedTuple):
    """A step that was made: the state after it, what it reports, what it saw."""

    state: State
    metrics: Metrics
    watch: Diagnostics


class FinitenessInputs(NamedTuple):
    """What was seen on the way: of each cell whether its loss is finite, of each leaf the sum of squares."""

    losses: jax.Array
    squares: Any  # Any: a tree like the parameters


class ParameterConstraints(NamedTuple):
    """How a tree like the parameters is told to lie."""

    parts: Callable[[Any], Any]  # as the optimizer works on it
    whole: Callable[[Any], Any]  # as the state has it


def finish_step(
    optimize: Optimize,
    ending: FinalMaps,
    held: HeldGradient,
    metrics: Metrics,
    sight: FinitenessInputs,
    state: State,
    laying: ParameterConstraints,
) -> StepOutputs:
    """Make the step, unless it is to be skipped."""
    metrics = dict(metrics)
    adapts: Any = True  # Any: a bool, or one on the device
    step = partial(_apply_optimizer, optimize, ending, laying)
    loss_is_finite = jnp.isfinite(metrics["loss"])
    gradient_is_finite = jnp.isfinite(sum_arrays(jax.tree.leaves(sight.squares)))
    is_finite = loss_is_finite & gradient_is_finite
    if optimize.guard is not None:
        new = _apply_if(is_finite, step, held, metrics["loss"], state)
    elif optimize.rescale is not None:
        new = _apply_if(gradient_is_finite, step, held, metrics["loss"], state)
    else:
        new = step(held, metrics["loss"], state)
    slots = dict(new.slots)
    if optimize.rescale is not None:
        name, node = optimize.rescale
        metrics[name] = jax.tree.leaves(state.slots[name])[0]
        slots[name] = node.advance(state.slots[name], loss_is_finite, gradient_is_finite, *node.arguments)
        if slots[name] is not state.slots[name]:  # a scale that is not fixed
            adapts = jax.tree.leaves(slots[name])[0] < metrics[name]
    if optimize.guard is not None:
        name, _ = optimize.guard
        skipped = 1 - is_finite.astype(jnp.int32)
        before: SkipCounts = state.slots[name]
        slots[name] = SkipCounts(before.total + skipped, (before.consecutive + skipped) * skipped)
        metrics["skipped"] = skipped
    # An overflow that the scale of the loss adapts to is nothing to stop for. At its smallest it adapts no more, and
    # not one further step would be made.
    can_go_on = loss_is_finite & (gradient_is_finite | adapts)
    is_fine = can_go_on if optimize.guard is None and optimize.rescale is not None else is_finite
    paths, squares = zip(*leaves_by_path(sight.squares), strict=True)
    return StepOutputs(
        replace(new, slots=slots), metrics, Diagnostics(is_fine, sight.losses, jnp.stack(squares), paths)
    )


def _apply_if(
    happens: jax.Array, step: Callable[..., State], held: HeldGradient, loss: jax.Array, state: State
) -> State:
    # A condition, not a selection: no copy of the state, and nothing to compute when it stays (facts measured on CPU:
    # a selection adds a third to the time of an optimizer). What a branch reads is passed to it.
    def stay(held: HeldGradient, loss: jax.Array, state: State) -> State:
        return state

    try:
        return jax.lax.cond(happens, step, stay, held, loss, state)
    except TypeError:  # the branches differ: the step is no fixed point, which is said better there
        check_fixed_point(state, step(held, loss, state))
        raise


def _apply_optimizer(
    optimize: Optimize,
    ending: FinalMaps,
    laying: ParameterConstraints,
    held: HeldGradient,
    loss: jax.Array,
    state: State,
) -> State:
    params = laying.parts(state.params)
    grads = ending.finished(held, params)
    optimizer = optax.with_extra_args_support(optimize.node.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, params, value=loss, grad=grads)
    params = laying.parts(optax.apply_updates(params, updates))
    slots = dict(state.slots)
    for name, node in optimize.follows:
        slots[name] = node.advance(slots[name], params, *node.arguments)
    new = replace(state, params=laying.whole(params), opt_state=opt_state, step=state.step + 1, slots=slots)
    return replace(new, model_state=held.flow.model_state)


SCAN_NAME = "microbatches"  # the named scope of the loop, to find it again in compiled text
STEPS_NAME = "steps"  # that of `repeat`


def lower_schedule(schedule: Schedule, place: ManualRegion) -> Callable[[State, Batch], StepOutputs]:
    """One dispatch as a pure function."""
    match schedule:
        case (RepeatSteps(node, body),):
            step = lower_schedule(body, place)

            def turn(state: State, batch: Batch) -> tuple[State, tuple[Any, Any]]:
                found = step(state, batch)
                return found.state, (found.metrics, found.watch)

            def steps(state: State, batches: Batch) -> StepOutputs:
                with jax.named_scope(STEPS_NAME):
                    state, (metrics, watch) = jax.lax.scan(turn, state, batches, length=node.size)
                return StepOutputs(state, metrics, watch)

            return steps
        case _:
            return partial(_step, schedule, place)


def _step(schedule: Schedule, place: ManualRegion, state: State, batch: Batch) -> StepOutputs:
    inside = max((index + 1 for index, one in enumerate(schedule) if has_reduction((one,))), default=0)
    optimize = schedule[-1]
    if not isinstance(optimize, Optimize):
        raise ValueError("a schedule ends in an update")
    key = jax.random.fold_in(state.rng, state.step) if draws(schedule) else None
    scale = None if optimize.rescale is None else jax.tree.leaves(state.slots[optimize.rescale[0]])[0]
    numbers = jnp.arange(num_rows(batch), dtype=jnp.int32) if place.numbered else None
    given, cell = StepInputs(state.params, state.model_state, key, scale, None), LocalMicrobatch(batch, numbers)

    def region(params: Params, given: StepInputs, cell: LocalMicrobatch) -> tuple[GradientSum, Grads, jax.Array]:
        given = replace(given, params=params)
        if cell.numbers is not None:
            given = replace(given, start=cell.numbers[0], width=num_rows(cell.rows))
        flow = _run(schedule[:inside], None, cell, given, place)
        return replace(flow, grads=(), finite=None), flow.grads, flow.finite[None]

    flow, finite = None, None
    if inside:
        rows, params = PartitionSpec(place.rows), place.manual_specs(divided=place.divided)
        grads = place.manual_specs(divided=gradient_is_sharded(schedule))
        spaced = jax.shard_map(
            region, mesh=place.mesh, in_specs=(params, PartitionSpec(), rows), out_specs=(PartitionSpec(), grads, rows),
            axis_names=set(place.rows), check_vma=False,
        )  # fmt: skip
        flow, grads, finite = spaced(given.params, replace(given, params=()), cell)
        flow = replace(flow, grads=grads)
    last, ending = final_maps_of(schedule)
    flow = _run(schedule[inside:last], flow, cell, given, place)
    flow = replace(flow, grads=place.laid(flow.grads, divided=True))
    keys = tuple(_keys_of(one, cell, given, place) for one in ending.applies)
    held, value, squares = ending.measured(flow, keys, given.params)
    sight = FinitenessInputs(flow.finite[None] if finite is None else finite, squares)
    laying = ParameterConstraints(partial(place.divide, divided=True), partial(place.divide, divided=place.divided))
    return finish_step(optimize, ending, held, final_metrics(value.metrics), sight, state, laying)


def _run(
    schedule: Schedule, flow: GradientSum | None, cell: LocalMicrobatch, given: StepInputs, place: ManualRegion
) -> Any:
    for instruction in schedule:
        if isinstance(instruction, CountFirst):
            counts = _run(instruction.body, None, cell, given, place)
            values = tuple(counts.metrics[str(n)][0].value for n in range(len(counts.metrics)))
            given = replace(given, counts=values, parts=int(counts.count))
        elif isinstance(instruction, AllGather):
            given = all_gather(instruction, given, place)
        else:
            flow = _instruct(instruction, flow, cell, given, place)
    return flow


def _instruct(
    instruction: Instruction, flow: Any, cell: LocalMicrobatch, given: StepInputs, place: ManualRegion
) -> GradientSum:
    match instruction:
        case Compute(node):
            call = gather_by_layer(instruction, checked_loss(node), given, place)
            return compute_gradient(instruction, call, cell, given)
        case Count(node):
            return compute_counts(node, cell, given)
        case ScanMicrobatches():
            return _loop(instruction, cell, given, place)
        case Vmap(body):
            return _vectorise(body, cell, given, place)
        case AllReduce():
            return all_reduce(instruction, flow, given, place)
        case ReduceScatter():
            return reduce_scatter(instruction, flow, place)
        case AverageModelState():
            return average_model_state(instruction, flow, place)
        case Multiply(factor):
            return replace(flow, grads=jax.tree.map(lambda leaf: leaf * factor, flow.grads))
        case Unscale():
            return replace(flow, grads=jax.tree.map(lambda leaf: leaf / given.scale, flow.grads))
        case DivideByCount():
            return divide_sum(instruction, flow, given.params)
        case Apply(node):
            value, told = node.measured(flow.grads)
            grads, added = apply_map(node, flow.grads, value, _keys_of(instruction, cell, given, place))
            return reopen_sum(grads, {**told, **added}, flow)
        case Optimize() | RepeatSteps() | CountFirst() | AllGather():
            raise ValueError(f"{type(instruction).__name__} has another place")
        case _:
            assert_never(instruction)


def _loop(loop: ScanMicrobatches, cell: LocalMicrobatch, given: StepInputs, place: ManualRegion) -> GradientSum:
    # [n, ...] -> [n / size, size, ...]: part j is the rows i with i mod size = j, without moving one.
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, loop.size, *leaf.shape[1:]), cell)
    # Inlined, so the program holds no trace of it; jitted, so the shapes and the loop share one trace of the loss.
    body = jax.jit(lambda cell, given: _run(loop.body, None, cell, given, place), inline=True)

    def part(index: jax.Array) -> LocalMicrobatch:
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False, allow_negative_indices=False)
        return jax.tree.map(take, parts)

    # The number of the turn is carried, not scanned over: an array of numbers would be read for every row.
    def turn(
        so_far: tuple[jax.Array, GradientSum, Any], _: None
    ) -> tuple[tuple[jax.Array, GradientSum, Any], jax.Array]:
        index, total, model_state = so_far
        flow = body(part(index), replace(given, model_state=model_state))
        return (index + 1, add_sums(total, flow, loop.dtype), flow.model_state), flow.finite

    first = jnp.zeros((), jnp.int32)
    shapes = jax.eval_shape(lambda: body(part(first), given))
    with jax.named_scope(SCAN_NAME):
        start = (first, zero_sum(shapes, loop.dtype), given.model_state)
        (_, total, model_state), finite = jax.lax.scan(turn, start, None, length=loop.size)
    return scale_counts(replace(total, model_state=model_state, finite=finite.reshape(-1)), loop.size)


def _vectorise(body: Schedule, cell: LocalMicrobatch, given: StepInputs, place: ManualRegion) -> GradientSum:
    singles = jax.tree.map(lambda leaf: leaf[:, None], cell)
    flow = jax.vmap(lambda single: _run(body, None, single, given, place))(singles)
    return sum_over_vmap(flow, num_rows(cell.rows))


def _keys_of(
    one: Apply, cell: LocalMicrobatch, given: StepInputs, place: ManualRegion
) -> tuple[Any, ...]:  # Any: a typed key
    """The key of a transform that draws, from the number of the cell's first row; it spans devices that are added up."""
    if one.name is None:
        return ()
    number = cell.numbers[0]
    if given.start is not None:
        for axis in one.summed:
            inner = place.size_of(place.rows[place.rows.index(axis) + 1 :])
            number = number - axis_index(axis, given, place) * inner * given.width
    return (jax.random.fold_in(jax.random.fold_in(given.key, draw_tag(one.name)), number),)
