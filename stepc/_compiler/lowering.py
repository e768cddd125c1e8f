"""A schedule becomes one pure function from a state and a batch to the next state. It decides nothing.

To be read from top to bottom: `_step` is one step, in the order in which a device runs it; the functions after it are
its parts, in that order too. The collectives of the manual region are in `collectives`.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from stepc._compiler.collectives import (
    HeldParams,
    ManualRegion,
    all_gather,
    all_reduce,
    gather_encoded,
    gather_outside,
    gathered_shapes,
    gathering_loss,
    reduce_model_state,
    reduce_scatter,
    shard_gradient,
    take_rows,
)
from stepc._compiler.loss import checked_encoder, checked_head, checked_loss, counts_of, keys_of, num_rows
from stepc._compiler.matrices import gathering
from stepc._compiler.memory import is_on_host, to_device, to_memory_of
from stepc._compiler.metrics import (
    Diagnostics,
    MetricAccumulator,
    MetricAccumulators,
    TurnDiagnostics,
    accumulate_metric,
    add_metrics,
    final_metrics,
    reduce_vmap_metrics,
    reported_once,
    scale_metric_counts,
    zero_metrics,
)
from stepc._compiler.padding import cut_along, padded_along
from stepc._compiler.placement import cut_leaves, padded_leaves
from stepc._compiler.schedule import (
    Across,
    AllGather,
    AllReduce,
    Apply,
    Compute,
    Count,
    CountFirst,
    DivideByCount,
    Encode,
    Evaluate,
    Instruction,
    ModelStateLeaf,
    Multiply,
    Optimize,
    Perturb,
    ReduceModelState,
    ReduceScatter,
    RepeatSteps,
    ScanMicrobatches,
    Schedule,
    ShardGradient,
    TakeTurns,
    Unscale,
    Value,
    Vmap,
    all_instructions,
    draws,
    gradient_is_sharded,
    reduces,
)
from stepc._compiler.validation import check_fixed_point, check_gradient, check_metric_names
from stepc._core.nodes import slot_name
from stepc._language.encoded import Encoded, is_floating
from stepc._language.kinds import Batch, BatchRows, Grads, Metrics, Params
from stepc._language.model_state import (
    SUMMED,
    add_results,
    fold_key,
    next_leaves,
    overwrite,
    overwritten_leaves,
    part_of_mean,
    start_of_sum,
    wide_result,
)
from stepc._language.optimizers import WHOLE_BATCH_LOSSES, injected_hyperparameters, run_optimizer
from stepc._language.semantics import draw_tag, narrowed
from stepc._language.state import (
    EVERY_LEAF,
    SkipCounts,
    State,
    after_turn,
    blank_metric,
    is_trained,
    leaves_by_path,
    own_shapes,
    padded_places,
    state_of_turn,
    trained_leaves,
    values_read,
    with_frozen,
)
from stepc._language.terms import (
    LossOutcome,
    Mean,
    Sums,
    divide_by_count,
    is_static,
    merge_terms,
    power_of_two,
    squares_of,
    sum_arrays,
    sum_of_squares,
    widened,
)

SCAN_NAME = "microbatches"  # the named scope of the scan, by which it is found in compiled text
STEPS_NAME = "steps"  # that of `repeat` and `epochs`
ZERO = 0.0  # what padding is in a gradient: it changes no sum and no norm
NORM_NAME = "gradient_norm"  # that of the norm by which a step is known to be finite: no transform asks for it


class StepOutputs(NamedTuple):
    """What one call of a step returns."""

    state: State
    metrics: Metrics
    diagnostics: Diagnostics | TurnDiagnostics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalMicrobatch:
    """The rows of one call of the loss, or rows that are still to be split into those.

    Args:
      rows: a batch with fewer rows.
      numbers: int32 `[rows]`, their positions in the batch; None if nothing depends on them.
      model_state: the leaves whose rule is "rows", and None for the others.
      cotangents: of a loss of the whole batch, of each leaf with rows through which a gradient flows.
    """

    rows: BatchRows
    numbers: Any  # Any: an array, or None
    model_state: tuple[Any, ...] = ()  # Any: arrays, or None
    cotangents: tuple[Any, ...] = ()  # Any: arrays


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """What every call of the loss is given besides its rows.

    Args:
      params: the parameters.
      model_state: the leaves of the model state, None for those whose rule is "rows".
      key: the key of this step, or None if nothing draws.
      scale: what the loss is multiplied by, or None.
      first_row: the position in the batch of this device's first row; None outside the manual region.
      total_counts: the counts of the terms of the loss over all local microbatches, if they are counted first.
      microbatches: the number of calls of the loss in that sum.
      rows_per_device: the number of rows of this device.
      wrt: path patterns of the parameters that are trained.
      reads: the values of the state that the loss reads, by name.
      cotangents: of a loss of the whole batch, of each sum over rows through which a gradient flows.
      head_grads: its share of the gradient of the head, by the path of each parameter that the head reads.
      held: parameters that are gathered already, beside their shards in `params`.
    """

    params: Params
    model_state: tuple[Any, ...]  # Any: arrays
    key: Any  # Any: a typed key
    scale: Any  # Any: a scalar
    first_row: Any = None  # Any: an int32 scalar
    total_counts: tuple[Any, ...] = ()  # Any: scalars
    microbatches: int = field(default=1, metadata={"static": True})
    rows_per_device: int = field(default=0, metadata={"static": True})
    wrt: tuple[str, ...] = field(default=EVERY_LEAF, metadata={"static": True})
    reads: dict[str, Any] = field(default_factory=dict)  # Any: a slot, or the number of the step
    cotangents: tuple[Any, ...] = ()  # Any: arrays
    head_grads: dict[str, Any] = field(default_factory=dict)  # Any: arrays
    held: HeldParams = field(default_factory=dict)

    @property
    def trained(self) -> Params:
        """The parameters that are trained, and None in the place of the others."""
        return trained_leaves(self.params, self.wrt)

    @property
    def device(self) -> jax.Array:
        """The number of this device, as rows are split."""
        return self.first_row // self.rows_per_device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GradientSum:
    """A gradient while it is added up, and what travels with it.

    Args:
      metrics: what the step reports. It comes first: scalars after the gradient in the carry of the scan cost XLA's
        buffer assignment half a megabyte on the demo's GPT (measured, jax 0.10.2 on CPU).
      grads: a sum, or after `DivideByCount` a value, in float32 at least.
      model_state: for each leaf of the model state, the result over the calls of the loss so far.
      finite: `[microbatches]`, whether each loss is finite.
      count: what the sum is to be divided by, if each call of the loss counts the same.
      encoded: what the encoder makes of the rows so far, in their order, in place of a gradient; the sums are `grads`.
    """

    metrics: MetricAccumulators
    grads: Grads
    model_state: tuple[Any, ...]  # Any: arrays; None where there is no result
    finite: Any  # Any: a bool array
    count: float | Fraction = field(default=1.0, metadata={"static": True})
    encoded: tuple[Any, ...] = ()  # Any: arrays


class FinalMaps(NamedTuple):
    """The last division, and the maps after it that keep what is finite finite.

    Where the optimizer is in a branch they run twice: once for what needs the whole gradient (norms, metrics), and once
    in the branch, where they fuse with it. A gradient that is materialised before a branch costs 6 % of a small step.
    """

    division: DivideByCount
    maps: tuple[Apply, ...]


class MeasuredGradient(NamedTuple):
    """What the second run of the final maps needs: the sum, what each map measured, the key of each that draws."""

    total: GradientSum
    measured: tuple[Any, ...]  # Any: a value of the transform's own, or None
    keys: tuple[tuple[Any, ...], ...]  # Any: a typed key; or none


def lower_schedule(schedule: Schedule, regions: tuple[ManualRegion, ...]) -> Callable[[State, Batch], StepOutputs]:
    """One dispatch as a pure function, with the region of each of its turns."""
    match schedule:
        case (RepeatSteps(body=body) as repeat,):
            return partial(_steps, repeat, lower_schedule(body, regions), regions[0])
        case (TakeTurns() as turns,):
            return partial(_take_turns, turns, regions)
        case _:
            (region,) = regions
            return partial(_step, schedule, region)


def _steps(
    repeat: RepeatSteps,
    step: Callable[[State, Batch], StepOutputs],
    region: ManualRegion,
    state: State,
    batch: Batch,
) -> StepOutputs:
    node = repeat.node

    # What is frozen is no carry: a loop may copy what it carries.
    def one_step(carry: State, rows: Batch) -> tuple[State, tuple[Metrics, Any]]:  # Any: diagnostics
        outputs = step(_with_frozen_of(state, carry), rows)
        after = _trained_alone(outputs.state)
        check_fixed_point(carry, after)
        return after, (outputs.metrics, outputs.diagnostics)

    def one_epoch(carry: State, epoch: jax.Array) -> tuple[State, tuple[Metrics, Any]]:  # Any: as above
        key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), draw_tag("epochs"))
        order = jax.random.permutation(jax.random.fold_in(key, epoch), num_rows(batch))
        return jax.lax.scan(
            lambda carry, numbers: one_step(carry, take_rows(repeat, batch, numbers, region)),
            carry,
            order.reshape(node.minibatches, -1),
        )

    with jax.named_scope(STEPS_NAME):
        if node.minibatches is None:
            last, outputs = jax.lax.scan(one_step, _trained_alone(state), batch, length=node.size)
        else:
            epochs = jnp.arange(node.size // node.minibatches)
            last, outputs = jax.lax.scan(one_epoch, _trained_alone(state), epochs)
            outputs = jax.tree.map(lambda leaf: leaf.reshape(node.size, *leaf.shape[2:]), outputs)
    metrics, diagnostics = outputs
    return StepOutputs(_with_frozen_of(state, last), metrics, diagnostics)


def _take_turns(instruction: TakeTurns, regions: tuple[ManualRegion, ...], state: State, batch: Batch) -> StepOutputs:
    """Each turn sees what the one before left. The guard chooses between the outcome of all and the state before."""
    now, metrics, diagnostics, always = state, Metrics(), dict[str, Diagnostics](), dict[str, Any]()
    number, is_finite, loss = state.step + 1, jnp.bool_(True), jnp.float32(0)
    for (turn, body), region in zip(instruction.turns, regions, strict=True):
        before = state_of_turn(now, turn, jax.random.fold_in(state.rng, draw_tag(turn.name)))
        step = partial(_turn, body, region, instruction.guard is not None)
        if turn.every == 1:
            after, found, seen = step(_trained_alone(before), before, batch)
            loss = loss + found["loss"]
        else:
            is_made = number % turn.every == 0
            after, found, seen = _make_turn_if(is_made, step, before, batch)
            loss = loss + jnp.where(is_made, found["loss"], 0)
        now = after_turn(now, turn, _with_frozen_of(before, after))
        metrics |= {f"{turn.name}/{name}": value for name, value in found.items()}
        diagnostics[turn.name], is_finite = seen, is_finite & seen.finite
        # Of what a turn keeps, what advances with a step that is skipped: a scale of the loss.
        rescale = next(one.rescale for one in body if isinstance(one, Optimize))
        if rescale is not None:
            name = slot_name(turn.name, rescale[0])
            always[name] = now.slots[name]

    own = _cut_state(now)
    slots = dict(own.slots)
    for name, node in instruction.follows:
        with regions[0].scope(node.written):
            slots[name] = node.advance(slots[name], own.trained, number, *node.arguments)
    new = replace(_padded_state(replace(own, slots=slots), own, now), step=number)
    metrics = {"loss": loss, **metrics}
    if instruction.guard is not None:
        name, _ = instruction.guard
        new = _with_frozen_of(state, _either_state(is_finite, _trained_alone(new), _trained_alone(state)))
        counts, metrics["skipped"] = _count_skip(state.slots[name], is_finite)
        new = replace(new, slots={**new.slots, **always, name: counts})
    return StepOutputs(new, metrics, TurnDiagnostics(is_finite, diagnostics))


def _turn(
    body: Schedule, region: ManualRegion, is_guarded: bool, trained: State, whole: State, batch: Batch
) -> tuple[State, Metrics, Diagnostics]:
    """One turn on what it trains of a state; what is frozen is no result, since a branch may copy what it returns."""
    outputs = _step(body, region, _with_frozen_of(whole, trained), batch)
    seen = outputs.diagnostics
    if not isinstance(seen, Diagnostics):
        raise ValueError("a turn has no turns")
    if is_guarded:  # an overflow that a scale of the loss adapts to is skipped all the same
        is_finite = jnp.isfinite(outputs.metrics["loss"]) & jnp.isfinite(seen.squares.sum())
        seen = replace(seen, finite=is_finite)
    return _trained_alone(replace(outputs.state, step=trained.step)), outputs.metrics, seen


def _make_turn_if(
    is_made: jax.Array,
    step: Callable[[State, State, Batch], tuple[State, Metrics, Diagnostics]],
    state: State,
    batch: Batch,
) -> tuple[State, Metrics, Diagnostics]:
    """The turn, or what it was given, with metrics that say nothing."""

    def stay(trained: State, whole: State, batch: Batch) -> tuple[State, Metrics, Diagnostics]:
        _, metrics, seen = jax.eval_shape(step, trained, whole, batch)
        is_finite = jnp.ones(seen.finite.shape, bool), jnp.ones(seen.losses.shape, bool)
        zeros = jnp.zeros(seen.squares.shape, seen.squares.dtype)
        return trained, jax.tree.map(blank_metric, metrics), Diagnostics(*is_finite, zeros, seen.paths)

    trained = _trained_alone(state)
    try:
        return jax.lax.cond(is_made, step, stay, trained, state, batch)
    except TypeError:  # the branches differ in type: `check_fixed_point` says where
        check_fixed_point(trained, step(trained, state, batch)[0])
        raise


def _either_state(condition: jax.Array, one: State, other: State) -> State:
    # A branch, as in `_update_if`: it copies one of the two, and a selection reads both.
    return jax.lax.cond(condition, lambda one, other: one, lambda one, other: other, one, other)


def _step(schedule: Schedule, region: ManualRegion, stored: State, batch: Batch) -> StepOutputs:
    optimize = schedule[-1]
    if not isinstance(optimize, Optimize):
        raise ValueError("a schedule ends with the optimizer")
    state = _cut_state(stored)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(stored), strict=True)
    region = replace(region, cut_from={id(own): (own, leaf) for own, leaf in pairs if own is not leaf})
    key = jax.random.fold_in(state.rng, state.step) if draws(schedule) else None
    scale = None if optimize.rescale is None else _scale_of(state, optimize.rescale[0])
    numbers = jnp.arange(num_rows(batch), dtype=jnp.int32) if region.has_row_numbers else None
    leaves = tuple(jax.tree.leaves(state.model_state))
    reads = next(values_read(state, one.node.reads) for one in all_instructions(schedule) if isinstance(one, Compute))
    others = _only(leaves, region, "rows", others=True)
    inputs = StepInputs(state.params, others, key, scale, wrt=state.wrt, reads=reads)
    microbatch = LocalMicrobatch(batch, numbers, _only(leaves, region, "rows"))

    # Up to the last division: the scan over microbatches, the loss in it, the reductions.
    division, final_maps = _final_maps(schedule)
    total, losses = _run_reduced(schedule[:division], microbatch, inputs, region)
    # An optimizer that works element by element is given the padded gradient and parameters. So are the maps before it
    # that see no padding.
    grads = total.grads
    if all(map(_keeps_padding, final_maps.maps)):
        grads = _padded_for_update(grads, region)
    total = replace(total, grads=region.constrain(grads, sharded=True))

    # The last division and the final maps, for the metrics and the norm.
    keys = tuple(_map_key(one, microbatch, inputs, region) for one in final_maps.maps)
    gradient, value, squares = _measure(final_maps, total, keys, inputs.trained, region)
    losses = total.finite[None] if losses is None else losses
    metrics = final_metrics(value.metrics)
    model_state, fits = next_leaves([leaf.rule for leaf in region.model_state], leaves, total.model_state)
    gradient = gradient._replace(total=replace(total, model_state=_only(model_state, region, "constant", others=True)))
    if fits is not True:  # a sum of whole numbers that overflows makes the step one that is not finite
        metrics["loss"] = jnp.where(fits, metrics["loss"], jnp.nan)

    # The optimizer, in a branch if the step may be skipped; it runs the final maps again. It is given nothing frozen: a
    # branch may copy what it hands through.
    given = _trained_alone(state)
    if region.padded_update is not None:
        specs = region.all_specs(region.grad_specs, region.grad_dimensions, sharded=region.has_sharded_params)
        given = replace(given, params=region.padded(given.params, specs))
    loss_fn = None
    if optimize.evaluate is not None:
        loss_fn = _loss_of_whole_batch(optimize.evaluate, microbatch, inputs, region)
    update = partial(_update, optimize, final_maps, region, loss_fn)
    loss_is_finite = jnp.isfinite(metrics["loss"])
    paths, sums = zip(*leaves_by_path(squares), strict=True)
    sums = jnp.stack(sums)
    gradient_is_finite = jnp.isfinite(sums.sum())
    is_finite = loss_is_finite & gradient_is_finite
    if optimize.guard is not None:
        new = _update_if(is_finite, update, gradient, metrics["loss"], given)
    elif optimize.rescale is not None:
        new = _update_if(gradient_is_finite, update, gradient, metrics["loss"], given)
    elif any(map(is_on_host, jax.tree.leaves(given.opt_state))):
        # A branch that is always taken. Without it XLA fetches the optimizer state while it computes the loss, and
        # nothing is saved (measured for a TPU v5e, in compiled programs); a branch begins when its operands are there.
        new = _update_if(state.step >= 0, update, gradient, metrics["loss"], given)
    else:
        done = FinalMaps(DivideByCount("nothing"), ())
        value = replace(value, model_state=gradient.total.model_state)
        update = partial(_update, optimize, done, region, loss_fn)
        new = update(MeasuredGradient(value, (), ()), metrics["loss"], given)
    new = _with_frozen_of(state, new)

    # The outputs: the slots that advance with every step, made or skipped; the metrics; the diagnostics.
    slots = dict(new.slots)
    scale_adapts: Any = True  # Any: a bool, or one on the device
    if optimize.rescale is not None:
        name, node = optimize.rescale
        metrics[name] = _scale_of(state, name)
        slots[name] = node.advance(state.slots[name], loss_is_finite, gradient_is_finite, *node.arguments)
        if slots[name] is not state.slots[name]:  # a scale that is not constant
            scale_adapts = jax.tree.leaves(slots[name])[0] < metrics[name]
    if optimize.guard is not None:
        name, _ = optimize.guard
        slots[name], metrics["skipped"] = _count_skip(state.slots[name], is_finite)
    # An overflow that the scale of the loss adapts to is no reason to stop. At its smallest it adapts no more, and
    # every further step would be skipped too.
    is_fine = loss_is_finite & (gradient_is_finite | scale_adapts)
    if optimize.guard is not None or optimize.rescale is None:
        is_fine = is_finite
    injected = to_device(injected_hyperparameters(new.opt_state))
    check_metric_names(optimize.node.written, injected, metrics)
    new = _padded_state(replace(new, slots=slots), state, stored)
    return StepOutputs(new, {**metrics, **injected}, Diagnostics(is_fine, losses, sums, paths))


def _cut_state(stored: State) -> State:
    """The state in its own shapes. The optimizer cuts its part, where it runs on that."""
    return replace(cut_leaves(replace(stored, opt_state=()), stored.placement), opt_state=stored.opt_state)


def _padded_state(new: State, own: State, stored: State) -> State:
    """The inverse, for what was made of `own`, which is `stored` cut. What is handed through is the stored leaf."""
    if not padded_places(stored.placement):
        return new
    check_fixed_point(own_shapes(own), own_shapes(new))
    return jax.tree.map(
        lambda new, own, filled, stored: stored if new is own else filled, new, own, padded_leaves(new, stored), stored
    )


def _count_skip(before: SkipCounts, is_finite: jax.Array) -> tuple[SkipCounts, jax.Array]:
    """The counts after a step that is skipped unless it is finite, and how many that are: 1 or 0."""
    skipped = 1 - is_finite.astype(jnp.int32)
    return SkipCounts(before.total + skipped, (before.consecutive + skipped) * skipped), skipped


def _trained_alone(state: State) -> State:
    """The state without its frozen parameters."""
    return replace(state, params=state.trained)


def _with_frozen_of(whole: State, trained: State) -> State:
    """The inverse: such a state with the frozen parameters of another."""
    return replace(trained, params=whole.with_trained(trained.params).params)


def _scale_of(state: State, name: str) -> jax.Array:
    """The scale of the loss: the first leaf of its slot."""
    return jax.tree.leaves(state.slots[name])[0]


def _run_reduced(
    schedule: Schedule, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> tuple[GradientSum, Any]:  # Any: each device's flags of finite losses; None without reductions
    """Run instructions in the manual region up to the last reduction, and the rest where every device has the same."""
    end = max((index + 1 for index, one in enumerate(schedule) if reduces(one)), default=0)
    total, losses = _run_on_devices(schedule, end, microbatch, inputs, region) if end else (None, None)
    return _run(schedule[end:], total, microbatch, inputs, region), losses


def _loss_of_whole_batch(
    evaluate: Evaluate, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> Callable[[Params], jax.Array]:
    """The loss of the whole batch as a function of what is trained. Its derivative is computed as that of the step.

    A derivative of its own, because that of the loop would keep what every microbatch computes.
    """

    def run(schedule: Schedule, trained: Params) -> tuple[jax.Array, Grads]:
        with nullcontext() if evaluate.gather is None else region.scope(evaluate.gather.written):
            trained = region.constrain(trained, sharded=region.has_sharded_params)
        params = with_frozen(trained, inputs.params, inputs.wrt)
        total, _ = _run_reduced(schedule, microbatch, replace(inputs, params=params), region)
        return final_metrics(total.metrics)["loss"], total.grads

    @jax.custom_jvp
    def loss_fn(params: Params) -> jax.Array:
        return run(evaluate.value, params)[0]

    @loss_fn.defjvp
    def _(primals: tuple[Params], tangents: tuple[Params]) -> tuple[jax.Array, jax.Array]:
        loss, grads = run(evaluate.gradient, primals[0])
        grads = region.constrain(grads, sharded=True)
        products = jax.tree.map(lambda grad, tangent: jnp.sum(grad * tangent, dtype=loss.dtype), grads, tangents[0])
        return loss, sum_arrays(jax.tree.leaves(products))

    return lambda params: loss_fn(params)


def _run_on_devices(
    schedule: Schedule, end: int, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> tuple[GradientSum, jax.Array]:
    """Run the first instructions in the manual region, on the rows of each device.

    The gradient that leaves it is reduced or sharded, everything else is reduced; each device keeps its own flags of
    finite losses.
    """

    def on_device(
        params: Params, inputs: StepInputs, microbatch: LocalMicrobatch
    ) -> tuple[GradientSum, Grads, tuple[Any, ...], jax.Array]:  # Any: arrays, or None
        own_rest = region.cut(
            {"reads": inputs.reads, "model_state": inputs.model_state}, padded_rest, rest, specs_of_rest
        )
        inputs = replace(inputs, params=region.cut(params, padded, own, region.specs), **own_rest)
        if microbatch.numbers is not None:
            inputs = replace(inputs, first_row=microbatch.numbers[0], rows_per_device=num_rows(microbatch.rows))
        total = _run(schedule[:end], None, microbatch, inputs, region)
        by_rows, others = (_only(total.model_state, region, "rows", others=others) for others in (False, True))
        grads = region.padded(total.grads, region.grad_specs, ZERO) if has_gradient else total.grads
        return replace(total, grads=(), finite=None, model_state=others), grads, by_rows, total.finite[None]

    rows, params = (
        PartitionSpec(region.batch_axes),
        region.manual_specs(region.dimensions, sharded=region.has_sharded_params),
    )
    own, trained, is_sharded = inputs.params, inputs.trained, gradient_is_sharded(schedule)
    padded = region.padded(own, region.all_specs(region.specs, region.dimensions, sharded=region.has_sharded_params))
    rest = {"reads": inputs.reads, "model_state": inputs.model_state}
    pairs = zip(inputs.model_state, region.model_state_specs, strict=True)
    specs_of_rest = {
        "reads": {name: region.slot_specs.get(name, PartitionSpec()) for name in inputs.reads},
        "model_state": tuple(None if leaf is None else spec for leaf, (_, spec) in pairs),
    }
    padded_rest = region.padded(rest, specs_of_rest)
    has_gradient = any(isinstance(one, Compute) for one in all_instructions(schedule))
    grads = region.manual_specs(region.grad_dimensions, sharded=is_sharded) if has_gradient else ()
    run = jax.shard_map(
        on_device, mesh=region.mesh, in_specs=(params, PartitionSpec(), rows),
        out_specs=(PartitionSpec(), grads, rows, rows),
        axis_names=set(region.batch_axes), check_vma=False,
    )  # fmt: skip
    total, grads, by_rows, losses = run(padded, replace(inputs, params=(), **padded_rest), microbatch)
    if has_gradient:
        specs = region.all_specs(region.grad_specs, region.grad_dimensions, sharded=is_sharded)
        stored, grads = grads, region.cut(grads, grads, trained, specs)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(stored), strict=True)
        region.cut_from.update({id(cut): (cut, whole) for cut, whole in pairs if cut is not whole})
    return replace(total, grads=grads, model_state=_either(total.model_state, by_rows)), losses


def _run(
    schedule: Schedule, total: GradientSum | None, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> Any:  # Any: the sum; None is that of no instructions
    """Run instructions one after another. Some change the sum, some what the loss is given."""
    for instruction in schedule:
        match instruction:
            case CountFirst(body):
                counts = _run(body, None, microbatch, inputs, region)
                values = tuple(counts.metrics[str(index)][0].value for index in range(len(counts.metrics)))
                inputs = replace(inputs, total_counts=values, microbatches=int(counts.count))
            case AllGather(is_outside=True):
                inputs = replace(inputs, held=gather_outside(instruction, inputs.params, region))
            case AllGather():
                inputs = replace(inputs, params=all_gather(instruction, inputs.params, region))
            case _:
                total = _run_one(instruction, total, microbatch, inputs, region)
    return total


def _run_one(
    instruction: Instruction,
    total: Any,  # Any: the sum so far; None before the first that makes one
    microbatch: LocalMicrobatch,
    inputs: StepInputs,
    region: ManualRegion,
) -> GradientSum:
    match instruction:
        case Compute():
            return _compute(instruction, microbatch, inputs, region)
        case Encode():
            return _encode(instruction, microbatch, inputs, region)
        case Across():
            return _across(instruction, microbatch, inputs, region)
        case Count():
            return _count(instruction, microbatch, inputs, region)
        case Value():
            return _value(instruction, microbatch, inputs, region)
        case ScanMicrobatches():
            return _scan(instruction, microbatch, inputs, region)
        case Vmap():
            return _vmap(instruction, microbatch, inputs, region)
        case AllReduce(axes):
            metrics, grads = all_reduce(instruction, total.metrics, total.grads, region, lambda: inputs.device)
            return _times(replace(total, metrics=metrics, grads=grads), region.num_devices(axes))
        case ReduceScatter():
            return replace(total, grads=reduce_scatter(instruction, total.grads, region))
        case ShardGradient():
            return replace(total, grads=shard_gradient(instruction, total.grads, region))
        case ReduceModelState():
            return replace(total, model_state=reduce_model_state(instruction, total.model_state, region))
        case Multiply(factor):
            return replace(total, grads=jax.tree.map(lambda leaf: leaf * factor, total.grads))
        case Unscale():
            return replace(total, grads=jax.tree.map(lambda leaf: leaf / inputs.scale, total.grads))
        case DivideByCount():
            return _divide(instruction, total)
        case Apply(node):
            key = _map_key(instruction, microbatch, inputs, region)
            with region.scope(node.written):
                measured, added = node.measured(total.grads, inputs.trained, partial(squares_of, total.grads))
                return _apply(instruction, total, measured, added, key)
        case Perturb():
            return _perturb(instruction, microbatch, inputs, region)
        case Optimize() | TakeTurns() | RepeatSteps() | CountFirst() | AllGather():
            raise ValueError(f"{type(instruction).__name__} does not make a gradient")
        case _:
            assert_never(instruction)


def _compute(
    instruction: Compute, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> GradientSum:
    if instruction.pulls_back:
        return _pull_back(instruction, microbatch, inputs, region)
    node = instruction.node
    keys = keys_of(node, inputs.key, microbatch.numbers)
    given = region.model_state_tree.unflatten(_given_model_state(microbatch, inputs, region))
    shapes = gathered_shapes(instruction, inputs.params, region)
    traced = region.loss
    if traced is not None and not traced.takes(shapes, given, microbatch.rows, keys, inputs.reads):
        traced = None  # it was traced for other types: rows may be of a weak one
    loss = gathering_loss(instruction, traced or checked_loss(node), shapes, inputs.held, region)

    def scaled_loss(
        trained: Params, overwritten: list[Any]
    ) -> tuple[jax.Array, tuple[LossOutcome, Any]]:  # Any: arrays; a number, or an array
        params = with_frozen(trained, inputs.params, inputs.wrt)
        outcome: LossOutcome = loss(params, overwrite(given, overwritten), microbatch.rows, keys, inputs.reads)
        terms = merge_terms(outcome.terms)
        # What is differentiated is about as large as a mean over these rows, whatever the loss adds up.
        if instruction.counts_first:
            unit = 1 / power_of_two(inputs.microbatches)
            total = _sum_of_ratios(terms, inputs) / unit
        elif node.head is not None:
            unit = 1.0
            total = _value_of_head(outcome)
        else:
            unit = power_of_two(terms[0].count)
            total = terms[0].total / unit
        return total * inputs.scale if instruction.rescaled else total, (outcome, unit)

    with region.scope(node.written):
        (_, (outcome, unit)), (grads, overwritten) = jax.value_and_grad(scaled_loss, argnums=(0, 1), has_aux=True)(
            inputs.trained, overwritten_leaves(given)
        )
        grads = _as_sum(grads)
        if not (is_static(unit) and unit == 1):
            grads = jax.tree.map(lambda leaf: leaf * unit, grads)
    finite = jnp.isfinite(sum_arrays([term.total for term in outcome.terms]))[None]
    metrics = {"loss": Sums(outcome.terms), **(outcome.metrics if instruction.reports else {})}
    accumulators = {name: accumulate_metric(metric) for name, metric in metrics.items()}
    after = overwrite(outcome.model_state, overwritten)
    results = _model_state_results(given, after, region)
    # A constant of the gradient, also where an optimizer differentiates it once more.
    return GradientSum(accumulators, grads, jax.lax.stop_gradient(results), finite, instruction.count)


def _encode(instruction: Encode, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion) -> GradientSum:
    """What the encoder makes of the rows, as a sum that holds no gradient."""
    node = instruction.node
    keys = keys_of(node, inputs.key, microbatch.numbers)
    given = _given_model_state(microbatch, inputs, region)
    with region.scope(node.written):
        model_state = region.model_state_tree.unflatten(given)
        _, arrays, after = checked_encoder(node)(inputs.params, model_state, microbatch.rows, keys, inputs.reads)
    results = _model_state_results(given, after, region)
    return GradientSum({}, arrays.sums, results, jnp.ones(1, bool), encoded=arrays.rows)


def _across(instruction: Across, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion) -> GradientSum:
    """Encode, gather, differentiate the head; then encode again, and pull back."""
    node, axes, tree = instruction.node, instruction.axes, instruction.head.tree
    first = _run(instruction.first, None, microbatch, inputs, region)
    z, place = Encoded(first.encoded, first.grads), jnp.zeros((), jnp.int32)
    if axes:
        z = gather_encoded(instruction, z, region)
        for axis in axes:
            place = place * region.num_devices((axis,)) + region.axis_index(axis, inputs.device)
    params = inputs.params
    if instruction.gather is not None:
        params = all_gather(instruction.gather, params, region)

    # The head, on every device alike: of the parameters that it reads, and of all that a gradient flows through.
    leaves = dict(leaves_by_path(params))
    read = {path: leaves[path] for path in instruction.head.reads if is_trained(path, inputs.wrt)}
    arrays = (*z.rows, *z.sums)
    floats = {number: leaf for number, leaf in enumerate(arrays) if is_floating(leaf)}
    num_leaves = len(z.rows)

    def value_of_head(read: dict[str, jax.Array], floats: dict[int, jax.Array]) -> tuple[jax.Array, LossOutcome]:
        given = jax.tree.structure(params).unflatten([read.get(path, leaf) for path, leaf in leaves.items()])
        joined = [floats.get(number, leaf) for number, leaf in enumerate(arrays)]
        outcome = checked_head(node)(given, tree, Encoded(tuple(joined[:num_leaves]), tuple(joined[num_leaves:])))
        value = _value_of_head(outcome)
        return value * inputs.scale if instruction.rescaled else value, outcome

    with region.scope(node.written):
        (read_grads, cotangents), outcome = jax.grad(value_of_head, argnums=(0, 1), has_aux=True)(read, floats)
    metrics = {"loss": Sums(outcome.terms), **(outcome.metrics if instruction.reports else {})}
    accumulators = {name: accumulate_metric(metric) for name, metric in metrics.items()}
    if axes:
        accumulators = reported_once(accumulators, place == 0)
    if not instruction.gives_gradient:
        value = replace(first, metrics=accumulators, grads=(), encoded=())
        return _run(instruction.second, value, microbatch, inputs, region)

    # This device's own rows of the cotangents; the second pass over the same rows.
    num_own = z.rows[0].shape[0] // instruction.num_devices if z.rows else 0
    of_rows = tuple(
        jax.lax.dynamic_slice_in_dim(leaf, place * num_own, num_own) if axes else leaf
        for number, leaf in cotangents.items()
        if number < num_leaves
    )
    of_sums = tuple(leaf for number, leaf in cotangents.items() if number >= num_leaves)
    total = _run(
        instruction.second,
        None,
        replace(microbatch, cotangents=of_rows),
        replace(inputs, cotangents=of_sums, head_grads=read_grads),
        region,
    )
    return replace(total, metrics=accumulators)


def _value_of_head(outcome: LossOutcome) -> jax.Array:
    """The terms of the head, each divided by its own count, added up."""
    return sum_arrays([divide_by_count(term.total, term.count) for term in outcome.terms])


def _pull_back(
    instruction: Compute, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> GradientSum:
    """The gradient of the whole batch that flows through these rows, with their share of that of the head itself."""
    node = instruction.node
    keys = keys_of(node, inputs.key, microbatch.numbers)
    given = region.model_state_tree.unflatten(_given_model_state(microbatch, inputs, region))

    def encode(params: Params, *rest: Any) -> tuple[list[Any], Any]:  # Any: as of an encoder, and arrays
        _, arrays, after = checked_encoder(node)(params, *rest)
        leaves = dict(leaves_by_path(params))
        floats = [leaf for leaf in (*arrays.rows, *arrays.sums) if is_floating(leaf)]
        return [*floats, *(leaves[path] for path in inputs.head_grads)], after

    shapes = gathered_shapes(instruction, inputs.params, region)
    gathered = gathering_loss(instruction, encode, shapes, inputs.held, region)

    def outputs(trained: Params) -> tuple[list[Any], tuple[Any, Any]]:  # Any: arrays
        params = with_frozen(trained, inputs.params, inputs.wrt)
        outputs, after = gathered(params, given, microbatch.rows, keys, inputs.reads)
        floats = outputs[: len(outputs) - len(inputs.head_grads)]
        return outputs, (after, jnp.isfinite(sum_arrays([jnp.sum(leaf.astype(jnp.float32)) for leaf in floats])))

    shares = [leaf * float(instruction.count) for leaf in inputs.head_grads.values()]
    with region.scope(node.written):
        _, pull, (after, finite) = jax.vjp(outputs, inputs.trained, has_aux=True)
        (grads,) = pull([*microbatch.cotangents, *inputs.cotangents, *shares])
    results = _model_state_results(given, after, region)
    # A constant of the gradient, also where an optimizer differentiates it once more.
    return GradientSum({}, _as_sum(grads), jax.lax.stop_gradient(results), finite[None], instruction.count)


def _value(instruction: Value, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion) -> GradientSum:
    """The loss, as the metric of a sum that holds no gradient."""
    node = instruction.node
    keys = keys_of(node, inputs.key, microbatch.numbers)
    given = _given_model_state(microbatch, inputs, region)
    with region.scope(node.written):
        model_state = region.model_state_tree.unflatten(given)
        outcome = checked_loss(node)(inputs.params, model_state, microbatch.rows, keys, inputs.reads)
    results = _model_state_results(given, outcome.model_state, region)
    metrics = {"loss": accumulate_metric(Sums(outcome.terms))}
    return GradientSum(metrics, (), results, jnp.ones(1, bool), instruction.count)


def _given_model_state(
    microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> list[Any]:  # Any: arrays
    """The leaves of the model state as one call of the loss takes them: rows of its own, keys folded with its place."""
    leaves = zip(region.model_state, _either(inputs.model_state, microbatch.model_state), strict=True)
    return [fold_key(leaf, microbatch.numbers[0]) if one.rule == "key" else leaf for one, leaf in leaves]


def _model_state_results(given: Any, after: Any, region: ManualRegion) -> tuple[Any, ...]:
    # Any: trees, or leaves, of the model state; arrays
    """What one call of the loss returned of the model state, wide enough to be added up."""
    triples = zip(region.model_state, jax.tree.leaves(given), jax.tree.leaves(after), strict=True)
    return tuple(wide_result(leaf.rule, old, jnp.asarray(new)) for leaf, old, new in triples)


def _only(
    leaves: tuple[Any, ...], region: ManualRegion, *rules: str, others: bool = False
) -> tuple[Any, ...]:  # Any: arrays, or None
    """The leaves of the model state with one of these rules, or without; None in the place of the others."""
    pairs = zip(region.model_state, leaves, strict=True)
    return tuple(leaf if (one.rule in rules) is not others else None for one, leaf in pairs)


def _either(leaves: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...]:  # Any: arrays, or None
    return tuple(other if leaf is None else leaf for leaf, other in zip(leaves, others, strict=True))


def _sum_of_ratios(terms: tuple[Mean, ...], inputs: StepInputs) -> jax.Array:
    """The terms, each divided by its total count, added up."""
    counted = iter(inputs.total_counts)
    counts = [inputs.microbatches * term.count if is_static(term.count) else next(counted) for term in terms]
    return sum_arrays([divide_by_count(term.total, count) for term, count in zip(terms, counts, strict=True)])


def _count(instruction: Count, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion) -> GradientSum:
    """The counts, as the metrics of a sum that holds no gradient."""
    node = instruction.node
    keys = keys_of(node, inputs.key, microbatch.numbers)
    model_state = region.model_state_tree.unflatten(_given_model_state(microbatch, inputs, region))
    counts = counts_of(node, inputs.params, model_state, microbatch.rows, keys, inputs.reads)
    metrics = {str(index): (MetricAccumulator(count, None, "sum"),) for index, count in enumerate(counts)}
    return GradientSum(metrics, (), (None,) * len(region.model_state), jnp.ones(1, bool))


def _scan(
    instruction: ScanMicrobatches, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> GradientSum:
    size, dtype = instruction.size, instruction.dtype
    # [n, ...] -> [n / size, size, ...]: microbatch j is the rows i with i mod size = j, and no row moves.
    split = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:]), microbatch)

    def part(index: jax.Array) -> LocalMicrobatch:
        take = partial(jax.lax.dynamic_index_in_dim, index=index, axis=1, keepdims=False, allow_negative_indices=False)
        return jax.tree.map(take, split)

    # Jitted, so that the shapes and the scan share one trace of the loss. XLA inlines the call; jax does not, since it
    # would drop the lines of the source.
    @jax.jit
    def microbatch_sum(microbatch: LocalMicrobatch, inputs: StepInputs) -> GradientSum:
        return _run(instruction.body, None, microbatch, inputs, region)

    first = jnp.zeros((), jnp.int32)
    shapes: GradientSum = microbatch_sum.eval_shape(part(first), inputs)

    # The index is carried, not scanned over: an array of indices would be read for every row.
    # Of the model state, what a microbatch hands on to the next is carried too, and rows are scanned over.
    def add_one(
        carry: tuple[jax.Array, GradientSum, Any], _: None
    ) -> tuple[tuple[jax.Array, GradientSum, Any], tuple[jax.Array, Any, Any]]:
        index, total, handed_on = carry
        given = replace(inputs, model_state=_either(handed_on, inputs.model_state))
        one: GradientSum = microbatch_sum(part(index), given)
        if gradient_is_sharded(instruction.body):
            one = replace(one, grads=_sharded_in_loop(one.grads, region))
        handed_on = _either(_only(one.model_state, region, "sequential"), handed_on)
        by_row = (one.finite, by_rows(one.model_state), one.encoded)
        return (index + 1, _add(total, one, instruction, region), handed_on), by_row

    def by_rows(leaves: tuple[Any, ...]) -> tuple[Any, ...]:  # Any: arrays, or None
        return _only(leaves, region, "rows")

    with jax.named_scope(SCAN_NAME):
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype or leaf.dtype), shapes.grads)
        results = tuple(
            None if leaf is None else start_of_sum(one.rule, leaf)
            for one, leaf in zip(region.model_state, _only(shapes.model_state, region, *SUMMED), strict=True)
        )
        start = GradientSum(zero_metrics(shapes.metrics), zeros, results, None, shapes.count)
        carry = (first, start, _only(inputs.model_state, region, "sequential"))
        (_, total, handed_on), (finite, rows, encoded) = jax.lax.scan(add_one, carry, None, length=size)
    # [size, n / size, ...] -> [n, ...]
    rows, encoded = jax.tree.map(lambda leaf: jax.lax.collapse(leaf.swapaxes(0, 1), 0, 2), (rows, encoded))
    model_state = _either(_either(total.model_state, handed_on), rows)
    return _times(replace(total, model_state=model_state, finite=finite.reshape(-1), encoded=encoded), size)


def _sharded_in_loop(grads: Grads, region: ManualRegion) -> Grads:
    """Shards, to be added up as shards: XLA moves a reduce-scatter out of a loop on TPUs, and adds up whole leaves."""
    return jax.tree.map(
        lambda leaf, dim: leaf if dim < 0 else jax.lax.optimization_barrier(leaf), grads, region.grad_dimensions
    )


def _add(total: GradientSum, one: GradientSum, scan: ScanMicrobatches, region: ManualRegion) -> GradientSum:
    """One more part, in the dtype of the sum. What is handed on, and the flags, are the scan's own."""
    dtype = scan.dtype
    grads = one.grads if dtype is None else jax.tree.map(lambda leaf: leaf.astype(dtype), one.grads)
    model_state = tuple(
        old if old is None else add_results(leaf.rule, old, new, scan.size)
        for leaf, old, new in zip(region.model_state, total.model_state, one.model_state, strict=True)
    )
    return replace(
        total,
        metrics=add_metrics(total.metrics, one.metrics),
        grads=jax.tree.map(jax.lax.add, total.grads, grads),
        model_state=model_state,
    )


def _vmap(instruction: Vmap, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion) -> GradientSum:
    single_rows = jax.tree.map(lambda leaf: leaf[:, None], microbatch)
    with region.scope(instruction.written):
        each = jax.vmap(lambda row: _run(instruction.body, None, row, inputs, region))(single_rows)
    size = num_rows(microbatch.rows)
    total = GradientSum(
        reduce_vmap_metrics(each.metrics),
        jax.tree.map(lambda leaf: leaf.sum(axis=0, dtype=leaf.dtype), each.grads),
        tuple(map(_over_rows, region.model_state, each.model_state)),
        each.finite.all(axis=0),
        each.count,
    )
    return _times(total, size)


def _over_rows(leaf: ModelStateLeaf, each: Any) -> Any:  # Any: arrays, or None
    """The result over single rows, from that of each."""
    if each is None:
        return None
    match leaf.rule:
        case "rows":
            return jax.lax.collapse(each, 0, 2)
        case "max":
            return each.max(axis=0)
        case "sum":
            return each.sum(axis=0)
        case _ if leaf.reduction is None:
            return each[0]
        case _:
            return part_of_mean(each, len(each)).sum(axis=0).astype(each.dtype)


def _perturb(
    instruction: Perturb, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> GradientSum:
    """The sum at the moved parameters, with what is reported and kept of the sum at the parameters themselves."""
    node = instruction.node
    here = _run(instruction.here, None, microbatch, inputs, region)
    value = _run(instruction.to_value, here, microbatch, inputs, region)
    with region.scope(node.written):
        moved = node.function(inputs.trained, value.grads, *node.arguments)
        params = with_frozen(moved, inputs.params, inputs.wrt)
    there = _run(instruction.there, None, microbatch, replace(inputs, params=params), region)
    return replace(here, grads=there.grads)


def _times(total: GradientSum, size: int) -> GradientSum:
    """The static counts once `size` equal parts are added up."""
    return replace(total, metrics=scale_metric_counts(total.metrics, size), count=total.count * size)


def _divide(instruction: DivideByCount, total: GradientSum) -> GradientSum:
    """The sum becomes a value."""
    match instruction.by:
        case "nothing":
            count = None
        case "count":
            count = next(term.count for term in total.metrics["loss"] if term.count is not None)
        case _:
            count = None if total.count == 1 else float(total.count)
    grads = total.grads
    if count is not None:
        grads = jax.tree.map(lambda leaf: divide_by_count(leaf, count), grads)
    return replace(total, grads=grads, count=1.0)


def _apply(
    instruction: Apply,
    value: GradientSum,
    measured: Any,  # Any: a value of the transform's own
    added: Metrics,
    key: tuple[Any, ...],  # Any: a typed key; or none
) -> GradientSum:
    """A map of the value. Its result is a sum of one part again, with metrics of its own."""
    node = instruction.node
    returned = node.applied(value.grads, measured, *key)
    check_gradient(node.written, returned, value.grads)
    grads, more = returned
    added = {**added, **more}
    check_metric_names(node.written, added, value.metrics)
    metrics = {name: (MetricAccumulator(jnp.asarray(metric), None, "mean", 1.0),) for name, metric in added.items()}
    return replace(value, grads=_as_sum(grads), metrics={**value.metrics, **metrics})


def _map_key(
    instruction: Apply, microbatch: LocalMicrobatch, inputs: StepInputs, region: ManualRegion
) -> tuple[Any, ...]:  # Any: a typed key
    """The key of a map that draws, folded with the position of the first row that the gradient is reduced over."""
    if instruction.name is None:
        return ()
    number = microbatch.numbers[0]
    if inputs.first_row is not None:
        for axis in instruction.reduced_axes:
            inner = region.num_devices(region.batch_axes[region.batch_axes.index(axis) + 1 :])
            number = number - region.axis_index(axis, inputs.device) * inner * inputs.rows_per_device
    return (jax.random.fold_in(jax.random.fold_in(inputs.key, draw_tag(instruction.name)), number),)


def _as_sum(grads: Grads) -> Grads:
    return jax.tree.map(widened, grads)


def _final_maps(schedule: Schedule) -> tuple[int, FinalMaps]:
    """The position of the last division that is followed by nothing but maps that keep what is finite finite."""
    position, maps = len(schedule) - 2, []
    while position > 1:
        match schedule[position - 1 : position + 1]:
            case (Apply(node) as one, DivideByCount("microbatches", 1.0, False)) if node.keeps_finite:
                maps.append(one)
                position -= 2
            case _:
                break
    division = schedule[position]
    if not isinstance(division, DivideByCount):
        raise ValueError("a gradient is divided before the optimizer takes it")
    return position, FinalMaps(division, tuple(reversed(maps)))


def _measure(
    final_maps: FinalMaps,
    total: GradientSum,
    keys: tuple[tuple[Any, ...], ...],  # Any: a typed key; or none
    params: Params,
    region: ManualRegion,
) -> tuple[MeasuredGradient, GradientSum, Any]:  # Any: a tree like the parameters
    """The first run of the final maps: what the second needs, the value with all metrics, the sums of squares."""
    value = _divide(final_maps.division, total)
    with jax.named_scope(NORM_NAME):
        squares = squares_of(value.grads)
    all_measured, first = list[Any](), value.grads
    for one, key in zip(final_maps.maps, keys, strict=True):
        with region.scope(one.node.written):
            own = partial(squares_of, value.grads) if value.grads is not first else lambda: squares
            measured, added = one.node.measured(value.grads, params, own)
            value = _apply(one, value, measured, added, key)
        all_measured.append(measured)
    with jax.named_scope(NORM_NAME):
        squares = jax.tree.map(_infinite_if_too_large, squares, value.grads, params)
    return MeasuredGradient(total, tuple(all_measured), keys), value, squares


def _infinite_if_too_large(squares: jax.Array, grad: jax.Array, param: Any) -> jax.Array:  # Any: an array
    """The sum of squares of a leaf, infinite where the gradient that the optimizer takes overflows its dtype.

    A dtype with the exponents of float32 does not overflow while the sum is finite.
    """
    if jnp.finfo(param.dtype).nexp >= jnp.finfo(grad.dtype).nexp:
        return squares
    return jnp.where(jnp.isfinite(sum_of_squares(grad.astype(param.dtype))), squares, jnp.inf * squares)


def _update(
    optimize: Optimize,
    final_maps: FinalMaps,
    region: ManualRegion,
    loss_fn: Callable[[Params], jax.Array] | None,
    gradient: MeasuredGradient,
    loss: jax.Array,
    state: State,
) -> State:
    """The second run of the final maps, then the optimizer."""

    def constrain(tree: Any, *, sharded: bool) -> Any:  # Any: a tree like the parameters
        return tree if not region.shard_axes else region.constrain(tree, sharded=sharded)

    params = state.params if region.has_sharded_params else constrain(state.params, sharded=True)
    value = _divide(final_maps.division, gradient.total)
    for one, measured, key in zip(final_maps.maps, gradient.measured, gradient.keys, strict=True):
        with region.scope(one.node.written):
            value = _apply(one, value, measured, {}, key)
    grads = _padded_for_update(narrowed(value.grads, params), region)
    node, losses = optimize.node, dict.fromkeys(WHOLE_BATCH_LOSSES, loss_fn)
    offered = {"value": loss, "grad": grads, **losses}
    with region.scope(node.written):
        moved = to_device(state.opt_state)
        given = moved if region.padded_update is not None else _cut_opt_state(moved, region)
        run = None
        if region.matrices:
            run = gathering(region.gathered_matrix, region.shared_matrices, region.matrices_alone)
        updates, opt_state = run_optimizer(node.optimizer, grads, given, params, offered, node.written, run)
        _check_padded_opt_state(moved, opt_state, region)
        stored = _padded_opt_state(_cut_where_filled(opt_state, region), given, moved, region)
        opt_state = to_memory_of(stored, moved, state.opt_state)
        params = constrain(optax.apply_updates(params, updates), sharded=True)
    slots, own = dict(state.slots), params
    if region.padded_update is not None and optimize.follows:
        specs = region.all_specs(region.grad_specs, region.grad_dimensions, sharded=True)
        own = region.cut(params, params, region.padded_update.shapes, specs)
    for name, node in optimize.follows:
        with region.scope(node.written):
            slots[name] = node.advance(slots[name], own, state.step + 1, *node.arguments)
    if not region.has_sharded_params:
        with nullcontext() if optimize.gather is None else region.scope(optimize.gather.written):
            params = constrain(params, sharded=False)
    new = replace(state, params=params, opt_state=opt_state, step=state.step + 1, slots=slots)
    # What is not changed is taken here: the same array on both sides of a branch.
    leaves, tree = jax.tree.flatten(state.model_state)
    return replace(new, model_state=tree.unflatten(_either(gradient.total.model_state, tuple(leaves))))


def _padded_for_update(grads: Grads, region: ManualRegion) -> Grads:
    """The gradient as an optimizer takes it: padded, if it runs on padded leaves."""
    if region.padded_update is None:
        return grads
    return region.padded(grads, region.all_specs(region.grad_specs, region.grad_dimensions, sharded=True), ZERO)


def _cut_opt_state(opt_state: Any, region: ManualRegion) -> Any:  # Any, twice: the optimizer's own tree
    """The optimizer state in its own shapes."""
    leaves, tree = jax.tree.flatten(opt_state)
    pairs = zip(leaves, region.opt_state_padding, strict=True)
    return tree.unflatten([leaf if place is None else cut_along(leaf, *place) for leaf, place in pairs])


def _check_padded_opt_state(stored: Any, new: Any, region: ManualRegion) -> None:  # Any, twice: as above
    """Refuse a new state of another type before it is padded: in its own shapes, as `init` made them."""
    if any(region.opt_state_padding):
        cut = partial(_cut_opt_state, region=region)
        own = new if region.padded_update is None else jax.eval_shape(cut, new)
        check_fixed_point({"opt_state": jax.eval_shape(cut, stored)}, {"opt_state": own})


def _cut_where_filled(new: Any, region: ManualRegion) -> Any:  # Any: as above
    """What an optimizer that runs on padded leaves returns, without the padding that it has filled."""
    if region.padded_update is None:
        return new
    leaves, tree = jax.tree.flatten(new)
    rows = zip(leaves, region.opt_state_padding, region.padded_update.is_kept, strict=True)
    return tree.unflatten([leaf if place is None or kept else cut_along(leaf, *place) for leaf, place, kept in rows])


def _keeps_padding(one: Apply) -> bool:
    return one.node.keeps_zeros and one.node.reads != "params"


def _padded_opt_state(new: Any, cut: Any, stored: Any, region: ManualRegion) -> Any:  # Any: as above
    """The inverse. What the optimizer hands through is the stored leaf itself."""
    leaves, tree = jax.tree.flatten(new)
    rows = zip(leaves, jax.tree.leaves(cut), jax.tree.leaves(stored), region.opt_state_padding, strict=True)
    return tree.unflatten(
        [
            old if one is own else one if place is None else padded_along(one, place[0], old.shape)
            for one, own, old, place in rows
        ]
    )


def _update_if(
    happens: jax.Array, update: Callable[..., State], gradient: MeasuredGradient, loss: jax.Array, state: State
) -> State:
    # A branch, not a selection: a selection copies the state and adds a third to the time of an optimizer (measured on
    # CPU), and a branch computes nothing when the step is skipped. What a branch reads is passed to it.
    def stay(gradient: MeasuredGradient, loss: jax.Array, state: State) -> State:
        return state

    try:
        return jax.lax.cond(happens, update, stay, gradient, loss, state)
    except TypeError:  # the branches differ in type: `check_fixed_point` says where
        check_fixed_point(state, update(gradient, loss, state))
        raise
