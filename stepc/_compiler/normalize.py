"""A pipeline and a mesh become a normal form, with a trace of the laws that led to it. It knows no law by name."""

from dataclasses import dataclass, replace
from itertools import takewhile
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepc._compiler.layers import TracedFunction
from stepc._compiler.loss import WholeBatch, trace_loss_structure
from stepc._compiler.matrices import matrices_read
from stepc._compiler.schedule import LossStructure, Schedule, batch_axes, make_schedule
from stepc._compiler.sharding import BoundRules, bind_rules, check_turns_agree
from stepc._compiler.validation import bind
from stepc._core.laws import LAWS, Law
from stepc._core.nodes import (
    AlternateNode,
    DifferentiateNode,
    FollowNode,
    GuardNode,
    InScan,
    MapNode,
    MeanNode,
    PerturbNode,
    Program,
    RepeatNode,
    RescaleNode,
    Rules,
    Turn,
    UnderVmap,
    UpdateNode,
    named,
    num_minibatches,
    rows_axis,
    slot_name,
    trained_patterns,
    turns_of,
)
from stepc._language.kinds import Batch, Params
from stepc._language.optimizers import initial_state
from stepc._language.pipeline import Transform, expand_transforms
from stepc._language.state import SkipCounts, State, state_of_turn, trained_leaves, values_read


@dataclass(frozen=True)
class AppliedLaw:
    """One application of a law: the program before and after it."""

    law: Law
    before: Program
    after: Program


@dataclass(frozen=True)
class NormalForm:
    """Everything that is decided before any array is seen.

    Args:
      core: the program before any law, bound to the mesh.
      laws: the laws that were applied, in order.
      batch_axes: the mesh axes that rows are split over by hand, the outermost first.
      rules: the sharding rules of the pipeline, bound to the mesh.
      sites: the transforms as written, each with the user's line that made it.
    """

    core: Program
    laws: tuple[AppliedLaw, ...]
    batch_axes: tuple[str, ...]
    rules: BoundRules
    sites: tuple[tuple[str, str], ...]

    @property
    def program(self) -> Program:
        """The program after all laws."""
        return self.laws[-1].after if self.laws else self.core

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The turns of a step before any law, the step itself as the only one if it has none."""
        return turns_of(self.core)

    @property
    def wrt(self) -> tuple[str, ...]:
        """Path patterns of the parameters that are trained."""
        return trained_patterns(self.core)

    @property
    def model_state_rules(self) -> Rules:
        """The rules by which the model state is placed: every turn that takes it has the same rows."""
        return next((rules for turn in self.turns if (rules := turn.loss.model_state) is not None), ())

    @property
    def skip_limit(self) -> int | None:
        """How many steps in a row may be skipped; None without `skip_nonfinite`."""
        return next((node.limit for node in self.core if isinstance(node, GuardNode)), None)

    @property
    def steps_per_call(self) -> int:
        """How many steps one dispatch makes."""
        return next((node.size for node in self.core if isinstance(node, RepeatNode)), 1)

    @property
    def rows_axis(self) -> int:
        """The axis of the leaves of a batch that counts rows."""
        return rows_axis(self.core)

    def shapes_of_one_step(self, batch: Batch) -> Batch:
        """The shapes of what one of the steps takes of a batch."""

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
            rows, *rest = leaf.shape[self.rows_axis :]
            return jax.ShapeDtypeStruct((rows // num_minibatches(self.core), *rest), leaf.dtype)

        return jax.tree.map(shape, batch)

    def optimizer_state(self, params: Params, wrt: tuple[str, ...]) -> Any:  # Any: a tree of the optimizers
        """A fresh state of the optimizer, of those of all turns by name; `wrt` is what a step without turns trains."""

        def fresh(program: Program, wrt: tuple[str, ...]) -> Any:  # Any: as above
            update = next(node for node in program if isinstance(node, UpdateNode))
            return initial_state(update.optimizer, trained_leaves(params, wrt), update.written)

        made = {turn.name: fresh(turn.program, turn.loss.wrt if turn.name else wrt) for turn in self.turns}
        return made.get("", made)

    def matrices(self, params: Params, opt_state: Any) -> tuple[str, ...]:  # Any: as above
        """The paths of the parameters that the optimizer of some turn multiplies as whole matrices."""
        found: dict[str, None] = {}
        for turn in self.turns:
            update = next(node for node in turn.program if isinstance(node, UpdateNode))
            own = opt_state[turn.name] if turn.name else opt_state
            trained = trained_leaves(params, turn.loss.wrt)
            found |= dict.fromkeys(matrices_read(update.optimizer, trained, own, update.written))
        return tuple(found)

    def slots(self, params: Params, wrt: tuple[str, ...]) -> dict[str, Any]:  # Any: by transform
        """The slots of a fresh state: those of the whole step, and those of turns after the names of their turns."""
        slots = self._slots_of(self.core, trained_leaves(params, wrt))
        for turn in self.turns if self.turns[0].name else ():
            own = self._slots_of(turn.program, trained_leaves(params, turn.loss.wrt))
            slots |= {slot_name(turn.name, name): slot for name, slot in own.items()}
        return slots

    def _slots_of(self, program: Program, trained: Params) -> dict[str, Any]:  # Any: by transform
        slots: dict[str, Any] = {}
        for name, node in named(program).items():
            match node:
                case RescaleNode():
                    slots[name] = node.initial(*node.arguments)
                case FollowNode():
                    slots[name] = node.initial(trained)
                case GuardNode():
                    slots[name] = SkipCounts(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
                case MapNode():
                    pass  # it draws, and keeps nothing
        return slots

    def schedule(
        self, state: State, batch: Batch
    ) -> tuple[Schedule, tuple[LossStructure, ...], tuple[TracedFunction | None, ...]]:
        """The schedule for such a state and batch, and what the loss of each turn returns and does: it is traced."""
        pairs = zip(self.turns, turns_of(self.program), strict=True)
        traced = [self._trace_loss(state, batch, turn, normal.program) for turn, normal in pairs]
        structures, losses = (tuple(each) for each in zip(*traced, strict=True))
        return make_schedule(self.program, structures, self.rules), structures, losses

    def _trace_loss(
        self, state: State, batch: Batch, turn: Turn, program: Program
    ) -> tuple[LossStructure, TracedFunction | None]:
        state = state_of_turn(state, turn, state.rng) if turn.name else state
        loss, means = turn.loss, [node for node in program if isinstance(node, MeanNode)]
        num_microbatches = prod(node.size for node in means if not isinstance(node.place, UnderVmap))
        is_single_row = any(isinstance(node.place, UnderVmap) for node in means)

        def microbatch(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
            num_rows, *rest = leaf.shape
            return jax.ShapeDtypeStruct((1 if is_single_row else num_rows // num_microbatches, *rest), leaf.dtype)

        given = (state.params, state.rng, state.model_state, values_read(state, loss.reads))
        params, key, model_state, reads = jax.tree.map(shape_of, given)
        of_one_step = self.shapes_of_one_step(batch)
        rows = jax.tree.map(microbatch, of_one_step)
        total = next(leaf.shape[0] for leaf in jax.tree.leaves(of_one_step))
        side_by_side = [
            one.written for one in turn.program if isinstance(one, MeanNode) and not isinstance(one.place, InScan)
        ]
        # A head is given the rows of all calls up to the first node that is not linear.
        stretch = takewhile(lambda one: not isinstance(one, MapNode | PerturbNode | UpdateNode), reversed(program))
        calls = prod(one.size for one in stretch if isinstance(one, MeanNode) and not isinstance(one.place, UnderVmap))
        whole = WholeBatch(total, side_by_side[0] if side_by_side else None, calls)
        return trace_loss_structure(
            loss, params, rows, key, model_state, reads, self.batch_axes, whole, is_split=bool(means)
        )


def normalize(transforms: tuple[Transform, ...], mesh: Mesh | None, laws: tuple[Law, ...] = LAWS) -> NormalForm:
    """Expand the transforms of a complete pipeline, bind the program to the mesh, and apply the laws."""
    program, sizes = expand_transforms(transforms), dict(mesh.shape) if mesh else {}
    core = bind(program, sizes)
    applied = apply_laws(core, laws)
    normal = applied[-1].after if applied else core
    rules = tuple(
        bind_rules(turn.program, sizes, batch_axes(after.program))
        for turn, after in zip(turns_of(program), turns_of(normal), strict=True)
    )
    check_turns_agree(turns_of(program), rules)
    every = (*transforms, *(inner for transform in transforms for inner in transform.nested()))
    sites = tuple((repr(transform), str(transform.site)) for transform in every)
    return NormalForm(core, applied, batch_axes(normal), rules[0], sites)


def apply_laws(program: Program, laws: tuple[Law, ...]) -> tuple[AppliedLaw, ...]:
    """Apply laws until none applies; the last `after` is the normal form.

    Every law either removes a node or moves a reduction or a constant outwards, so `n` nodes need at most `n²`
    applications; a table that needs more contradicts itself, which is a bug in the table.
    """
    match program:
        case (*outer, AlternateNode() as node):
            return _applied_in_turns(tuple(outer), node, laws)
        case _:
            pass
    has_model_state = any(isinstance(node, DifferentiateNode) and node.model_state is not None for node in program)
    laws = tuple(law for law in laws if law.keeps_order or not has_model_state)
    applied: list[AppliedLaw] = []
    while found := _first_that_applies(program, laws):
        if len(applied) > len(program) ** 2 + 64:
            raise RuntimeError(f"the laws do not come to an end: {[one.law.name for one in applied[-8:]]}")
        applied.append(found)
        program = found.after
    return tuple(applied)


def _applied_in_turns(outer: Program, node: AlternateNode, laws: tuple[Law, ...]) -> tuple[AppliedLaw, ...]:
    """The laws that apply within one turn after another: none looks at two of them."""
    applied: list[AppliedLaw] = []
    for place, turn in enumerate(node.turns):
        for one in apply_laws(turn.program, laws):
            before = (*outer, node)
            turns = (*node.turns[:place], replace(turn, program=one.after), *node.turns[place + 1 :])
            node = replace(node, turns=turns)
            applied.append(AppliedLaw(one.law, before, (*outer, node)))
    return tuple(applied)


def _first_that_applies(program: Program, laws: tuple[Law, ...]) -> AppliedLaw | None:
    for law in laws:
        for start in range(len(program) - law.width + 1):
            stop = start + law.width
            replacement = law.rewrite(*program[start:stop])
            if replacement is not None:
                return AppliedLaw(law, program, (*program[:start], *replacement, *program[stop:]))
    return None


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, a number, or a shape
    """The shape and dtype of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
