"""A pipeline becomes a step. The one place where the surface meets the passes."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc.compiler.check import check_batch, check_carry, check_fixed_point, check_params, check_seed, check_state
from stepc.compiler.decision import Decision, decide, shape_of
from stepc.compiler.guard import Guard
from stepc.compiler.instructions import Schedule
from stepc.compiler.lower import Place, lower
from stepc.compiler.making import Made
from stepc.compiler.placing import (
    placement_of,
    placement_of_state,
    put,
    shardings_of,
    specs_of,
    with_automatic_axes,
)
from stepc.compiler.plan import Leaf, Plan
from stepc.compiler.schedule import draws, schedule
from stepc.compiler.stages import Lowered
from stepc.compiler.watch import Watch
from stepc.errors import ConfigError
from stepc.inspect.budget import Budget
from stepc.language.kinds import Batch, Metrics, Params
from stepc.language.pipeline import Pipeline, Transform
from stepc.language.reference import Reference, reference
from stepc.language.state import KEYS, State, leaves_by_path

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
      or compiled before the first call; that raises BudgetError if the program breaks its budget.
    Example:
      >>> compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))
      compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))

    Source: ours.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        facts = (("expected", "a jax.sharding.Mesh, or None"), ("got", type(mesh).__name__))
        raise ConfigError("`mesh` is not a mesh.", facts=facts)
    if budget is not None and not isinstance(budget, Budget):
        facts = (("expected", "a stepc.Budget, or None"), ("got", type(budget).__name__))
        raise ConfigError("`budget` is not a budget.", facts=facts)
    return Step(pipeline, mesh, decide(pipeline, mesh), None if budget is None else Guard(budget))


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

    `traces` counts how often the program was traced; any number of calls with one batch shape is one trace.
    """

    def __init__(
        self, pipeline: Transform | Pipeline, mesh: Mesh | None, decision: Decision, guard: Guard | None = None
    ) -> None:
        self.pipeline = pipeline
        self.decision = decision
        self._guard = guard
        self.mesh = None if mesh is None else with_automatic_axes(mesh)
        self.traces = 0
        self._forms: list[str] = []
        spec = PartitionSpec(*([None] if decision.repeats > 1 else []), decision.rows)
        self._rows = None if self.mesh is None else NamedSharding(self.mesh, spec)
        options: dict[str, Any] = {} if self._rows is None else {"in_shardings": (None, self._rows)}

        def stepc_step(state: State, batch: Batch) -> tuple[State, Metrics, Watch]:  # the name of the program in HLO
            return self._traced(state, batch)

        self._program = jax.jit(stepc_step, donate_argnums=0, **options)

    def __repr__(self) -> str:
        mesh = "" if self.mesh is None else f", mesh={dict(self.mesh.shape)}"
        return f"compile({self.pipeline!r}{mesh})"

    @property
    def steps_per_call(self) -> int:
        """How many steps one call makes: n with `repeat(n)`, else 1."""
        return self.decision.repeats

    @property
    def skip_limit(self) -> int | None:
        """How many skips in a row `run` takes, by `skip_nonfinite`; None without it."""
        return self.decision.skip_limit

    def init(self, params: Params, *, seed: Any = 0, carry: Any = None) -> State:  # Any: below
        """Make a fresh state and place it on the mesh. The caller's arrays are copied, never aliased or deleted.

        Args:
          params: a tree of floating-point arrays. Leaves that already lie along other axes of the mesh than those
            of the rows stay so; all others become whole on every device. Of `jax.ShapeDtypeStruct` leaves the
            result is the state's shapes, for `lower`.
          seed: a whole number; it becomes the threefry key `state.rng`. Or a typed key, of any implementation.
          carry: the model's own state, for `grad(loss, carry=True)`: a tree of numbers, such as batch statistics.
        Errors: ConfigError for parameters that cannot be trained, all of them at once; for a carry that is missing.
        """
        check_params(params)
        check_seed(seed)
        check_carry(carry, self.decision.core)
        placement = placement_of(params, self.mesh, rows=self.decision.rows)
        bare = jax.tree.map(shape_of, params)
        carried = jax.tree.map(shape_of, carry)
        shapes = jax.eval_shape(lambda params, carry: self._fresh(params, seed, carry), bare, carried)
        placement = placement_of_state(shapes, placement, bare)
        shapes = replace(shapes, placement=placement)
        shardings = None if self.mesh is None else shardings_of(shapes, placement, self.mesh)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return _shapes_with(shapes, shardings)
        placed = put((params, carry), None if shardings is None else (shardings.params, shardings.carry))

        # One small program makes the state: its results are new buffers, also of leaves that are tied, or kept by the
        # optimizer; and no leaf is ever whole where it is not to be.
        def fresh(params: Params, carry: Any) -> State:
            return replace(self._fresh(params, seed, carry), placement=placement)

        return jax.block_until_ready(jax.jit(fresh, out_shardings=shardings)(*placed))

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step. The state is donated: use the returned one.

        Errors: ConfigError, BatchError and LossError before anything is compiled; then nothing is lost.
        """
        state, metrics, _ = self.watched(state, batch)
        return state, metrics

    def watched(self, state: State, batch: Batch) -> Made:
        """One step, and what it saw of numbers that are not finite: the same program as a call."""
        if type(state) is not State or not isinstance(state.step, jax.Array) or state.step.is_deleted():
            self._refuse(state)
        try:
            placed = self._placed(batch)
            if self._guard is not None:
                self._guard.hold(placed, lambda: self.lower(state, placed).compile(), lambda: self.traces)
            before = self.traces
            made = Made(*self._program(state, placed))
            if before and self.traces > before:
                self._tell_traced_again(placed)
            return made
        except (TypeError, ValueError):  # jax refused an argument, or the trace refused the batch, or it is the user's
            check_batch(batch, self.decision.core, shapes_too=False)
            raise

    def reference(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """The meaning of the pipeline, run eagerly on one device, on the same state. Nothing is donated."""
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
        check_batch(batch, self.decision.core)
        # jax traces host arrays and device arrays apart, so a lowered step is for the kind it is given.
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self._rows if isinstance(leaf, jax.Array) else None
            ),
            batch,
        )
        return Lowered(self._program.trace(state, shapes), self._plan(state, shapes), self.mesh)

    @_in_our_mesh
    def _fresh(self, params: Params, seed: Any, carry: Any) -> State:
        key = jax.random.key(seed, impl=KEYS) if isinstance(seed, int) else jax.random.clone(seed)
        made = self._made_of(params)
        return State(params, made["opt_state"], jnp.zeros((), jnp.int32), key, carry, made["slots"])

    def _made_of(self, params: Params) -> dict[str, Any]:  # Any: by word
        return {"opt_state": self.decision.optimizer.init(params), "slots": self.decision.slots(params)}

    @_in_our_mesh
    def _traced(self, state: State, batch: Batch) -> tuple[State, Metrics, Watch]:
        self.traces += 1
        self._forms.append(form_of(batch))
        check_batch(jax.tree.map(shape_of, batch), self.decision.core)
        check_state(state, self._made_of)
        signature = self.decision.signed(state, batch)
        work = schedule(self.decision.normal, signature)
        place = Place(
            self.mesh, self.decision.rows, specs_of(state.params, state.placement, prefix="params"),
            specs_of(state.carry, state.placement, prefix="carry"), draws(work) or signature.has_last,
        )  # fmt: skip
        new, metrics, watch = lower(work, place)(state, batch)
        check_fixed_point(state, new)
        if self.mesh is None:
            return new, metrics, watch
        lying = (shardings_of(new, state.placement, self.mesh), shardings_of(metrics, (), self.mesh))
        return (*jax.lax.with_sharding_constraint((new, metrics), lying), watch)

    @_in_our_mesh
    def _scheduled(self, state: State, batch: Batch) -> Schedule:
        return schedule(self.decision.normal, self.decision.signed(state, batch))

    def place(self, batch: Batch) -> Batch:
        """Put a batch on the devices, as the program takes it."""
        return jax.device_put(batch, self._rows)

    def _placed(self, batch: Batch) -> Batch:
        """The batch, moved if it is on devices and does not lie as the program takes it. The only loop of a call."""
        for leaf in jax.tree.leaves(batch):
            if type(leaf) is np.ndarray:
                continue
            if not isinstance(leaf, jax.Array):
                check_batch(batch, self.decision.core, shapes_too=False)
            elif self._rows is not None and leaf.sharding != self._rows:
                return put(batch, self._rows)
        return batch

    def _tell_traced_again(self, batch: Batch) -> None:
        """A compilation that nobody asked for is never silent."""
        was, now = self._forms[-2:]
        why = f"its form was {was}, and is {now}" if was != now else "jax types host arrays and device arrays apart"
        if was == now and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
            why = "the state is of another type, or its arrays lie elsewhere"
        text = "%r was traced and compiled again, %d times now: the batch: %s. `pad_batch` fills a short one."
        _LOG.warning(text, self, self.traces, why)

    def _refuse(self, state: Any) -> None:
        check_state(state, self._made_of)
        if not isinstance(state.step, jax.Array):
            raise ConfigError("These are the shapes of a state: `lower` takes them, a step needs the arrays.")
        raise ConfigError(
            "This state was donated to an earlier step: its arrays are deleted.",
            suggestion="Use the state that the step returned: `state, metrics = step(state, batch)`.",
        )

    def _plan(self, state: State, batch: Batch) -> Plan:
        placed = dict(state.placement)
        leaves = tuple(
            Leaf(path, leaf.shape, str(leaf.dtype), _bytes(leaf), _lies(placed.get(path)))
            for path, leaf in leaves_by_path(state)
        )
        mesh = () if self.mesh is None else tuple(self.mesh.shape.items())
        made = self.decision
        return Plan(repr(self.pipeline), mesh, made.core, made.laws, self._scheduled(state, batch), made.rows, leaves)


def form_of(batch: Batch) -> str:
    """The paths, types and shapes of a batch, in a line."""
    return ", ".join(f"{path or 'the batch'} {leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves_by_path(batch))


def _shapes_with(shapes: State, shardings: Any) -> State:
    if shardings is None:
        return shapes
    return jax.tree.map(
        lambda one, lying: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=lying), shapes, shardings
    )


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return int(jax.eval_shape(jax.random.key_data, leaf).size) * 4
    return int(leaf.size) * leaf.dtype.itemsize


def _lies(spec: PartitionSpec | None) -> str:
    return "whole on every device" if spec is None else str(spec)
