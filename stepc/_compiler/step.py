"""`compile` makes a `Step` of a pipeline: one jitted program, donated state. Here the surface meets the passes."""

import logging
import weakref
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Never

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepc._compiler.autotune import Autotuner, autotune_request, replace_request
from stepc._compiler.collectives import ManualRegion
from stepc._compiler.convolutions import channels_last_in_loops
from stepc._compiler.layers import TracedFunction
from stepc._compiler.lowering import StepOutputs, lower_schedule
from stepc._compiler.matrices import matrices_shared
from stepc._compiler.memory import HOST, in_host_memory, is_on_host, to_device, to_memory, to_memory_of, with_memory
from stepc._compiler.metrics import Diagnostics, TurnDiagnostics
from stepc._compiler.multihost import check_start
from stepc._compiler.normalize import NormalForm, normalize
from stepc._compiler.padded_update import PaddedUpdate, padded_update
from stepc._compiler.placement import (
    BatchPlacement,
    activation_axes,
    cut_leaves,
    gradient_shapes,
    held_bytes,
    matrices_alone,
    matrices_in_parts,
    model_axis_specs,
    names_in,
    opt_state_padding,
    padded_arrays,
    padded_leaves,
    place_on_devices,
    placement_of_state,
    shapes_of,
    shapes_with,
    shard_dimensions,
    sharded_along_rows,
    sharding_table,
    shardings_of,
    slot_specs,
    specs_in,
    specs_of_model_state,
    stored_as,
    stored_shapes,
    with_automatic_axes,
    without_weak_types,
)
from stepc._compiler.plan import (
    Plan,
    ShardingTable,
    notes_of_matrices,
    notes_of_offload,
    notes_of_padding,
    notes_of_stacks,
)
from stepc._compiler.schedule import (
    LossStructure,
    Optimize,
    Schedule,
    accumulator_is_sharded,
    draws,
    exchange_notes,
    gathers_rows,
    notes_of_names,
    schedules_of_turns,
    sharding_notes,
)
from stepc._compiler.sharding import names_of_params
from stepc._compiler.stages import Compiled, Lowered
from stepc._compiler.validation import (
    ArgumentTypes,
    BatchSignature,
    argument_types,
    batch_signature,
    check_arrays,
    check_batch,
    check_compiler_options,
    check_fixed_point,
    check_like,
    check_model_state,
    check_option,
    check_padding,
    check_params,
    check_seed,
    check_state,
    refused_option,
    type_changes,
)
from stepc._core.nodes import Turn
from stepc._jax import as_mesh_of_step, first_of, has_tracers, is_transforming
from stepc._language.kinds import Batch, Metrics, Params
from stepc._language.names import names_by_path, unboxed
from stepc._language.pipeline import Pipeline, Transform, settings_of, transforms_of
from stepc._language.reference import complete_transforms, reference, skip_limit_of, with_losses
from stepc._language.state import (
    KEYS,
    State,
    as_arrays,
    carried_over,
    copied_to,
    describe_leaf,
    leaves_by_path,
    memory_of,
    own_shapes,
    padded_places,
    path_of,
    state_of_turn,
    trained_leaves,
    unpadded_params,
)
from stepc.errors import BatchError, ConfigError, FieldTypeError, StepcError, leaf_text, listed
from stepc.inspect.budget import Budget

MOST_CHANGES = 8  # that a warning lists
FRAME_SIZE = 1 << 15  # of the function that is traced, in words

_LOG = logging.getLogger("stepc")


def compile(
    pipeline: Transform | Pipeline,
    *positional: Never,
    mesh: Mesh | None = None,
    budget: Budget | None = None,
    compiler_options: Mapping[str, Any] | None = None,  # Any: a flag's value, as `jax.jit` takes it
) -> "Step":
    """Make one jitted program of a pipeline, for a mesh. It donates its state.

    Meaning: `step(state, batch)` equals `reference(pipeline)(state, batch)`, up to the order of summation.
    Why: one `lax.scan` over microbatches, one reduction of the gradient per step whatever their number, and every
      decision printed in `step.lower(state, batch).plan`.

    Args:
      pipeline: a complete pipeline that gives a step.
      mesh: a `jax.sharding.Mesh`, its axes of any type; None for the default device. Axes that the pipeline does
        not name stay automatic: parameters that are sharded over them stay sharded.
      budget: what the step may cost. It is checked before the first call with each signature of a batch.
      compiler_options: flags of XLA for this step alone, by name, as `jax.jit` takes them. They may change how numbers
        are rounded.
    Errors: FieldTypeError for what is no pipeline, and for another argument of another type; ConfigError if the
      pipeline is not complete; ShardingError if the mesh lacks an axis. Nothing is traced or compiled before the first
      call; that raises BudgetError if the program exceeds its budget, or if nothing fits an `accumulate(memory=...)`,
      and ConfigError if XLA refuses one of the `compiler_options`.
    Example:
      >>> compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))
      compile(update(optax.sgd(0.1)) @ accumulate(4) @ grad(loss))

    Source: ours.
    """
    if positional:
        got = ", ".join(type(one).__name__ for one in positional)
        suggestion = "Write `compile(pipeline, mesh=mesh)`." if isinstance(positional[0], Mesh) else None
        what = "`compile` takes one pipeline; its other arguments are named."
        raise FieldTypeError(what, facts=(("got", f"a pipeline, and {got}"),), suggestion=suggestion)
    remedy = 'Write `jax.make_mesh((8,), ("data",))`, for eight devices.'
    check_option("mesh", mesh, Mesh, expected="a jax.sharding.Mesh", remedy=remedy)
    check_option("budget", budget, Budget, expected="a stepc.Budget")
    flags = {} if compiler_options is None else compiler_options
    check_compiler_options(flags)
    transforms, flags = complete_transforms(pipeline), dict(flags)
    gate = None if budget is None else BudgetGate(budget)
    request = autotune_request(pipeline)
    if request is None:
        return Step(pipeline, mesh, normalize(transforms, mesh), gate, compiler_options=flags)

    def step_of(answered: Pipeline) -> Step:
        return Step(answered, mesh, normalize(answered.transforms, mesh), compiler_options=flags)

    position, question = request
    one_part = normalize(replace_request(pipeline, position, question.resolved(1)).transforms, mesh)
    autotuner = Autotuner(pipeline, position, question, one_part.core, step_of)
    return Step(pipeline, mesh, one_part, gate, autotuner, compiler_options=flags)


class Step:
    """A compiled pipeline: `init` makes a state, a call makes a step.

    A number that the pipeline leaves to the compiler is chosen once for each signature of a batch; program, plan and
    reference are then those of the pipeline with that number.
    """

    def __init__(
        self,
        pipeline: Transform | Pipeline,
        mesh: Mesh | None,
        normal_form: NormalForm,
        gate: "BudgetGate | None" = None,
        autotuner: "Autotuner[Step] | None" = None,
        compiler_options: dict[str, Any] | None = None,  # Any: a flag's value
    ) -> None:
        self.pipeline = pipeline
        self.normal_form = normal_form
        self.mesh = None if mesh is None else with_automatic_axes(mesh)
        self.compiler_options = compiler_options or {}
        self.retrace_reason = ""
        self._gate = gate
        self._autotuner = autotuner
        self._batches = BatchPlacement(self.mesh, normal_form)
        self._traces = 0
        self._traced: list[tuple[ArgumentTypes, ArgumentTypes]] = []  # the states and batches that it was traced for
        # Of each program also how many convolutions are computed in another order of dimensions.
        self._schedules: dict[BatchSignature, tuple[Schedule, tuple[LossStructure, ...], int]] = {}
        self._made: set[BatchSignature] = set()  # of the states that `init` has made
        self._names_mesh: dict[BatchSignature, bool] = {}  # whether a loss names the mesh, or axes of it
        self._has_several_devices = mesh is not None and mesh.size > 1
        # The state that the last call returned, if it is alive.
        self._returned: Callable[[], State | None] = lambda: None

        def stepc_step(
            state: State, batch: Batch
        ) -> tuple[State, Metrics, Diagnostics | TurnDiagnostics]:  # the name of the program in HLO
            self._traces += 1
            return _also_reads(state, *self._trace(state, batch))

        # CPython keeps frames in chunks of 16 KiB. A call at the end of one maps the next, and its return unmaps it: a
        # trace makes a million calls, and takes up to half as long again if many are there. The chunk of a large frame
        # has room for all frames of a trace.
        stepc_step.__code__ = stepc_step.__code__.replace(co_stacksize=FRAME_SIZE)
        self._jitted = partial(
            jax.jit,
            stepc_step,
            donate_argnums=0,
            compiler_options=self.compiler_options or None,
            **self._batches.options,
        )
        self._programs: dict[Any, Any] = {}  # Any, twice: how a state is stored; a jitted function
        self._program: Any = None  # that of the last call

    def __repr__(self) -> str:
        mesh = "" if self.mesh is None else f", mesh={dict(self.mesh.shape)}"
        flags = f", compiler_options={self.compiler_options}" if self.compiler_options else ""
        return f"compile({self.pipeline!r}{mesh}{flags})"

    def settings(self) -> list[tuple[str, dict[str, str]]]:
        """Each transform as it prints, with the numbers that it does not print, such as a learning rate."""
        return settings_of(self.pipeline)

    @property
    def traces(self) -> int:
        """How often the program was traced; any number of calls with one batch shape is one trace."""
        if self._autotuner is None:
            return self._traces
        return self._traces + sum(answer.step.traces for answer in self._autotuner.tuned.values())

    @property
    def function(self) -> Callable[[State, Batch], tuple[State, Metrics]]:
        """The same step as a pure function that donates nothing, for a `jit`, `scan`, `vmap` or `grad` of your own.

        Meaning: `step.function(state, batch)` is `step(state, batch)`, and leaves the state as it is.
        Why: a training run in one `lax.scan`, an ensemble or a sweep by `vmap`, over states or a learning rate.

        It is sharded as the step is, and so is each member under `vmap`. `budget` and `traces` are those of calls,
        donation and compiler options are your own `jit`'s. A number that the pipeline leaves to the compiler is chosen
        for one step alone.
        Example:
          >>> state, metrics = jax.lax.scan(step.function, state, batches)  # doctest: +SKIP
        """
        return self._function

    @property
    def steps_per_call(self) -> int:
        """How many steps one call makes: n with `repeat(n)`, n m with `epochs(n, minibatches=m)`, else 1."""
        return self.normal_form.steps_per_call

    @property
    def rows_axis(self) -> int:
        """The axis of the leaves of a batch that counts rows: 1 with `repeat(n)`, else 0."""
        return self.normal_form.rows_axis

    @property
    def skip_limit(self) -> int | None:
        """How many steps in a row `run` lets `skip_nonfinite` skip; None without it."""
        return self.normal_form.skip_limit

    @property
    def reference(self) -> "StepReference":
        """The reference of the pipeline: `step.reference(state, batch)` is one step, run eagerly.

        It runs on one device, or under the step's mesh where a loss names the mesh or an axis of it.
        """
        return StepReference(self.pipeline, self.mesh, self._pipeline_for, self._mesh_of_loss)

    def init(
        self, params: Params, *, seed: Any = None, model_state: Any = None, like: State | None = None
    ) -> State:  # Any: below
        """Make a fresh state and place it on the mesh. The caller's arrays are copied, never aliased or deleted.

        Args:
          params: a tree of arrays: of floating-point numbers where they are trained, of any dtype where
            `grad(loss, wrt=...)` freezes them. Leaves that are sharded over automatic axes of the mesh stay so; all
            others are replicated, or sharded as the rules of `shard` say. With `jax.ShapeDtypeStruct` leaves the result
            is the shapes of the state, for `lower`.
          seed: an integer, which becomes the threefry key `state.rng`; or a typed key of any implementation. None is 0.
          model_state: the model's own state, for `grad(loss, model_state=True)`: a tree of numbers, such as batch
            statistics.
          like: a state to go on from where what is trained changes: `step.init(state.params, like=state)`. Step, key
            and model state are its own, and so are optimizer state and slots of what was trained already; what is
            trained from now on begins afresh. A count that all parameters share, as Adam's, goes on: the bias of
            moments that begin later is not corrected.
        Errors: ConfigError with all parameters that cannot be trained, for a model state that is missing, for a seed of
          more than 64 bits; FieldTypeError for a seed that is neither an integer nor a typed key.
        On several processes each passes the same: pipeline, parameters, seed and model state are compared first.
        """
        _check_no_tracers(
            "init", (params, seed, model_state, like),
            "Call it outside. For the shapes of a state, give it those of the parameters: "
            "`step.init(jax.eval_shape(make_params))`.",
        )  # fmt: skip
        names, params, model_state = names_by_path(params), unboxed(params), unboxed(model_state)
        check_params(params, self.normal_form.wrt)
        if like is not None:
            check_like(like, seed, model_state, lambda params, wrt: self._transform_state(params, wrt)["opt_state"])
            params, like = unpadded_params(params, like), like.unpadded()
            model_state, names = like.model_state, {**names_in(like.placement), **names}
        seed = 0 if seed is None else seed
        check_seed(seed)
        rules = self.normal_form.rules
        sizes = dict(rules.sizes)
        check_model_state(model_state, self.normal_form.core, prod(sizes[axis] for axis in rules.rows))
        specs = model_axis_specs(params, names, self.mesh, rules)
        # Jitted, so that the shapes and the program share one trace of the optimizer's `init`; inline, because XLA
        # would take a quarter longer to compile a call with 500 arguments.
        fresh_state = jax.jit(lambda params, model_state: self._fresh(params, seed, model_state), inline=True)
        with self._own_mesh():
            shapes = shapes_of(fresh_state.eval_shape(*self._shapes_on_mesh((params, model_state))))
        matrices = self.normal_form.matrices(shapes.params, shapes.opt_state) if rules.layout.zero else ()
        placement = placement_of_state(shapes, specs, names, rules, self.normal_form.model_state_rules, matrices)
        shapes = replace(shapes, placement=placement)
        stored = stored_shapes(shapes, rules)
        check_padding(placement)
        self._made.add(batch_signature(stored))
        host = in_host_memory(shapes, params, model_state, rules)
        shardings = None if self.mesh is None else with_memory(shardings_of(shapes, placement, self.mesh), host)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
            return shapes_with(stored, shardings)
        check_start(repr(self), self.mesh, params, seed, model_state)
        placed = place_on_devices(
            padded_arrays((params, model_state), (stored.params, stored.model_state)),
            None if shardings is None else (shardings.params, shardings.model_state),
        )

        # One small program makes the state. Its results are new buffers, also of leaves that are tied, or kept by the
        # optimizer; and no leaf that is to be sharded is ever replicated.
        def fresh(params: Params, model_state: Any) -> State:
            with self._own_mesh():
                params, model_state = (
                    cut_leaves(without_weak_types(to_device(tree)), placement, prefix=field)
                    for field, tree in (("params", params), ("model_state", model_state))
                )
                state = replace(fresh_state(params, model_state), placement=placement)
                state = padded_leaves(state, stored)
            # Without a mesh nothing says where a result is to be.
            return state if shardings is not None else to_memory(state, host)

        with jax.disable_jit(False):  # the program is what copies and places: operations alone do neither
            state = jax.jit(fresh, out_shardings=shardings)(*placed)
        if like is not None:
            state = jax.tree.map(
                lambda made, shape, one: made if one is shape else _moved(one, made),
                state,
                shapes,
                carried_over(shapes, like),
            )
        return jax.block_until_ready(state)

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step. The state is donated: use the returned one.

        Errors: ConfigError, BatchError and LossError before anything is compiled; the state is then alive. A state that
          has a deleted array, or one array twice or in the batch too, is refused by path.
        """
        state, metrics, _ = self.step_with_diagnostics(state, batch)
        return state, metrics

    def step_with_diagnostics(self, state: State, batch: Batch) -> StepOutputs:
        """One step, by the same program as a call, and its diagnostics: what it saw of numbers that are not finite."""
        if is_transforming((state, batch)):
            raise ConfigError(
                "The step was called in a `jit`, `scan`, `vmap` or `grad`; a call runs at once and donates the state.",
                suggestion="Use `step.function`: it is the same step as a pure function, and donates nothing.",
            )
        if type(state) is not State:
            check_state(state, self._transform_state, self.normal_form.wrt)
        is_returned = state is self._returned()
        try:
            placed = self._batches.placed(batch)
            # XLA refuses on one device what it cannot donate; on several it crashes.
            if not is_returned or self._has_several_devices or state.step.is_deleted():
                check_arrays(state, batch, placed, compare_buffers=not is_returned)
            if not is_returned:
                state = self._on_mesh(state, _copy_at)
            tuned = None if self._autotuner is None else self._autotuner.tune(state, placed)
            if self._gate is not None:
                self._gate.check(placed, lambda: self.lower(state, placed).compile(), lambda: self.traces)
            if tuned is not None:
                outputs = tuned.step.step_with_diagnostics(state, placed)
                self._returned = weakref.ref(outputs.state)
                return outputs
            before = self._traces
            if not is_returned:
                self._program = self._program_for(state)
            self._batches.compare(self._program, state, placed)
            outputs = StepOutputs(*self._program(state, placed))
            self._returned = weakref.ref(outputs.state)
            if before < self._traces:
                self._note_trace(state, placed)
            return outputs
        except (TypeError, ValueError, RuntimeError) as error:  # of jax for an argument, of the trace, or of the loss
            if (refusal := refused_option(error)) is not None:
                raise refusal from error
            if not isinstance(error, BatchError):  # its message has all faults already
                self._batches.check(batch)
            if str(error).startswith(("INVALID_ARGUMENT", "Array has been deleted")):  # of XLA or jax: it did not run
                check_arrays(state, batch, batch, compare_buffers=True)
            self.note_changes(error, state, batch)
            raise
        except Exception as error:  # of the loss or the optimizer, whatever it is: it passes through
            self.note_changes(error, state, batch)
            raise

    def note_changes(self, error: Exception, state: State, batch: Batch) -> None:
        """Say in a note what is not as it was when the step was last traced: the user's own code may fail on that."""
        if isinstance(error, StepcError):
            return
        if "evenly divisible" in str(error):  # of jax, for a `shard_map` in the loss
            pairs = zip(leaves_by_path(own_shapes(state).params), leaves_by_path(state.params), strict=True)
            given = [
                f"{leaf_text(path, 'the parameter')} as {describe_leaf(own)}"
                for (path, own), (_, leaf) in pairs
                if own.shape != leaf.shape
            ]
            told = f"stepc: `tp(..., pad=True)` pads the state alone; the loss is given {listed(given)}"
            if given:
                error.add_note(f"{told}. `jnp.pad` it there to what divides, before the `shard_map`.")
        if not self._traced:
            return
        in_state, in_batch = self._traced[-1]
        # A loss sees types. Where a batch is, is not its concern.
        types = {path: (kind, in_batch.get(path, ("", ""))[1]) for path, (kind, _) in argument_types(batch).items()}
        changes = (("state", type_changes(in_state, argument_types(state))), ("batch", type_changes(in_batch, types)))
        told = [f"in the {name}, {_shown(rows)}" for name, rows in changes if rows]
        if told:
            error.add_note(f"stepc: since the step was last traced: {'; '.join(told)}.")

    def put(self, batch: Batch) -> Batch:
        """Place a batch as a call takes it; on several processes, from the rows that each of them has."""
        return self._batches.put(batch)

    def lower(self, state: State, batch: Batch) -> Lowered:
        """Trace and lower the step for a state and a batch, or for their shapes.

        Trace and compilation are those of a call: whichever comes first, the other makes neither again.
        """
        _check_no_tracers("lower", (state, batch), "Call it outside.")
        batch, state = as_arrays(batch), self._on_mesh(state, _shape_at)
        if self._autotuner is not None:
            tuned = self._autotuner.tune(state, batch)
            lowered = tuned.step.lower(state, batch)
            return replace(lowered, plan=replace(lowered.plan, search=tuned.search))
        check_batch(batch, self.normal_form.core)
        shapes = self._batches.shapes(batch)
        before = self._traces
        try:
            traced = self._program_for(state).trace(state, shapes)
        except Exception as error:  # as in a call
            self.note_changes(error, state, batch)
            raise
        if before < self._traces:
            self._traced.append((argument_types(state), argument_types(batch)))
        return Lowered(traced, self._plan(state, shapes), self.mesh)

    def _on_mesh(self, state: State, placed: Callable[[Any, Any], Any]) -> State:  # Any: as in `_copy_at`
        """The state with arrays that the caller has put elsewhere `placed(array, sharding)` where they belong.

        jax takes no arrays of other devices or of explicit axes, and XLA donates none that it shards as it likes.
        """
        mesh = self.mesh
        if mesh is None or not any(_is_elsewhere(leaf, mesh) for leaf in jax.tree.leaves(state)):
            return state
        check_state(state, self._transform_state, self.normal_form.wrt)
        host = in_host_memory(state, state.params, state.model_state, self.normal_form.rules)
        return jax.tree.map(
            lambda leaf, place: placed(leaf, place) if _is_elsewhere(leaf, mesh) else leaf,
            state,
            with_memory(shardings_of(state, state.placement, mesh), host),
        )

    def _program_for(self, state: State) -> Any:  # Any: a jitted function
        """The program that returns a state as this one is stored: sharded as it is, and in the same memory."""
        if type(state) is not State:
            check_state(state, self._transform_state, self.normal_form.wrt)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        host = frozenset(path_of(keys) for keys, leaf in leaves if memory_of(leaf) == HOST)
        stored = jax.tree.structure(state), host
        if stored not in self._programs:
            shardings = None if self.mesh is None else (*_shardings_of_outputs(state, host, self.mesh), None)
            self._programs[stored] = self._jitted(out_shardings=shardings)
        return self._programs[stored]

    def shardings(self, state: State) -> ShardingTable:
        """How every leaf of a state is sharded: its path, shape, spec and bytes on each device. It prints as a table.

        The state may be shapes, as `init` makes them of shapes. Errors: ConfigError for another step's state.
        """
        _check_no_tracers("shardings", state, "Call it outside: it reads where the arrays of a state are.")
        check_state(state, self._transform_state, self.normal_form.wrt)
        return sharding_table(state, self.normal_form.rules, self.mesh)

    def _shapes_on_mesh(self, tree: Any) -> Any:  # Any, twice: trees of one structure
        """The shapes of arrays on the mesh, sharded somehow: jax traces them apart from those of no mesh."""
        somehow = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=somehow), shapes_of(tree)
        )

    def _fresh(self, params: Params, seed: Any, model_state: Any) -> State:
        key = jax.random.key(seed, impl=KEYS) if isinstance(seed, int) else jax.random.clone(seed)
        made = self._transform_state(params)
        fields = (params, made["opt_state"], jnp.zeros((), jnp.int32), key, model_state, made["slots"])
        return State(*fields, wrt=self.normal_form.wrt)

    def _transform_state(
        self, params: Params, wrt: tuple[str, ...] | None = None
    ) -> dict[str, Any]:  # Any: by transform
        """The part of a fresh state that the transforms make; `wrt` is that of the pipeline, if None."""
        form, wrt = self.normal_form, self.normal_form.wrt if wrt is None else wrt
        return {"opt_state": form.optimizer_state(params, wrt), "slots": form.slots(params, wrt)}

    def _function(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        batch = as_arrays(batch)
        if type(state) is not State:
            check_state(state, self._transform_state, self.normal_form.wrt)
        if self._autotuner is not None:
            shapes = shapes_of(state)
            placed = (
                shapes if self.mesh is None else shapes_with(shapes, shardings_of(shapes, state.placement, self.mesh))
            )
            return self._autotuner.tune(placed, shapes_of(batch)).step._function(state, batch)
        if self.mesh is not None:
            batch = jax.lax.with_sharding_constraint(batch, self._batches.shardings(batch))
        new, metrics, _ = self._trace(state, batch)
        if self.mesh is None:
            return new, metrics
        host = frozenset(path for path, leaf in leaves_by_path(state) if is_on_host(leaf))
        shardings, of_metrics = _shardings_of_outputs(state, host, self.mesh)
        return jax.lax.with_sharding_constraint(new, shardings), jax.lax.with_sharding_constraint(metrics, of_metrics)

    def _trace(self, state: State, batch: Batch) -> tuple[State, Metrics, Diagnostics | TurnDiagnostics]:
        """What the program does, while jax traces it."""
        with self._own_mesh():
            check_batch(shapes_of(batch), self.normal_form.core)
            if batch_signature(state) not in self._made:
                check_state(state, self._transform_state, self.normal_form.wrt)
            # The optimizer moves its own state, after the loss.
            moved = replace(to_device(replace(state, opt_state=())), opt_state=state.opt_state)
            own = own_shapes(moved)
            schedule, structures, losses = self.normal_form.schedule(own, batch)
            parts = zip(self.normal_form.turns, schedules_of_turns(schedule), structures, losses, strict=True)
            regions = tuple(self._region(state, batch, *part) for part in parts)
            outputs, reordered = self._run(partial(lower_schedule(schedule, regions), moved, batch), structures)
            new, metrics, diagnostics = outputs
            self._schedules[_signature(state, batch)] = schedule, structures, reordered
            check_fixed_point(moved, new)
            return to_memory_of(new, moved, state), metrics, diagnostics

    def _run(
        self, lowered: Callable[[], StepOutputs], structures: tuple[LossStructure, ...]
    ) -> tuple[StepOutputs, int]:
        """What the lowered schedule returns, and how many convolutions have another order of dimensions in it."""
        platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
        if platform == "cpu" and any(one.has_convolutions for one in structures):
            return channels_last_in_loops(lowered)
        return lowered(), 0

    def _region(
        self,
        state: State,
        batch: Batch,
        turn: Turn,
        schedule: Schedule,
        structure: LossStructure,
        loss: TracedFunction | None,
    ) -> ManualRegion:
        """The mesh, and how the trees of one turn are sharded there."""
        rules, opt_state = self.normal_form.rules, opt_state_padding(state, turn.name)
        stored, state = state, own_shapes(state)
        of_slots = slot_specs(state, turn, rules)
        if turn.name:
            stored, state = (state_of_turn(one, turn, one.rng) for one in (stored, state))
        specs, dimensions = shard_dimensions(state.params, state.placement, rules)
        grad_specs, grad_dimensions = shard_dimensions(state.trained, state.placement, rules)
        return ManualRegion(
            mesh=self.mesh,
            batch_axes=self.normal_form.batch_axes,
            specs=specs,
            dimensions=dimensions,
            grad_specs=grad_specs,
            grad_dimensions=grad_dimensions,
            shard_axes=rules.shard_axes if rules.layout.zero else (),
            has_sharded_params=rules.layout.zero == 3,
            model_state=structure.model_state,
            model_state_specs=specs_of_model_state(state, rules),
            model_state_tree=jax.tree.structure(state.model_state),
            slot_specs=of_slots,
            activation_axes=activation_axes(state.placement, rules, structure.named_axes),
            matrices=matrices_in_parts(state.trained, state.placement, rules),
            matrices_alone=matrices_alone(state.trained, state.placement, rules),
            opt_state_padding=opt_state,
            padded_update=_padded_update(schedule, state, stored),
            has_row_numbers=draws(schedule) or gathers_rows(schedule) or structure.has_last or structure.has_keys,
            batch_specs=self._batches.minibatch_specs(batch),
            outside=dict(structure.outside),
            loss=loss,
            sites=self.normal_form.sites,
        )

    def _plan(self, state: State, batch: Batch) -> Plan:
        """The plan of a program that is traced already."""
        with self._own_mesh():
            mesh = () if self.mesh is None else tuple(self.mesh.shape.items())
            form, rules = self.normal_form, self.normal_form.rules
            schedule, structures, reordered = self._schedules[_signature(state, batch)]
            leaves, state = sharding_table(state, rules, self.mesh).rows, own_shapes(state)
            notes = exchange_notes(schedule, self._batches.minibatch_bytes(batch))
            sums: list[tuple[jax.ShapeDtypeStruct, ...]] = []
            for turn, part, structure in zip(form.turns, schedules_of_turns(schedule), structures, strict=True):
                trained = trained_leaves(state.params, turn.loss.wrt)
                gradient = gradient_shapes(trained, state.placement, rules, sharded=False)
                along_rows = sharded_along_rows(trained, state.placement)
                by_path = leaves_by_path(trained)
                reduced = [leaf for (path, _), leaf in zip(by_path, gradient, strict=True) if path not in along_rows]
                gradient_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in reduced)
                prefix = f"{turn.name}: " if turn.name else ""
                num_values = sum(leaf.size for leaf in reduced)
                of_activations = activation_axes(state.placement, rules, structure.named_axes)
                outside = dict(structure.outside) if rules.layout.outside == "step" else {}
                held = held_bytes(state.params, state.placement, rules, outside) if outside else 0
                told = sharding_notes(part, rules, gradient_bytes, num_values, along_rows, of_activations, held)
                parts = matrices_in_parts(trained, state.placement, rules)
                shared: tuple[int, ...] = ()
                if isinstance(update := part[-1], Optimize) and (
                    alone := matrices_alone(trained, state.placement, rules)
                ):
                    own = state.opt_state[turn.name] if turn.name else state.opt_state
                    params, own = shapes_of((trained, own))
                    shared = matrices_shared(update.node.optimizer, params, own, alone, update.node.written)
                told += notes_of_matrices(part[-1], by_path, state.placement, parts, shared)
                notes += tuple(f"{prefix}{note}" for note in told)
                if accumulator_is_sharded(part):
                    gradient = gradient_shapes(trained, state.placement, rules, sharded=True)
                sums.append(gradient)
            notes += (*self._note_of_names(state), *notes_of_offload(leaves), *notes_of_padding(leaves))
            stacks = dict.fromkeys(path for one in structures for path in one.stacks)
            notes += notes_of_stacks(list(stacks), leaves, self.mesh)
            largest = max(sums, key=lambda one: sum(leaf.size for leaf in one))
            pairs = list(zip(form.turns, structures, strict=True))
            model_state = (replace(leaf, turn=turn.name) for turn, one in pairs for leaf in one.model_state)
            return Plan(
                repr(self.pipeline), mesh, form.core, form.laws, schedule, rules.rows, leaves, notes,
                tuple(model_state), tuple(leaf.shape for leaf in largest),
                losses=tuple((turn.loss.written, one.row_use) for turn, one in pairs if one.row_use is not None),
                reordered=reordered,
            )  # fmt: skip

    def _note_of_names(self, state: State) -> tuple[str, ...]:
        """What the model library says of the dimensions of parameters, where nothing reads it."""
        rules, paths = self.normal_form.rules, [path for path, _ in leaves_by_path(state.params)]
        _, ignored = names_of_params(rules, paths, names_in(state.placement))
        is_placed = not rules.has_rules and any(specs_in(state.placement).get(f"params/{path}") for path in paths)
        if self.mesh is None or is_placed:  # arrays that the caller has sharded keep that sharding
            return ()
        return notes_of_names(ignored)

    @contextmanager
    def _own_mesh(self) -> Generator[None]:
        """Trace under the step's own mesh, whatever mesh the caller has set: no ambient state changes a step."""
        with ExitStack() as entered:
            if self.mesh is not None:
                entered.enter_context(jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh))
                entered.enter_context(as_mesh_of_step(self.mesh))
            yield

    def _mesh_of_loss(self, state: State, batch: Batch) -> Mesh | None:
        """The mesh, if a loss names it or an axis of it; it is traced for that, where there is an axis to name."""
        if self.mesh is None or set(self.mesh.axis_names) == set(self.normal_form.batch_axes):
            return None
        signature = _signature(state, batch)
        if signature not in self._names_mesh:
            with self._own_mesh():
                _, structures, _ = self.normal_form.schedule(*shapes_of((own_shapes(state), batch)))
            self._names_mesh[signature] = any(one.names_mesh for one in structures)
        return self.mesh if self._names_mesh[signature] else None

    def _pipeline_for(self, state: State, batch: Batch) -> Transform | Pipeline:
        if self._autotuner is not None:
            return self._autotuner.tune(state, batch).step._pipeline_for(state, batch)
        check_batch(batch, self.normal_form.core)
        if self._mesh_of_loss(state, batch) is None:
            return self.pipeline
        # Each primitive in a `shard_map` that runs eagerly is a program of its own, compiled for every call.
        return with_losses(transforms_of(self.pipeline), jax.jit)

    def _note_trace(self, state: State, batch: Batch) -> None:
        """A compilation that nobody asked for is never silent. A donated state still has the types of its leaves."""
        if self._traced:
            self.retrace_reason, remedy = self._retrace_reason(state, batch)
            text = "%r was traced and compiled again, %d times now: %s.%s"
            _LOG.warning(text, self, self.traces, self.retrace_reason, remedy)
        self._traced.append((argument_types(state), argument_types(batch)))

    def _retrace_reason(self, state: State, batch: Batch) -> tuple[str, str]:
        """What differs from the most similar of the states and batches before, and the remedy."""
        kinds = argument_types(state), argument_types(batch)
        all_changes = [tuple(map(type_changes, one, kinds)) for one in self._traced]
        in_state, in_batch = min(all_changes, key=lambda changes: sum(map(len, changes)))
        told = [f"in the {name}, {_shown(rows)}" for name, rows in (("state", in_state), ("batch", in_batch)) if rows]
        remedy = " `pad_batch` fills a short one." if in_batch else ""
        if in_state:
            remedy = (
                " A leaf that replaces another needs its type: `jax.device_put(value.astype(old.dtype), old.sharding)`."
            )
        return "; ".join(told) or "a setting of jax has changed, or its caches were cleared", remedy


@dataclass(frozen=True)
class StepReference:
    """The reference of a step's pipeline: plain loops, run eagerly.

    It takes and returns the states of the step, and may stand wherever a step stands.

    Args:
      pipeline: the step's.
      mesh: the step's.
      pipeline_for: checks a batch, and gives the pipeline with every number that it leaves to the compiler.
      mesh_of_loss: the mesh, if a loss names it or an axis of it.
    """

    pipeline: Transform | Pipeline
    mesh: Mesh | None
    pipeline_for: Callable[[State, Batch], Transform | Pipeline]
    mesh_of_loss: Callable[[State, Batch], Mesh | None]

    @property
    def axes(self) -> Mapping[str, int]:
        """The size of each axis of the step's mesh, by name."""
        return {} if self.mesh is None else dict(self.mesh.shape)

    @property
    def skip_limit(self) -> int | None:
        """That of the step."""
        return skip_limit_of(self.pipeline)

    def init(
        self, params: Params, *, seed: Any = None, model_state: Any = None, like: State | None = None
    ) -> State:  # Any: as in `Step.init`
        """Make a fresh state, equal to that of `step.init`.

        Errors: ConfigError if the pipeline leaves a number to the compiler.
        """
        return reference(self.pipeline, axes=self.axes).init(params, seed=seed, model_state=model_state, like=like)

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step. Nothing is donated: state and batch are copied, from wherever they are, to where it runs.

        Errors: BatchError for a batch that does not divide; ConfigError for a state with a deleted array.
        """
        _check_no_tracers("reference", (state, batch), "Call it outside, or use `step.function` there.")
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            check_arrays(state, (), (), compare_buffers=False)
        semantics = reference(self.pipeline_for(state, as_arrays(batch)), axes=self.axes)
        with self.surroundings(state, batch) as copies:
            new, metrics = semantics(*copies)
        return stored_as(new, state), metrics

    @contextmanager
    def surroundings(self, state: State, batch: Batch) -> Generator[tuple[State, Batch]]:
        """Where the reference runs, with a copy of both, the state without padding.

        That is one device, or every device of a mesh that a loss names.

        A copy, since what the reference passes through unchanged, such as the key, must outlive a donated state.
        """
        batch = as_arrays(batch)
        mesh = self.mesh_of_loss(state, batch)
        state = state.unpadded() if isinstance(state, State) else state
        if mesh is None:
            device = jax.devices()[0]
            yield copied_to(state, device), jax.device_put(batch, device)
            return
        with jax.set_mesh(mesh), as_mesh_of_step(mesh):
            everywhere = NamedSharding(mesh, PartitionSpec())
            yield copied_to(state, everywhere), jax.device_put(batch, everywhere)


def _moved(leaf: jax.Array, made: jax.Array) -> jax.Array:
    """A copy of a leaf of another state, padded and placed as a fresh one is."""
    return _copy_at(padded_arrays(leaf, made), made.sharding)


def _copy_at(leaf: Any, sharding: Any) -> jax.Array:  # Any, twice: an array of numpy or jax; a sharding of jax
    waited = jax.block_until_ready(leaf)  # as `copied_to` does
    return jax.device_put(jnp.copy(jax.device_put(waited, sharding)), sharding)


def _shape_at(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:  # Any, twice: as above
    return jax.ShapeDtypeStruct(leaf.shape, jnp.result_type(leaf), sharding=sharding)


def _is_elsewhere(leaf: Any, mesh: Mesh) -> bool:  # Any: an array, a shape or a number
    """Whether it is an array of the host, of another device or of another mesh."""
    match leaf:
        case jax.Array(sharding=NamedSharding(mesh=one)):
            return one != mesh
        case _:
            return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _check_no_tracers(name: str, tree: object, suggestion: str) -> None:
    """Refuse the tracers that the arguments of a transformed function are. Errors: ConfigError."""
    if has_tracers(tree):
        what = f"`step.{name}` was called in a `jit`, `vmap`, `grad` or `eval_shape`; it needs arrays, or shapes."
        raise ConfigError(what, suggestion=suggestion)


def _padded_update(schedule: Schedule, own: State, stored: State) -> PaddedUpdate | None:
    """How the optimizer runs on padded leaves; `own` has the shapes without padding."""
    update = schedule[-1]
    if not padded_places(stored.placement) or not isinstance(update, Optimize):
        return None
    node, (own, stored) = update.node, shapes_of((own, stored))
    return padded_update(node.optimizer, own.trained, own.opt_state, (stored.trained, stored.opt_state), node.written)


def _also_reads(
    old: State, new: State, metrics: Metrics, diagnostics: Diagnostics | TurnDiagnostics
) -> tuple[State, Metrics, Diagnostics | TurnDiagnostics]:
    """What a step returns, of a program that reads every leaf of the old state.

    jax drops an argument that nothing reads. A leaf that is only written, such as what a line search keeps of itself,
    would then reuse no buffer. `keep_unused` would transfer the leaves of a batch that the loss does not read.
    """
    loss = first_of(metrics["loss"], *jax.tree.leaves(old))
    return new, {**metrics, "loss": loss}, diagnostics


def _shardings_of_outputs(state: State, host: frozenset[str], mesh: Mesh) -> tuple[Any, NamedSharding]:
    """The shardings of the next state, those of this one, and of every metric; Any: a tree of shardings."""
    of_state = with_memory(shardings_of(state, state.placement, mesh), host)
    return of_state, NamedSharding(mesh, PartitionSpec())


def _shown(changes: list[str]) -> str:
    rest = len(changes) - MOST_CHANGES
    return ", ".join([*changes[:MOST_CHANGES], *([f"and {rest} more leaves"] if rest > 0 else [])])


class BudgetGate:
    """Checks a budget before the first call with each signature of a batch, and again after a retrace.

    The programs that it checks are those that the step runs: jax compiles none of them twice.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._passed: set[tuple[BatchSignature, tuple[bool, ...]]] = set()
        self._traces = 0

    def check(self, batch: Batch, compiled: Callable[[], Compiled], traces: Callable[[], int]) -> None:
        """Raise BudgetError before the step runs; the state is then alive."""
        # jax traces host arrays and device arrays apart.
        signature = batch_signature(batch), tuple(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        if signature in self._passed and traces() == self._traces:
            return
        compiled().check(self.budget, traces=traces())
        self._passed.add(signature)
        self._traces = traces()


def _signature(state: State, batch: Batch) -> BatchSignature:
    """The signature of everything that the loss is given: one for arrays, their shapes and their tracers."""
    return batch_signature(shapes_of((state.params, state.rng, state.model_state, batch)))
