"""The reference: the meaning of a pipeline, run as it is written. Plain loops, no jit, no scan, no mesh.

It is slow and obvious on purpose: whatever the compiler makes must equal it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from stepc._language.kinds import Batch, Kind, Metrics, Params
from stepc._language.pipeline import Pipeline, Transform, transforms_of
from stepc._language.semantics import Fn
from stepc._language.state import KEYS, State
from stepc.errors import ConfigError, ShardingError, did_you_mean


@dataclass(frozen=True)
class Reference:
    """A pipeline as a pair of plain functions; it may stand wherever a compiled step stands."""

    pipeline: Transform | Pipeline
    meaning: Fn

    def init(self, params: Params, *, seed: int = 0, model_state: Any = None) -> State:
        """A fresh state."""
        key = jax.random.key(seed, impl=KEYS) if isinstance(seed, int) else seed
        return self.meaning.init(State(params, None, jnp.zeros((), jnp.int32), key, model_state))

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One step, eagerly. Nothing is donated."""
        made = self.meaning.apply(state, jax.tree.map(jnp.asarray, batch))
        return made.state, made.metrics


def reference(pipeline: Transform | Pipeline, *, axes: Mapping[str, int] | None = None) -> Reference:
    """What a pipeline means, as a pair of plain functions.

    Meaning: the fold of the meanings of its transforms, from the right.
    Why: the compiled program must equal something that one can read.

    Args:
      pipeline: a complete pipeline that gives a step.
      axes: the size of each mesh axis that the pipeline names; a size is all a meaning knows of a mesh.
    Errors: ConfigError if the pipeline is not complete; ShardingError if it names an axis that `axes` does not.
    Example:
      >>> reference(update(optax.sgd(0.1)) @ shard(dp("data")) @ grad(loss), axes={"data": 8})  # doctest: +SKIP

    Source: ours.
    """
    transforms = complete_transforms(pipeline)
    sizes = _Sizes(axes or {})
    meaning = Fn(lambda state: state, _nothing_on_the_right, sizes)
    for transform in reversed(transforms):
        meaning = transform.reference(meaning)
    return Reference(pipeline, meaning)


def complete_transforms(pipeline: object) -> tuple[Transform, ...]:
    """The transforms of a complete pipeline that gives a step; ConfigError for anything else."""
    transforms = transforms_of(pipeline)
    if not transforms:
        facts = (
            ("expected", "a pipeline, such as update(tx) @ grad(loss)"),
            ("got", type(pipeline).__name__),
        )
        raise ConfigError("This is not a pipeline.", facts=facts)
    if transforms[-1].takes is not None:
        what = f"`{pipeline!r}` is a recipe: its last transform takes {transforms[-1].takes}, and nothing gives it one."
        raise ConfigError(
            what,
            suggestion=f"Write `{pipeline!r} @ grad(loss)`." if transforms[-1].takes is Kind.GRADIENT else None,
        )
    _check_places(transforms)
    if transforms[0].gives is not Kind.STEP:
        what = f"`{pipeline!r}` gives {transforms[0].gives}, not a step: nothing in it updates the parameters."
        raise ConfigError(what, suggestion=f"Write `update(optimizer) @ {pipeline!r}`.")
    return transforms


def _check_places(transforms: tuple[Transform, ...]) -> None:
    """Refuse what the kinds allow and the meaning does not: a transform that may stand only outermost, or only once."""
    for place, transform in enumerate(transforms):
        if transform.stands == "outermost" and place:
            rest = " @ ".join(map(repr, (transform, *transforms[:place], *transforms[place + 1 :])))
            raise ConfigError(
                f"`{transform!r}` stands outermost: it repeats all that a step does.", suggestion=f"Write `{rest}`."
            )
        if transform.stands == "once" and sum(type(one) is type(transform) for one in transforms) > 1:
            raise ConfigError(
                f"`{transform!r}`: a transform of its kind stands twice in `{' @ '.join(map(repr, transforms))}`."
            )


class _Sizes(dict[str, int]):
    """Axis sizes that refuse an unknown axis in words."""

    def __missing__(self, axis: str) -> NoReturn:
        facts = (("axes", ", ".join(f"{name}={size}" for name, size in self.items()) or "none"),)
        raise ShardingError(
            f"No size is given for the axis {axis!r}.", facts=facts, suggestion=did_you_mean(axis, self)
        )


def _nothing_on_the_right(state: State, rows: object) -> NoReturn:
    raise ValueError("a complete pipeline ends in a transform that takes nothing")
