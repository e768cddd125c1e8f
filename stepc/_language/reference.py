"""The reference semantics of a pipeline, run as written: plain Python loops, no jit, no scan, no mesh.

It is slow and obvious on purpose, because it is the specification: whatever the compiler makes must equal it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from stepc._language.kinds import Batch, Kind, Params
from stepc._language.names import unboxed
from stepc._language.pipeline import Pipeline, Transform, check_reads, transform_name, transforms_of
from stepc._language.semantics import Fn
from stepc._language.state import KEYS, State, as_arrays, carried_over, check_goes_on, unpadded_params
from stepc._language.transforms.alternate import Alternate
from stepc._language.transforms.grad import Grad
from stepc._language.transforms.skip_nonfinite import SkipNonfinite
from stepc.errors import ConfigError, FieldTypeError, ShardingError, caret, misspelt_axes


@dataclass(frozen=True)
class Reference:
    """A pipeline as a pair of plain functions, `init` and a call; it can replace a compiled step."""

    pipeline: Transform | Pipeline
    fn: Fn

    @property
    def skip_limit(self) -> int | None:
        """How many steps in a row `run` lets `skip_nonfinite` skip; None without it."""
        return skip_limit_of(self.pipeline)

    def init(
        self, params: Params, *, seed: Any = None, model_state: Any = None, like: State | None = None
    ) -> State:  # Any: a seed, as in `Step.init`; the model's own tree
        """A fresh state; with `like`, one that goes on from that state. Errors: as in `Step.init`."""
        params, model_state = unboxed(params), unboxed(model_state)
        if like is not None:
            check_goes_on(like, seed, model_state)
            params, like = unpadded_params(params, like), like.unpadded()
            model_state = like.model_state
        seed = 0 if seed is None else seed
        key = jax.random.key(seed, impl=KEYS) if isinstance(seed, int) else seed
        state = self.fn.init(State(params, None, jnp.zeros((), jnp.int32), key, model_state))
        return state if like is None else carried_over(state, like)

    def __call__(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        """One step, eagerly. Nothing is donated. Errors: FieldTypeError for what is no State."""
        if not isinstance(state, State):
            facts = (("expected", "the State that `init(params)` returned"), ("got", type(state).__name__))
            raise FieldTypeError("`state` is not a State.", facts=facts)
        result = self.fn.apply(state.unpadded(), jax.tree.map(jnp.asarray, as_arrays(batch)))
        return result.state, result.metrics


def reference(pipeline: Transform | Pipeline, *, axes: Mapping[str, int] | None = None) -> Reference:
    """The reference semantics of a pipeline, as a pair of plain functions.

    Meaning: the fold, from the right, of the `reference` methods of its transforms.
    Why: the compiled program must equal something that one can read.

    Args:
      pipeline: a complete pipeline that gives a step.
      axes: the size of each mesh axis that the pipeline names; the reference knows nothing else about a mesh.
    Errors: ConfigError if the pipeline is not complete; ShardingError if it names an axis that `axes` does not.
    Example:
      >>> reference(update(optax.sgd(0.1)) @ shard(dp("data")) @ grad(loss), axes={"data": 8})  # doctest: +SKIP

    Source: ours.
    """
    return Reference(pipeline, fold_references(complete_transforms(pipeline), axes or {}))


def skip_limit_of(pipeline: Transform | Pipeline) -> int | None:
    """The limit of the `skip_nonfinite` in a pipeline; None without it."""
    return next((one.limit for one in transforms_of(pipeline) if isinstance(one, SkipNonfinite)), None)


def fold_references(transforms: tuple[Transform, ...], axes: Mapping[str, int]) -> Fn:
    """The reference semantics of transforms that `complete_transforms` has accepted."""
    fn = Fn(lambda state: state, _nothing_on_the_right, _AxisSizes(axes))
    for transform in reversed(transforms):
        fn = transform.reference(fn)
    return fn


def with_losses(transforms: tuple[Transform, ...], wrap: Callable[[Any], Any]) -> Pipeline:  # Any: a user's function
    """The complete pipeline with `wrap` of every loss in it."""
    *outer, source = transforms
    match source:
        case Alternate(turns=turns):
            wrapped = ((name, with_losses(transforms_of(pipeline), wrap)) for name, pipeline in turns)
            source = replace(source, turns=tuple(wrapped))
        case Grad():
            source = source.with_loss(wrap)
        case _:  # a source of the user's own
            pass
    return Pipeline((*outer, source))


def _nothing_on_the_right(state: State, rows: object) -> NoReturn:
    raise ValueError("the rightmost transform of a complete pipeline takes nothing")


class _AxisSizes(dict[str, int]):
    """Axis sizes; an unknown axis is a ShardingError."""

    def __missing__(self, axis: str) -> NoReturn:
        facts = (("axes", ", ".join(f"{name}={size}" for name, size in self.items()) or "none"),)
        what = f"The pipeline shards over the axis {axis!r}, which `axes` does not name."
        raise ShardingError(what, facts=facts, suggestion=misspelt_axes([axis], self))


def complete_transforms(pipeline: object) -> tuple[Transform, ...]:
    """The transforms of a complete pipeline that gives a step.

    Errors: FieldTypeError for what is no pipeline; ConfigError for one that is not complete, or gives no step.
    """
    transforms = transforms_of(pipeline)
    if not transforms:
        facts = (("expected", "a pipeline, such as update(tx) @ grad(loss)"), ("got", type(pipeline).__name__))
        is_loss = callable(pipeline) and not isinstance(pipeline, type)
        suggestion = "Write `update(optimizer) @ grad(loss)`." if is_loss else None
        raise FieldTypeError("This is not a pipeline.", facts=facts, suggestion=suggestion)
    last = transforms[-1]
    if last.takes is not None:
        raise ConfigError(
            f"`{pipeline!r}` is a partial pipeline: `{last!r}` takes {last.takes}, and nothing on its right gives one.",
            suggestion=f"Write `{pipeline!r} @ grad(loss)`." if last.takes is Kind.GRADIENT else None,
        )
    _check_positions(transforms)
    check_reads(transforms)
    if transforms[0].gives is not Kind.STEP:
        what = f"`{pipeline!r}` gives {transforms[0].gives}, not a step: nothing in it updates the parameters."
        raise ConfigError(what, suggestion=f"Write `update(optimizer) @ {pipeline!r}`.")
    return transforms


def _check_positions(transforms: tuple[Transform, ...]) -> None:
    """Refuse what the kinds allow and `position` does not."""
    written = repr(Pipeline(transforms))
    for number, transform in enumerate(transforms):
        where = caret(written, repr(transform), str(transform.site))
        if transform.position == "outermost" and number:
            moved = Pipeline((transform, *transforms[:number], *transforms[number + 1 :]))
            what = f"`{transform!r}` must be the outermost transform: it repeats the whole step."
            others = [one for one in transforms if one.position == "outermost" and one is not transform]
            if others:
                what = f"`{others[0]!r}` and `{transform!r}` each repeat the whole step: a pipeline has one of them."
            raise ConfigError(what, where=where, suggestion=None if others else f"Write `{moved!r}`.")
        count = sum(type(one) is type(transform) for one in transforms)
        if transform.position == "once" and count > 1:
            name = transform_name(type(transform))
            what = f"`{name}` may appear only once in a pipeline, and it appears {count} times here."
            raise ConfigError(what, where=where)
