"""`accumulate(memory=...)`: for each signature of a batch, the pipeline that states its number of microbatches."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax

from stepc._compiler.search import CandidatePrograms, SearchResult, find_smallest_fit, live_bytes
from stepc._compiler.stages import Lowered
from stepc._compiler.validation import BatchSignature, batch_signature, check_batch
from stepc._core.nodes import MeanNode, OverMesh, Program, RepeatNode, UnderVmap
from stepc._language.kinds import Batch
from stepc._language.pipeline import AutotuneRequest, Pipeline, Transform, transforms_of
from stepc._language.state import State
from stepc.errors import BudgetError, ConfigError
from stepc.inspect.memory import Memory, memory

_LOG = logging.getLogger("stepc")


@runtime_checkable
class LowerableStep(Protocol):
    """What is asked of a step."""

    def lower(self, state: State, batch: Batch) -> Lowered:
        """As `Step.lower`."""
        ...


Steps = TypeVar("Steps", bound=LowerableStep)


@dataclass(frozen=True)
class TunedStep(Generic[Steps]):
    """The step of the answered pipeline, and how the answer was found."""

    step: Steps
    search: SearchResult


def autotune_request(pipeline: Transform | Pipeline) -> tuple[int, AutotuneRequest] | None:
    """The place of the transform that asks, and what it asks; None if all is said.

    Errors: ConfigError if two transforms ask, or if one asks for parts of a single row.
    """
    transforms = transforms_of(pipeline)
    asking = [
        (place, question)
        for place, transform in enumerate(transforms)
        if (question := transform.autotune_request()) is not None
    ]
    if len(asking) > 1:
        named = " and ".join(f"`{transforms[place]!r}`" for place, _ in asking)
        raise ConfigError(
            f"{named} both leave a number to the compiler, which can find one.",
            suggestion="Write the number in all but one of them, such as `accumulate(4)`.",
        )
    if not asking:
        return None
    place, question = asking[0]
    for transform in transforms[:place]:
        if any(isinstance(node, MeanNode) and isinstance(node.place, UnderVmap) for node in transform.expand()):
            raise ConfigError(
                f"`{transforms[place]!r}` stands on the right of `{transform!r}`: one row has no parts.",
                suggestion=f"Write `{transforms[place]!r}` on the left of `{transform!r}`.",
            )
    return place, question


def replace_request(pipeline: Transform | Pipeline, place: int, transform: Transform) -> Pipeline:
    """The pipeline with another transform in one place."""
    transforms = transforms_of(pipeline)
    return Pipeline((*transforms[:place], transform, *transforms[place + 1 :]))


class Autotuner(Generic[Steps]):
    """The answers to one question. Each is found when a form of batch is first met, and kept.

    Args:
      pipeline: what asks.
      place: which transform of it.
      question: what it asks.
      core: the core program for one part, bound to the mesh.
      made: makes the step of an answered pipeline.
    """

    def __init__(
        self,
        pipeline: Transform | Pipeline,
        place: int,
        question: AutotuneRequest,
        core: Program,
        made: Callable[[Pipeline], Steps],
    ) -> None:
        self._pipeline, self._place, self._question = pipeline, place, question
        self._core, self._made = core, made
        self.answers: dict[BatchSignature, TunedStep[Steps]] = {}

    def answer(self, state: State, batch: Batch) -> TunedStep[Steps]:
        """The answer for a form of batch. It is found with this state, and kept for any other.

        Errors: BatchError for a batch that does not divide; BudgetError if nothing fits.
        """
        try:
            form = batch_signature(batch)
        except AttributeError:  # a leaf that is no array
            check_batch(batch, self._core)
            raise
        if form not in self.answers:
            check_batch(batch, self._core)
            self.answers[form] = self._found(state, batch)
        return self.answers[form]

    def _found(self, state: State, batch: Batch) -> TunedStep[Steps]:
        steps: dict[int, Steps] = {}
        lowered: dict[int, Lowered] = {}

        def lower(parts: int) -> Lowered:
            if parts not in lowered:
                transform = self._question.resolved(parts)
                steps[parts] = self._made(replace_request(self._pipeline, self._place, transform))
                lowered[parts] = steps[parts].lower(state, batch)
            return lowered[parts]

        programs = CandidatePrograms(
            counts=_divisors(_rows_of_a_cell(batch, self._core)),
            arguments=_bytes_of_state(state) + _bytes_of_batch(batch, self._core),
            live=lambda parts: live_bytes(lower(parts).jaxpr()),
            compiled=lambda parts: _planned(lower(parts)),
        )
        tried, chosen = find_smallest_fit(programs, self._question.most_bytes)
        asked = transforms_of(self._pipeline)[self._place]
        answer = "" if chosen is None else repr(self._question.resolved(chosen))
        found = SearchResult(repr(asked), answer, self._question.most_bytes, tuple(programs.counts), tried, chosen)
        if chosen is None:
            raise _nothing_fits(found)
        # A compilation that nobody asked for is never silent; the first is asked for.
        _LOG.log(logging.WARNING if self.answers else logging.INFO, "%s", found)
        return TunedStep(steps[chosen], found)


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
    axis = sum(isinstance(node, RepeatNode) for node in program)
    means = (node for node in program if isinstance(node, MeanNode) and not isinstance(node.place, UnderVmap))
    return jax.tree.leaves(batch)[0].shape[axis] // prod(node.size for node in means)


def _bytes_of_state(state: State) -> int:
    """On one device, as far as the leaves say where they lie."""

    def shape(leaf: Any) -> tuple[int, ...]:  # Any: an array, or its shape
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _bytes_of_batch(batch: Batch, program: Program) -> int:
    """On one device."""
    devices = prod(node.size for node in program if isinstance(node, MeanNode) and isinstance(node.place, OverMesh))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) // devices


def _nothing_fits(found: SearchResult) -> BudgetError:
    needs = [one.compiled for one in found.tried if one.compiled is not None]
    remedy = f"`memory={min(needs)}` is enough. " if needs else ""
    return BudgetError(
        f"`{found.question}`: no k that divides the {found.counts[-1]} rows of a device fits.",
        where="\n".join(found.table()),
        broken=("memory",),
        suggestion=f"{remedy}Less is needed with fewer rows, with more devices, or with `remat` inside of `grad`.",
    )
