"""A step is held to its budget before it runs; the step itself only says when."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepc._compiler.autotune import Autotuner, autotune_request, replace_request
from stepc._compiler.collectives import ManualRegion
from stepc._compiler.lowering import StepOutputs, lower_schedule
from stepc._compiler.metrics import Diagnostics
from stepc._compiler.multihost import check_start
from stepc._compiler.normalize import NormalForm, normalize
from stepc._compiler.placement import (
    BatchPlacement,
    ShardingTable,
    gradient_shapes,
    model_axis_specs,
    place_on_devices,
    placement_of_state,
    planned_leaves,
    shapes_of,
    shapes_with,
    shard_dimensions,
    sharding_table,
    shardings_of,
    specs_by_path,
    with_automatic_axes,
    without_weak_types,
)
from stepc._compiler.plan import Plan
from stepc._compiler.schedule import accumulator_is_sharded, draws, sharding_notes
from stepc._compiler.stages import Compiled, Lowered
from stepc._compiler.validation import (
    BatchSignature,
    batch_signature,
    check_batch,
    check_fixed_point,
    check_model_state,
    check_option,
    check_params,
    check_seed,
    check_state,
    refuse_state,
    retrace_reason,
    signature_text,
)
from stepc._language.kinds import Batch, Metrics, Params
from stepc._language.pipeline import Pipeline, Transform
from stepc._language.reference import Reference, complete_transforms, reference
from stepc._language.state import KEYS, State
from stepc.inspect.budget import Budget


class BudgetGate:
    """Check a budget once for each form of batch, and again if the step was traced anew.

    The programs it looks at are those that the step runs: jax compiles none of them twice.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._passed: set[tuple[BatchSignature, tuple[bool, ...]]] = set()
        self._traces = 0

    def hold(self, batch: Batch, compiled: Callable[[], Compiled], traces: Callable[[], int]) -> None:
        """Raise BudgetError before the step runs; the state is then alive."""
        # jax traces host arrays and device arrays apart.
        form = batch_signature(batch), tuple(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        if form in self._passed and traces() == self._traces:
            return
        program = compiled()
        program.check(self.budget, traces=traces())
        self._passed.add(form)
        self._traces = traces()


_LOG = logging.getLogger("stepc")


def compile(pipeline: Transform | Pipeline, *, mesh: Mesh | None = None, budget: Budget | None = None) -> "Step":
    """Make one jitted, donating program of a pipeline, for a mesh.

    Meaning: `step(state, batch)` equals `reference(pipeline)(state, batch)`, up to the order of summation.
    Why: one `lax.scan` over microbatches, one reduction of the gradient a step whatever their number, and every
      decision printed in `step.lower(state, batch).plan`.

    Args:
      pipeline: a complete pipeline that gives a step.
      mesh: a `jax.sharding.Mesh`, its axes of any type; None for the default device. Axes that the pipeline does
        not name stay automatic: parameters that lie along them stay as they lie.
      budget: what the step is promised to cost; the first call for a form of batch is held to it before it runs.
    Errors: ConfigError if the pipeline is not complete; ShardingError if the mesh lacks an axis. Nothing is traced
      or compiled before the first call; that raises BudgetError if the program breaks its budget, or if nothing fits
      an `accumulate(memory=...)`.
    Example:
      >>> compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))
      compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))

    Source: ours.
    """
    check_option("mesh", mesh, Mesh, expected="a jax.sharding.Mesh")
    check_option("budget", budget, Budget, expected="a stepc.Budget")
    complete_transforms(pipeline)
    asked = autotune_request(pipeline)
    gate = None if budget is None else BudgetGate(budget)
    if asked is None:
        return Step(pipeline, mesh, normalize(pipeline, mesh), gate)
    place, question = asked
    one = normalize(replace_request(pipeline, place, question.resolved(1)), mesh)
    asking = Autotuner(pipeline, place, question, one.core, lambda said: Step(said, mesh, normalize(said, mesh)))
    return Step(pipeline, mesh, one, gate, asking)


def _in_our_mesh(method: Callable[..., Any]) -> Callable[..., Any]:
    """Trace under the step's own mesh, whatever mesh the caller has set: no ambient state changes a step."""

    @wraps(method)
    def traced(self: "Step", *args: Any) -> Any:
        if self.mesh is None:
            return method(self, *args)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return method(self, *args)

    return traced


class Step:
    """A compiled pipeline: `init` makes a state, a call makes a step.

    A pipeline that leaves a number to the compiler is answered once for each form of batch: its program, plan and
    reference are those of the pipeline that says the number.
    """

    def __init__(
        self,
        pipeline: Transform | Pipeline,
        mesh: Mesh | None,
        decision: NormalForm,
        gate: BudgetGate | None = None,
        asking: "Autotuner[Step] | None" = None,
    ) -> None:
        self.pipeline = pipeline
        self.decision = decision
        self._gate = gate
        self._asking = asking
        self.mesh = None if mesh is None else with_automatic_axes(mesh)
        self._traces = 0
        self.why_traced_again = ""
        self._forms: list[str] = []
        self._batches = BatchPlacement(self.mesh, decision)

        def stepc_step(
            state: State, batch: Batch
        ) -> tuple[State, Metrics, Diagnostics]:  # the name of the program in HLO
            return self._traced(state, batch)

        self._program = jax.jit(stepc_step, donate_argnums=0, **self._batches.options)

    def __repr__(self) -> str:
        mesh = "" if self.mesh is None else f", mesh={dict(self.mesh.shape)}"
        return f"compile({self.pipeline!r}{mesh})"

    @property
    def traces(self) -> int:
        """How often the program was traced; any number of calls with one batch shape is one trace."""
        if self._asking is None:
            return self._traces
        return self._traces + sum(answer.step.traces for answer in self._asking.answers.values())

    @property
    def steps_per_call(self) -> int:
        """How many steps one call makes: n with `repeat(n)`, else 1."""
        return self.decision.repeats

    @property
    def skip_limit(self) -> int | None:
        """How many skips in a row `run` takes, by `skip_nonfinite`; None without it."""
        return self.decision.skip_limit

    def init(self, params: Params, *, seed: Any = 0, model_state: Any = None) -> State:  # Any: below
        """Make a fresh state and place it on the mesh. The caller's arrays are copied, never aliased or deleted.

        Args:
          params: a tree of floating-point arrays. Leaves that already lie along other axes of the mesh than those
            of the rows stay so; all others become whole on every device. Of `jax.ShapeDtypeStruct` leaves the
            result is the state's shapes, for `lower`.
          seed: a whole number; it becomes the threefry key `state.rng`. Or a typed key, of any implementation.
          model_state: the model's own state, for `grad(loss, model_state=True)`: a tree of numbers, such as batch statistics.
        Errors: ConfigError for parameters that cannot be trained, all of them at once; for a model_state that is missing.
        On several processes each gives the same: they compare pipeline, parameters, seed and model_state first.
        """
        check_params(params)
        check_seed(seed)
        check_model_state(model_state, self.decision.core)
        specs = model_axis_specs(params, self.mesh, self.decision.laid)
        shapes = jax.eval_shape(
            lambda params, model_state: self._fresh(params, seed, model_state), *shapes_of((params, model_state))
        )
        placement = placement_of_state(shapes, specs, self.decision.laid)
        shapes = replace(shapes, placement=placement)
        shardings = None if self.mesh is None else shardings_of(shapes, placement, self.mesh)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return shapes_with(shapes, shardings)
        check_start(repr(self), self.mesh, params, seed, model_state)
        placed = place_on_devices(
            (params, model_state), None if shardings is None else (shardings.params, shardings.model_state)
        )

        # One small program makes the state: its results are new buffers, also of leaves that are tied, or kept by the
        # optimizer; and no leaf is ever whole where it is not to be.
        def fresh(params: Params, model_state: Any) -> State:
            return replace(
                self._fresh(without_weak_types(params), seed, without_weak_types(model_state)), placement=placement
            )

        return jax.block_until_ready(jax.jit(fresh, out_shardings=shardings)(*placed))

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step. The state is donated: use the returned one.

        Errors: ConfigError, BatchError and LossError before anything is compiled; then nothing is lost.
        """
        state, metrics, _ = self.watched(state, batch)
        return state, metrics

    def watched(self, state: State, batch: Batch) -> StepOutputs:
        """One step, and what it saw of numbers that are not finite: the same program as a call."""
        if type(state) is not State or not isinstance(state.step, jax.Array) or state.step.is_deleted():
            refuse_state(state, self._made_of)
        try:
            placed = self._batches.placed(batch)
            answer = None if self._asking is None else self._asking.answer(state, placed)
            if self._gate is not None:
                self._gate.hold(placed, lambda: self.lower(state, placed).compile(), lambda: self.traces)
            if answer is not None:
                return answer.step.watched(state, placed)
            before = self.traces
            self._batches.compare(self._program, state, placed)
            made = StepOutputs(*self._program(state, placed))
            if before and self.traces > before:
                self._tell_traced_again(placed)
            return made
        except (TypeError, ValueError):  # jax refused an argument, or the trace refused the batch, or it is the user's
            self._batches.check(batch)
            raise

    def put(self, batch: Batch) -> Batch:
        """The batch on the devices, as a call takes it; on several processes, of the rows that each has."""
        return self._batches.put(batch)

    def shardings(self, state: State) -> ShardingTable:
        """Where every leaf of a state lies: path, shape, spec, bytes on each device; it prints as a table and draws.

        The state may be shapes only, as `init` of shapes makes it. Errors: ConfigError for another step's state.
        """
        check_state(state, self._made_of)
        return sharding_table(state, self.decision.laid, self.mesh)

    def reference(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The meaning of the pipeline, run eagerly on one device, on the same state. Nothing is donated."""
        if self._asking is not None:
            return self._asking.answer(state, batch).step.reference(state, batch)
        check_batch(batch, self.decision.core)
        here = jax.devices()[0]
        # A copy: what the meaning passes through unchanged, such as the key, must outlive a donated state.
        copied = jax.tree.map(jnp.copy, state)
        return self.meaning(jax.device_put(copied, here), jax.device_put(batch, here))

    @property
    def meaning(self) -> Reference:
        """The reference of this pipeline, with the axis sizes of this mesh."""
        return reference(self.pipeline, axes={} if self.mesh is None else dict(self.mesh.shape))

    def lower(self, state: State, batch: Batch) -> Lowered:
        """Trace and lower the step for a state and a batch, or for their shapes."""
        if self._asking is not None:
            answer = self._asking.answer(state, batch)
            lowered = answer.step.lower(state, batch)
            return replace(lowered, plan=replace(lowered.plan, search=answer.search))
        check_batch(batch, self.decision.core)
        shapes = self._batches.shapes(batch)
        return Lowered(self._program.trace(state, shapes), self._plan(state, shapes), self.mesh)

    @_in_our_mesh
    def _fresh(self, params: Params, seed: Any, model_state: Any) -> State:
        key = jax.random.key(seed, impl=KEYS) if isinstance(seed, int) else jax.random.clone(seed)
        made = self._made_of(params)
        return State(params, made["opt_state"], jnp.zeros((), jnp.int32), key, model_state, made["slots"])

    def _made_of(self, params: Params) -> dict[str, Any]:  # Any: by transform
        return {"opt_state": self.decision.optimizer.init(params), "slots": self.decision.slots(params)}

    @_in_our_mesh
    def _traced(self, state: State, batch: Batch) -> tuple[State, Metrics, Diagnostics]:
        self._traces += 1
        self._forms.append(signature_text(batch))
        check_batch(shapes_of(batch), self.decision.core)
        check_state(state, self._made_of)
        work, signature = self.decision.scheduled(state, batch)
        laid = self.decision.laid
        specs, parts = shard_dimensions(state.params, state.placement, laid)
        place = ManualRegion(
            self.mesh, self.decision.rows, specs, parts, laid.axis if laid.layout.zero else None,
            laid.layout.zero == 3, specs_by_path(state.model_state, state.placement, prefix="model_state"),
            draws(work) or signature.has_last,
        )  # fmt: skip
        new, metrics, watch = lower_schedule(work, place)(state, batch)
        check_fixed_point(state, new)
        if self.mesh is None:
            return new, metrics, watch
        lying = (shardings_of(new, state.placement, self.mesh), shardings_of(metrics, (), self.mesh))
        return (*jax.lax.with_sharding_constraint((new, metrics), lying), watch)

    def _tell_traced_again(self, batch: Batch) -> None:
        """A compilation that nobody asked for is never silent."""
        text = "%r was traced and compiled again, %d times now: the batch: %s. `pad_batch` fills a short one."
        self.why_traced_again = retrace_reason(self._forms[-2], self._forms[-1], batch)
        _LOG.warning(text, self, self.traces, self.why_traced_again)

    @_in_our_mesh
    def _plan(self, state: State, batch: Batch) -> Plan:
        mesh = () if self.mesh is None else tuple(self.mesh.shape.items())
        made, laid = self.decision, self.decision.laid
        work, leaves = made.scheduled(state, batch)[0], planned_leaves(state, laid, self.mesh)
        whole = gradient_shapes(state.params, state.placement, laid, divided=False)
        told = sharding_notes(work, laid, sum(leaf.size * leaf.dtype.itemsize for leaf in whole))
        sums = gradient_shapes(state.params, state.placement, laid, divided=accumulator_is_sharded(work))
        accumulator = tuple(leaf.shape for leaf in sums)
        return Plan(repr(self.pipeline), mesh, made.core, made.laws, work, laid.rows, leaves, told, accumulator)
