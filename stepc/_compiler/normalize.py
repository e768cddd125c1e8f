"""A pipeline and a mesh become a normal form, with a trace of the laws that led to it. It knows no law by name."""

from dataclasses import dataclass
from itertools import takewhile
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepc._compiler.loss import WholeBatch, trace_loss_structure
from stepc._compiler.schedule import LossStructure, Schedule, batch_axes, make_schedule
from stepc._compiler.sharding import BoundRules, bind_rules
from stepc._compiler.validation import bind
from stepc._core.laws import LAWS, Law
from stepc._core.nodes import (
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
    UnderVmap,
    UpdateNode,
    named,
    num_minibatches,
    rows_axis,
)
from stepc._language.kinds import Batch, Params
from stepc._language.pipeline import Transform, expand_transforms
from stepc._language.state import SkipCounts, State, values_read


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
    def update(self) -> UpdateNode:
        """The node of the optimizer."""
        return next(node for node in self.core if isinstance(node, UpdateNode))

    @property
    def loss(self) -> DifferentiateNode:
        """The node of the loss."""
        return next(node for node in self.core if isinstance(node, DifferentiateNode))

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

    def slots(self, trained: Params) -> dict[str, Any]:  # Any: by transform
        """The slots of a fresh state with these trained parameters."""
        slots: dict[str, Any] = {}
        for name, node in named(self.core).items():
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

    def schedule(self, state: State, batch: Batch) -> tuple[Schedule, LossStructure]:
        """The schedule for such a state and batch, and what the loss returns there: the loss is traced for it."""
        structure = self._loss_structure(state, batch)
        return make_schedule(self.program, structure, self.rules), structure

    def _loss_structure(self, state: State, batch: Batch) -> LossStructure:
        means = [node for node in self.program if isinstance(node, MeanNode)]
        num_microbatches = prod(node.size for node in means if not isinstance(node.place, UnderVmap))
        is_single_row = any(isinstance(node.place, UnderVmap) for node in means)

        def microbatch(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, or its shape
            num_rows, *rest = leaf.shape
            return jax.ShapeDtypeStruct((1 if is_single_row else num_rows // num_microbatches, *rest), leaf.dtype)

        given = (state.params, state.rng, state.model_state, values_read(state, self.loss.reads))
        params, key, model_state, reads = jax.tree.map(shape_of, given)
        of_one_step = self.shapes_of_one_step(batch)
        rows = jax.tree.map(microbatch, of_one_step)
        total = next(leaf.shape[0] for leaf in jax.tree.leaves(of_one_step))
        side_by_side = [
            one.written for one in self.core if isinstance(one, MeanNode) and not isinstance(one.place, InScan)
        ]
        # A head is given the rows of all calls up to the first node that is not linear.
        stretch = takewhile(lambda one: not isinstance(one, MapNode | PerturbNode | UpdateNode), reversed(self.program))
        calls = prod(one.size for one in stretch if isinstance(one, MeanNode) and not isinstance(one.place, UnderVmap))
        whole = WholeBatch(total, side_by_side[0] if side_by_side else None, calls)
        return trace_loss_structure(
            self.loss, params, rows, key, model_state, reads, self.batch_axes, whole, is_split=bool(means)
        )


def normalize(transforms: tuple[Transform, ...], mesh: Mesh | None, laws: tuple[Law, ...] = LAWS) -> NormalForm:
    """Expand the transforms of a complete pipeline, bind the program to the mesh, and apply the laws."""
    program, sizes = expand_transforms(transforms), dict(mesh.shape) if mesh else {}
    core = bind(program, sizes)
    applied = apply_laws(core, laws)
    axes = batch_axes(applied[-1].after if applied else core)
    sites = tuple(
        (repr(transform), str(transform.site))  # pyright: ignore[reportAttributeAccessIssue]
        for transform in transforms
    )
    return NormalForm(core, applied, axes, bind_rules(program, sizes, axes), sites)


def apply_laws(program: Program, laws: tuple[Law, ...]) -> tuple[AppliedLaw, ...]:
    """Apply laws until none applies; the last `after` is the normal form.

    Every law either removes a node or moves a reduction or a constant outwards, so `n` nodes need at most `n²`
    applications; a table that needs more contradicts itself, which is a bug in the table.
    """
    has_model_state = any(isinstance(node, DifferentiateNode) and node.model_state is not None for node in program)
    laws = tuple(law for law in laws if law.keeps_order or not has_model_state)
    applied: list[AppliedLaw] = []
    while found := _first_that_applies(program, laws):
        if len(applied) > len(program) ** 2 + 64:
            raise RuntimeError(f"the laws do not come to an end: {[one.law.name for one in applied[-8:]]}")
        applied.append(found)
        program = found.after
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
