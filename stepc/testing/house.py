"""The rules that every word keeps, ours and our users'. One call checks them all."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
import optax

from stepc.compiler.step import compile as compile_step
from stepc.core.evaluate import World, evaluate
from stepc.core.nodes import Node, Wrap, show
from stepc.errors import EquivalenceError
from stepc.language.kinds import Kind
from stepc.language.pipeline import Pipeline, Transform, expanded
from stepc.language.reference import reference
from stepc.language.state import State
from stepc.language.words.accumulate import accumulate
from stepc.language.words.grad import grad
from stepc.language.words.update import update
from stepc.testing.equivalence import assert_equal_trees, assert_equivalent
from stepc.testing.probes import PROBES, probe_batch, probe_params

_NUM_ROWS = 16


def check_transform(word: Transform, *, tolerance: float = 1e-5) -> None:
    """Hold a word to the rules of the house.

    Meaning: it is a frozen, hashable, printable value; its expansion means what the word means; compiled, alone and
      on both sides of `accumulate`, it equals its reference, for every probe loss.
    Why: a word of your own is then as safe to compose as ours.

    Args:
      word: any word that names no mesh axis and no size of a batch: of losses, of gradients, of steps, or an `update`.
      tolerance: as in `assert_equivalent`; 0 for a word that is exact on whole numbers.
    Errors: EquivalenceError that names the rule that is broken; what the word itself raises passes through.
    Example:
      >>> check_transform(clip(1.0))

    Source: ours.
    """
    _is_a_value(word)
    for name, probe in PROBES.items():
        for pipeline in _pipelines(word, probe):
            _expansion_means_the_same(pipeline, name, tolerance)
            step = compile_step(pipeline)
            assert_equivalent(step, step.init(probe_params()), probe_batch(_NUM_ROWS), tolerance=tolerance)


def _is_a_value(word: Transform) -> None:
    rules = {
        "is a subclass of stepc.Transform": lambda: isinstance(word, Transform),
        "is a frozen dataclass": lambda: is_dataclass(word) and type(word).__dataclass_params__.frozen,  # pyright: ignore[reportAttributeAccessIssue]
        "equals a copy of itself": lambda: replace(word) == word,
        "hashes as a copy of itself": lambda: hash(replace(word)) == hash(word),
        "prints as a call": lambda: repr(word).endswith(")") and "(" in repr(word),
        "gives a kind": lambda: isinstance(word.gives, Kind),
        "expands to core nodes, a word of losses to wraps": lambda: all(
            isinstance(node, Wrap if word.gives is Kind.LOSS else Node) for node in word.expand()
        ),
        "expands to the same nodes again": lambda: word.expand() == word.expand(),
        "expands to nodes that hash": lambda: isinstance(hash(word.expand()), int),
    }
    for rule, holds in rules.items():
        if not holds():
            raise EquivalenceError(f"A word of stepc {rule}; `{word!r}` does not.")


def _pipelines(word: Transform, probe: Any) -> list[Pipeline]:  # Any: a probe
    begin, end = grad(probe), update(optax.sgd(0.5))
    match word.takes, word.gives:
        case _, Kind.LOSS:
            inside = grad(word @ probe)
            return [end @ inside, end @ accumulate(4) @ inside]
        case Kind.STEP, Kind.STEP:
            return [word @ end @ begin, word @ end @ accumulate(2) @ begin]
        case _, Kind.STEP:
            return [word @ begin, word @ accumulate(2) @ begin]
        case _:
            return [
                end @ word @ begin,
                end @ word @ accumulate(4) @ begin,
                end @ accumulate(2) @ word @ accumulate(2) @ begin,
            ]


def _expansion_means_the_same(pipeline: Pipeline, probe: str, tolerance: float) -> None:
    meaning, batch = reference(pipeline), probe_batch(_NUM_ROWS)
    state = meaning.init(jax.tree.map(jax.numpy.asarray, probe_params()))
    after, metrics = meaning(state, batch)
    program = expanded(pipeline.words)
    got, told = evaluate(program, world_of(state), jax.tree.map(jax.numpy.asarray, batch))
    of = f"the meaning of `{pipeline!r}` and of its expansion `{show(program)}`, for the loss {probe!r}"
    assert_equal_trees((as_seen(got), told), (as_seen(world_of(after)), metrics), tolerance=tolerance, of=of)


def world_of(state: State) -> World:
    """A state as the core sees it."""
    return World(state.params, state.opt_state, state.step, state.rng, state.carry, state.slots)


def as_seen(world: World) -> dict[str, Any]:  # Any: trees of arrays
    """All of it that changes, as a tree."""
    return {one.name: getattr(world, one.name) for one in fields(world) if one.name != "rng"}
