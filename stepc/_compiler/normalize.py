"""Laws to a fixed point, with a trace of every rewriting. It knows no particular law."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepc._compiler.loss import trace_loss_signature
from stepc._compiler.schedule import LossSignature, Schedule, batch_axes, schedule, shard_schedule
from stepc._compiler.sharding import BoundRules, bind_rules
from stepc._compiler.validation import bind
from stepc._core.laws import LAWS, Law
from stepc._core.nodes import (
    DifferentiateNode,
    FollowNode,
    GuardNode,
    MapNode,
    MeanNode,
    Program,
    RepeatNode,
    RescaleNode,
    UnderVmap,
    UpdateNode,
    named,
)
from stepc._language.kinds import Batch, Params
from stepc._language.pipeline import Pipeline, Transform, expand_transforms
from stepc._language.reference import complete_transforms
from stepc._language.state import SkipCounts, State


@dataclass(frozen=True)
class AppliedLaw:
    """One law at work: the program before and after it."""

    law: Law
    before: Program
    after: Program


def apply_laws(program: Program, laws: tuple[Law, ...]) -> tuple[AppliedLaw, ...]:
    """Apply laws until none applies; the last `after` is the normal form.

    Every law either removes a node or moves a reduction or a constant outwards, so `n` nodes need at most
    `n²` rewritings; a table that needs more contradicts itself, and that is a bug of ours.
    """
    has_model_state = any(isinstance(node, DifferentiateNode) and node.model_state for node in program)
    laws = tuple(law for law in laws if law.keeps_order or not has_model_state)
    trace: list[AppliedLaw] = []
    while found := _first(program, laws):
        if len(trace) > len(program) ** 2 + 64:
            raise RuntimeError(f"the laws do not come to an end: {[one.law.name for one in trace[-8:]]}")
        trace.append(found)
        program = found.after
    return tuple(trace)


def _first(program: Program, laws: tuple[Law, ...]) -> AppliedLaw | None:
    for law in laws:
        for start in range(len(program) - law.width + 1):
            stop = start + law.width
            replacement = law.rewrite(*program[start:stop])
            if replacement is not None:
                return AppliedLaw(law, program, (*program[:start], *replacement, *program[stop:]))
    return None


@dataclass(frozen=True)
class NormalForm:
    """What is decided before any array is seen: the core, the laws that were applied, where rows lie.

    Args:
      rows: the axes that a mean is taken over, the outermost first.
      laid: where everything lies that `shard` speaks about.
    """

    core: Program
    laws: tuple[AppliedLaw, ...]
    rows: tuple[str, ...]
    laid: BoundRules

    @property
    def normal(self) -> Program:
        """The core after all laws."""
        return self.laws[-1].after if self.laws else self.core

    @property
    def optimizer(self) -> Any:  # Any: an optax GradientTransformation
        return next(node for node in self.core if isinstance(node, UpdateNode)).optimizer

    @property
    def loss(self) -> DifferentiateNode:
        """The node of the loss."""
        return next(node for node in self.core if isinstance(node, DifferentiateNode))

    @property
    def skip_limit(self) -> int | None:
        """How many skips in a row are taken; None where nothing is skipped."""
        return next((node.limit for node in self.core if isinstance(node, GuardNode)), None)

    @property
    def repeats(self) -> int:
        """How many steps one dispatch makes."""
        return next((node.size for node in self.core if isinstance(node, RepeatNode)), 1)

    def slots(self, params: Params) -> dict[str, Any]:  # Any: by transform
        """What the transforms keep in a fresh state."""
        made: dict[str, Any] = {}
        for name, node in named(self.core).items():
            match node:
                case RescaleNode():
                    made[name] = node.initial(*node.arguments)
                case FollowNode():
                    made[name] = node.initial(params)
                case GuardNode():
                    made[name] = SkipCounts(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
                case MapNode():
                    pass
        return made

    def scheduled(self, state: State, batch: Batch) -> tuple[Schedule, LossSignature]:
        """The order of work for such a batch, and what the loss returns."""
        signature = self.signed(state, batch)
        return shard_schedule(schedule(self.normal, signature), self.laid), signature

    def signed(self, state: State, batch: Batch) -> LossSignature:
        """What the loss returns for one cell of such a batch."""
        means = [node for node in self.normal if isinstance(node, MeanNode)]
        cells = prod(node.size for node in means if not isinstance(node.place, UnderVmap))
        single = any(isinstance(node.place, UnderVmap) for node in means)

        def cell(leaf: Any) -> jax.ShapeDtypeStruct:
            rows, *rest = leaf.shape[1:] if self.repeats > 1 else leaf.shape
            return jax.ShapeDtypeStruct((1 if single else rows // cells, *rest), leaf.dtype)

        shapes = jax.tree.map(shape_of, (state.params, state.rng, state.model_state))
        params, key, model_state = shapes
        return trace_loss_signature(self.loss, params, jax.tree.map(cell, batch), key, model_state, self.rows)


def normalize(pipeline: Transform | Pipeline, mesh: Mesh | None, laws: tuple[Law, ...] = LAWS) -> NormalForm:
    """Expand, bind to the mesh, rewrite."""
    program, sizes = expand_transforms(complete_transforms(pipeline)), dict(mesh.shape) if mesh else {}
    core = bind(program, sizes)
    trace = apply_laws(core, laws)
    rows = batch_axes(trace[-1].after if trace else core)
    return NormalForm(core, trace, rows, bind_rules(program, sizes, rows))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, a number, or a shape
    """The shape and dtype of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
