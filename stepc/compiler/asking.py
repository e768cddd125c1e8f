"""A pipeline that leaves a number to the compiler: the answer for each form of batch, a pipeline that says it.

Meaning, laws, plan and lowering see the answer alone. It must not know which word asked.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax

from stepc.compiler.check import check_batch
from stepc.compiler.forms import Form, form_of
from stepc.compiler.liveness import live_bytes
from stepc.compiler.search import Programs, Search, search
from stepc.compiler.stages import Lowered
from stepc.core.nodes import Lanes, Mean, Program, Repeat, Space
from stepc.errors import BudgetError, ConfigError
from stepc.inspect.memory import Memory, memory
from stepc.language.kinds import Batch
from stepc.language.pipeline import Pipeline, Question, Transform, words_of
from stepc.language.state import State

_LOG = logging.getLogger("stepc")


@runtime_checkable
class Lowers(Protocol):
    """What is asked of a step."""

    def lower(self, state: State, batch: Batch) -> Lowered:
        """As `Step.lower`."""
        ...


Steps = TypeVar("Steps", bound=Lowers)


@dataclass(frozen=True)
class Answer(Generic[Steps]):
    """The step of the answered pipeline, and how the answer was found."""

    step: Steps
    search: Search


def question_of(pipeline: Transform | Pipeline) -> tuple[int, Question] | None:
    """The place of the word that asks, and what it asks; None if all is said.

    Errors: ConfigError if two words ask, or if one asks for parts of a single row.
    """
    words = words_of(pipeline)
    asking = [(place, question) for place, word in enumerate(words) if (question := word.asks()) is not None]
    if len(asking) > 1:
        named = " and ".join(f"`{words[place]!r}`" for place, _ in asking)
        raise ConfigError(
            f"{named} both leave a number to the compiler, which can find one.",
            suggestion="Write the number in all but one of them, such as `accumulate(4)`.",
        )
    if not asking:
        return None
    place, question = asking[0]
    for word in words[:place]:
        if any(isinstance(node, Mean) and isinstance(node.place, Lanes) for node in word.expand()):
            raise ConfigError(
                f"`{words[place]!r}` stands on the right of `{word!r}`: one row has no parts.",
                suggestion=f"Write `{words[place]!r}` on the left of `{word!r}`.",
            )
    return place, question


def answered(pipeline: Transform | Pipeline, place: int, word: Transform) -> Pipeline:
    """The pipeline with another word in one place."""
    words = words_of(pipeline)
    return Pipeline((*words[:place], word, *words[place + 1 :]))


class Asking(Generic[Steps]):
    """The answers to one question. Each is found when a form of batch is first met, and kept.

    Args:
      pipeline: what asks.
      place: which word of it.
      question: what it asks.
      core: the core program for one part, bound to the mesh.
      made: makes the step of an answered pipeline.
    """

    def __init__(
        self,
        pipeline: Transform | Pipeline,
        place: int,
        question: Question,
        core: Program,
        made: Callable[[Pipeline], Steps],
    ) -> None:
        self._pipeline, self._place, self._question = pipeline, place, question
        self._core, self._made = core, made
        self.answers: dict[Form, Answer[Steps]] = {}

    def answer(self, state: State, batch: Batch) -> Answer[Steps]:
        """The answer for a form of batch. It is found with this state, and kept for any other.

        Errors: BatchError for a batch that does not divide; BudgetError if nothing fits.
        """
        try:
            form = form_of(batch)
        except AttributeError:  # a leaf that is no array
            check_batch(batch, self._core)
            raise
        if form not in self.answers:
            check_batch(batch, self._core)
            self.answers[form] = self._found(state, batch)
        return self.answers[form]

    def _found(self, state: State, batch: Batch) -> Answer[Steps]:
        steps: dict[int, Steps] = {}
        lowered: dict[int, Lowered] = {}

        def lower(parts: int) -> Lowered:
            if parts not in lowered:
                word = self._question.answered(parts)
                steps[parts] = self._made(answered(self._pipeline, self._place, word))
                lowered[parts] = steps[parts].lower(state, batch)
            return lowered[parts]

        programs = Programs(
            counts=_divisors(_rows_of_a_cell(batch, self._core)),
            arguments=_bytes_of_state(state) + _bytes_of_batch(batch, self._core),
            live=lambda parts: live_bytes(lower(parts).jaxpr()),
            compiled=lambda parts: _planned(lower(parts)),
        )
        tried, chosen = search(programs, self._question.most_bytes)
        asked = words_of(self._pipeline)[self._place]
        answer = "" if chosen is None else repr(self._question.answered(chosen))
        found = Search(repr(asked), answer, self._question.most_bytes, tuple(programs.counts), tried, chosen)
        if chosen is None:
            raise _nothing_fits(found)
        # A compilation that nobody asked for is never silent; the first is asked for.
        _LOG.log(logging.WARNING if self.answers else logging.INFO, "%s", found)
        return Answer(steps[chosen], found)


def _planned(lowered: Lowered) -> Memory | None:
    """What the compiler planned; None if it says that the device has no room for it."""
    try:
        return memory(lowered.compile().executable)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(one for one in range(1, number + 1) if number % one == 0)


def _rows_of_a_cell(batch: Batch, program: Program) -> int:
    axis = sum(isinstance(node, Repeat) for node in program)
    means = (node for node in program if isinstance(node, Mean) and not isinstance(node.place, Lanes))
    return jax.tree.leaves(batch)[0].shape[axis] // prod(node.size for node in means)


def _bytes_of_state(state: State) -> int:
    """On one device, as far as the leaves say where they lie."""

    def shape(leaf: Any) -> tuple[int, ...]:  # Any: an array, or its shape
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _bytes_of_batch(batch: Batch, program: Program) -> int:
    """On one device."""
    devices = prod(node.size for node in program if isinstance(node, Mean) and isinstance(node.place, Space))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) // devices


def _nothing_fits(found: Search) -> BudgetError:
    needs = [one.compiled for one in found.tried if one.compiled is not None]
    remedy = f"`memory={min(needs)}` is enough. " if needs else ""
    return BudgetError(
        f"`{found.question}`: no k that divides the {found.counts[-1]} rows of a device fits.",
        where="\n".join(found.table()),
        broken=("memory",),
        suggestion=f"{remedy}Less is needed with fewer rows, with more devices, or with `remat` inside of `grad`.",
    )
