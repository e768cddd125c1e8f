"""What is decided of a pipeline on a mesh before any array is seen."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepc.compiler.check import bind
from stepc.compiler.instructions import Schedule, Signature
from stepc.compiler.layout import Laid, laid_of
from stepc.compiler.loss import sign
from stepc.compiler.parts import divided
from stepc.compiler.rewrite import Rewriting, rewrite
from stepc.compiler.schedule import batch_axes, schedule
from stepc.core.laws import LAWS, Law
from stepc.core.nodes import Differentiate, Follow, Guard, Lanes, Map, Mean, Program, Repeat, Rescale, Update, named
from stepc.language.kinds import Batch, Params
from stepc.language.pipeline import Pipeline, Transform, expanded
from stepc.language.reference import complete_words
from stepc.language.state import Skips, State


@dataclass(frozen=True)
class Decision:
    """What is decided before any array is seen: the core, the laws that were applied, where rows lie.

    Args:
      rows: the axes that a mean is taken over, the outermost first.
      laid: where everything lies that `shard` speaks about.
    """

    core: Program
    laws: tuple[Rewriting, ...]
    rows: tuple[str, ...]
    laid: Laid

    @property
    def normal(self) -> Program:
        """The core after all laws."""
        return self.laws[-1].after if self.laws else self.core

    @property
    def optimizer(self) -> Any:  # Any: an optax GradientTransformation
        return next(node for node in self.core if isinstance(node, Update)).optimizer

    @property
    def loss(self) -> Differentiate:
        """The node of the loss."""
        return next(node for node in self.core if isinstance(node, Differentiate))

    @property
    def skip_limit(self) -> int | None:
        """How many skips in a row are taken; None where nothing is skipped."""
        return next((node.limit for node in self.core if isinstance(node, Guard)), None)

    @property
    def repeats(self) -> int:
        """How many steps one dispatch makes."""
        return next((node.size for node in self.core if isinstance(node, Repeat)), 1)

    def slots(self, params: Params) -> dict[str, Any]:  # Any: by word
        """What the words keep in a fresh state."""
        made: dict[str, Any] = {}
        for name, node in named(self.core).items():
            match node:
                case Rescale():
                    made[name] = node.initial(*node.arguments)
                case Follow():
                    made[name] = node.initial(params)
                case Guard():
                    made[name] = Skips(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
                case Map():
                    pass
        return made

    def scheduled(self, state: State, batch: Batch) -> tuple[Schedule, Signature]:
        """The order of work for such a batch, and what the loss returns."""
        signature = self.signed(state, batch)
        return divided(schedule(self.normal, signature), self.laid), signature

    def signed(self, state: State, batch: Batch) -> Signature:
        """What the loss returns for one cell of such a batch."""
        means = [node for node in self.normal if isinstance(node, Mean)]
        cells = prod(node.size for node in means if not isinstance(node.place, Lanes))
        single = any(isinstance(node.place, Lanes) for node in means)

        def cell(leaf: Any) -> jax.ShapeDtypeStruct:
            rows, *rest = leaf.shape[1:] if self.repeats > 1 else leaf.shape
            return jax.ShapeDtypeStruct((1 if single else rows // cells, *rest), leaf.dtype)

        shapes = jax.tree.map(shape_of, (state.params, state.rng, state.carry))
        params, key, carry = shapes
        return sign(self.loss, params, jax.tree.map(cell, batch), key, carry, self.rows)


def decide(pipeline: Transform | Pipeline, mesh: Mesh | None, laws: tuple[Law, ...] = LAWS) -> Decision:
    """Expand, bind to the mesh, rewrite."""
    program, sizes = expanded(complete_words(pipeline)), dict(mesh.shape) if mesh else {}
    core = bind(program, sizes)
    trace = rewrite(core, laws)
    rows = batch_axes(trace[-1].after if trace else core)
    return Decision(core, trace, rows, laid_of(program, sizes, rows))


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:  # Any: an array, a number, or a shape
    """The shape and dtype of a leaf."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
