"""`accumulate(memory="12GiB")` picks k for you: the smallest with which the step fits, for each batch signature."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import jax

from stepc._compiler.search import CandidatePrograms, SearchResult, find_smallest_fit, live_bytes
from stepc._compiler.stages import Lowered
from stepc._compiler.validation import BatchSignature, batch_signature, check_batch
from stepc._core.nodes import MeanNode, OverMesh, Program, UnderVmap, num_minibatches, rows_axis
from stepc._language.kinds import Batch
from stepc._language.pipeline import AutotuneRequest, Pipeline, Transform, transforms_of
from stepc._language.state import State
from stepc.errors import BudgetError, ConfigError
from stepc.inspect.memory import Memory, memory

_LOG = logging.getLogger("stepc")


@runtime_checkable
class LowerableStep(Protocol):
    """What the search needs of a step."""

    def lower(self, state: State, batch: Batch) -> Lowered:
        """As `Step.lower`."""
        ...


Steps = TypeVar("Steps", bound=LowerableStep)


@dataclass(frozen=True)
class TunedStep(Generic[Steps]):
    """The step of the pipeline with its k, and how k was found."""

    step: Steps
    search: SearchResult


def autotune_request(pipeline: Transform | Pipeline) -> tuple[int, AutotuneRequest] | None:
    """The position of the transform that leaves its number to the compiler, and its request; None if there is none.

    Errors: ConfigError if two transforms do, or if one would split a single row.
    """
    transforms = transforms_of(pipeline)
    requests = [
        (n, request) for n, transform in enumerate(transforms) if (request := transform.autotune_request()) is not None
    ]
    if not requests:
        return None
    if len(requests) > 1:
        named = " and ".join(f"`{transforms[position]!r}`" for position, _ in requests)
        raise ConfigError(
            f"{named} each leave a number to the compiler, which can tune only one.",
            suggestion="Write the number in all but one of them, such as `accumulate(4)`.",
        )
    position, request = requests[0]
    for transform in transforms[:position]:
        if any(isinstance(node, MeanNode) and isinstance(node.place, UnderVmap) for node in transform.expand()):
            raise ConfigError(
                f"`{transforms[position]!r}` stands to the right of `{transform!r}`, but a single row cannot be split.",
                suggestion=f"Write `{transforms[position]!r}` to the left of `{transform!r}`.",
            )
    return position, request


def replace_request(pipeline: Transform | Pipeline, position: int, transform: Transform) -> Pipeline:
    """The pipeline with another transform in this position."""
    transforms = transforms_of(pipeline)
    return Pipeline((*transforms[:position], transform, *transforms[position + 1 :]))


class Autotuner(Generic[Steps]):
    """Tunes a pipeline for each signature of a batch that it meets, once.

    Args:
      pipeline: the pipeline with the request.
      position: of the transform that makes it.
      request: what that transform leaves to the compiler.
      core: the core program for k = 1, bound to the mesh.
      make: makes the step of a tuned pipeline.
    """

    def __init__(
        self,
        pipeline: Transform | Pipeline,
        position: int,
        request: AutotuneRequest,
        core: Program,
        make: Callable[[Pipeline], Steps],
    ) -> None:
        self._pipeline, self._position, self._request = pipeline, position, request
        self._core, self._make = core, make
        self.tuned: dict[BatchSignature, TunedStep[Steps]] = {}

    def tune(self, state: State, batch: Batch) -> TunedStep[Steps]:
        """The tuned step for the signature of a batch. It is found with this state, and kept for any other.

        Errors: BatchError for a batch that does not divide; BudgetError if nothing fits.
        """
        try:
            signature = batch_signature(batch)
        except AttributeError:  # a leaf is not an array
            check_batch(batch, self._core)
            raise
        if signature not in self.tuned:
            check_batch(batch, self._core)
            self.tuned[signature] = self._search(state, batch)
        return self.tuned[signature]

    def _search(self, state: State, batch: Batch) -> TunedStep[Steps]:
        steps: dict[int, Steps] = {}
        lowered: dict[int, Lowered] = {}

        def lower(k: int) -> Lowered:
            if k not in lowered:
                steps[k] = self._make(replace_request(self._pipeline, self._position, self._request.resolved(k)))
                lowered[k] = steps[k].lower(state, batch)
            return lowered[k]

        devices = prod(
            node.size for node in self._core if isinstance(node, MeanNode) and isinstance(node.place, OverMesh)
        )
        batch_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch)) // devices
        programs = CandidatePrograms(
            counts=dividing_counts(self._core, batch),
            arguments=_local_bytes(state) + batch_bytes,
            live=lambda k: live_bytes(lower(k).jaxpr()),
            compiled=lambda k: planned_memory(lower(k)),
        )
        tried, chosen = find_smallest_fit(programs, self._request.most_bytes)
        request = repr(transforms_of(self._pipeline)[self._position])
        tuned = "" if chosen is None else repr(self._request.resolved(chosen))
        result = SearchResult(request, tuned, self._request.most_bytes, tuple(programs.counts), tried, chosen)
        if chosen is None:
            raise _nothing_fits(result)
        # The first search is expected; a later one recompiles in the middle of a run, which is never silent.
        _LOG.log(logging.WARNING if self.tuned else logging.INFO, "%s", result)
        return TunedStep(steps[chosen], result)


def dividing_counts(core: Program, batch: Batch) -> tuple[int, ...]:
    """Every k that divides the rows that one part of a program has, rising."""
    means = [node for node in core if isinstance(node, MeanNode) and not isinstance(node.place, UnderVmap)]
    num_rows = jax.tree.leaves(batch)[0].shape[rows_axis(core)] // num_minibatches(core)
    rows = num_rows // prod(node.size for node in means)
    return tuple(k for k in range(1, rows + 1) if rows % k == 0)


def planned_memory(lowered: Lowered) -> Memory | None:
    """What the compiler planned; None if it says that the device has no room for it."""
    try:
        return memory(lowered.compile().executable)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _local_bytes(state: State) -> int:
    """The bytes of a state on one device, as far as its leaves have shardings."""

    def shape(leaf: Any) -> tuple[int, ...]:  # Any: an array, or its shape
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _nothing_fits(result: SearchResult) -> BudgetError:
    needs = [one.compiled for one in result.tried if one.compiled is not None]
    remedy = f"`memory={min(needs)}` is enough. " if needs else ""
    return BudgetError(
        f"`{result.request}`: no k that divides the {result.counts[-1]} rows per device fits.",
        where="\n".join(result.table()),
        broken=("memory",),
        suggestion=f"{remedy}Fewer rows, more devices, or `remat` inside `grad` need less.",
    )
