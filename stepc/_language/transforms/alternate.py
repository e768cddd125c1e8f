"""`alternate`: several complete steps, one after another, on one state and one batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import AlternateNode, FollowNode, Turn, slot_name, trained_patterns
from stepc._language.fields import positive_integer
from stepc._language.kinds import Batch, Kind
from stepc._language.pipeline import Pipeline, Transform, expand_transforms, operand_name, transforms_of
from stepc._language.semantics import Fn, StepResult, draw_tag
from stepc._language.state import State, after_turn, blank_metric, state_of_turn
from stepc.errors import FieldTypeError, FieldValueError, did_you_mean


@dataclass(frozen=True, repr=False)
class Alternate(Transform):
    """Complete steps by name, and how often each is made."""

    takes: ClassVar = None
    gives: ClassVar = Kind.STEP
    turns: tuple[tuple[str, Transform | Pipeline], ...]
    every: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not self.turns:
            facts = (("expected", "complete steps by name, such as d=update(tx) @ grad(loss)"), ("got", "none"))
            raise FieldValueError("`alternate` has no turn.", facts=facts)
        for name, pipeline in self.turns:
            _check_turn(name, pipeline)
        names = [name for name, _ in self.turns]
        for name, often in self.every:
            if name not in names:
                facts = (("turns", ", ".join(names)),)
                what = f"`alternate`: `every` names {name!r}, which is no turn."
                raise FieldValueError(what, facts=facts, suggestion=did_you_mean(name, names))
            positive_integer("alternate", f"every[{name!r}]", often)

    def reference(self, inner: Fn) -> Fn:
        fns: dict[str, Fn] = {}
        for name, pipeline in self.turns:
            fns[name] = Fn(inner.init, inner.apply, inner.axes)
            for transform in reversed(transforms_of(pipeline)):
                fns[name] = transform.reference(fns[name])
        turns = self._node.turns

        def init(state: State) -> State:
            made = {turn.name: fns[turn.name].init(replace(state, wrt=turn.loss.wrt)) for turn in turns}
            slots = {slot_name(name, slot): value for name, one in made.items() for slot, value in one.slots.items()}
            opt_state = {name: one.opt_state for name, one in made.items()}
            return replace(state, opt_state=opt_state, slots=slots, wrt=trained_patterns((self._node,)))

        def apply(state: State, batch: Batch) -> StepResult:
            now, metrics, always, is_finite, loss = state, dict[str, Any](), dict[str, Any](), True, jnp.float32(0)
            for turn in turns:
                key = jax.random.fold_in(state.rng, draw_tag(turn.name))
                result: StepResult = fns[turn.name].apply(state_of_turn(now, turn, key), batch)
                is_made = (int(state.step) + 1) % turn.every == 0
                found = result.metrics if is_made else {name: blank_metric(x) for name, x in result.metrics.items()}
                metrics |= {f"{turn.name}/{name}": value for name, value in found.items()}
                if is_made:
                    now = after_turn(now, turn, result.state)
                    always |= {slot_name(turn.name, slot): value for slot, value in result.always.items()}
                    is_finite, loss = is_finite and result.is_finite, loss + result.metrics["loss"]
            after = replace(now, step=state.step + 1)
            return StepResult(after, {"loss": loss, **metrics}, is_finite, True, always)

        names = tuple(slot_name(name, one) for name, fn in fns.items() for one in fn.names)
        return Fn(init, apply, inner.axes, names)

    def expand(self) -> tuple[AlternateNode, ...]:
        return (self._node,)

    def nested(self) -> tuple[Transform, ...]:
        return tuple(transform for _, pipeline in self.turns for transform in transforms_of(pipeline))

    @property
    def _node(self) -> AlternateNode:
        often = dict(self.every)
        turns = (
            Turn(name, expand_transforms(transforms_of(pipeline)), often.get(name, 1)) for name, pipeline in self.turns
        )
        return AlternateNode(tuple(turns), written=repr(self))

    def _arguments(self) -> Iterator[str]:
        yield from (f"{name}={pipeline!r}" for name, pipeline in self.turns)
        if self.every:
            pairs = ", ".join(f'"{name}": {often}' for name, often in self.every)
            yield f"every={{{pairs}}}"


def _check_turn(name: str, pipeline: object) -> None:
    """Refuse what is no complete step of one optimizer. Errors: FieldTypeError."""
    transforms = transforms_of(pipeline)
    expected = ("expected", "a complete step, such as update(tx) @ grad(loss)")
    if not transforms:
        what = f"`alternate`: the turn {name!r} is not a pipeline."
        raise FieldTypeError(what, facts=(expected, ("got", operand_name(pipeline))))
    if transforms[0].gives is not Kind.STEP or transforms[-1].takes is not None:
        what = f"`alternate`: the turn {name!r} is not a complete step."
        raise FieldTypeError(what, facts=(expected, ("got", repr(pipeline))))
    if tuned := [one for one in transforms if one.autotune_request() is not None]:
        what = f"`alternate`: `{tuned[0]!r}` leaves its number to the compiler, which tunes one step, and no turn."
        raise FieldTypeError(what, suggestion=f"Write the number in the turn {name!r}, such as `accumulate(4)`.")
    if isinstance(transforms[-1], Alternate):
        raise FieldTypeError(f"`alternate`: the turn {name!r} has turns itself.", suggestion="Make them turns of one.")
    steps = [one for one in transforms if one.takes is Kind.STEP]
    if whole := [one for one in steps if not all(isinstance(node, FollowNode) for node in one.expand())]:
        outside = " @ ".join(map(repr, whole))
        what = f"`alternate`: `{outside}` acts on whole steps, and stands in the turn {name!r}."
        raise FieldTypeError(what, suggestion=f"Write `{outside} @ alternate(...)`.")


def alternate(*, every: Mapping[str, int] | None = None, **turns: Transform | Pipeline) -> Alternate:
    """Make several complete steps, one after another, on one state and one batch.

    Meaning: for each turn, in the order written, if the number of the step, from 1 on, is a multiple of its `every`:
      its own step on (params, opt_state[name], key(seed, name), batch); a later turn sees the parameters and the model
      state that an earlier one left. `step` counts once for all.
    Why: GANs, actor and critic, alternating minimisation: optimizers of their own for parts of the parameters, in one
      program and one dispatch.

    Args:
      every: for the name of a turn, in how many steps it is made once; a positive integer, 1 for those not named.
      turns: complete pipelines by name, each `update(...) @ ... @ grad(loss, wrt=...)`, with `ema` on its left or not.
    Shapes: the state keeps `opt_state[name]`, and `slots["name/ema"]` of what a turn keeps itself.
    Units: `state.step` counts steps, not turns.
    Type: step; the metrics of a turn are prefixed, `d/loss`, and `loss` is the sum over the turns that were made
    Errors: FieldTypeError for a turn that is no complete step, FieldValueError for a bad `every`; ShardingError at
      `compile` if the turns are sharded by different rules.
    Transforms on its left act on the whole: `skip_nonfinite` leaves everything as it was if any of the turns is not
    finite, which takes a second copy of what is trained and of the optimizer states; `ema` averages all that any turn
    trains, and every turn can read it. The metrics of a turn that is not made are NaN, or 0 for whole numbers; its
    optimizer does not move. An overflow that `loss_scale` skips in a turn skips that turn alone, and the step counts.
    Example:
      >>> d, g = (update(optax.sgd(0.1)) @ grad(loss, wrt=wrt) for wrt in ("d/**", "g/**"))
      >>> alternate(d=d, g=g)
      alternate(d=update(optax.sgd(0.1)) @ grad(loss, wrt="d/**"), g=update(optax.sgd(0.1)) @ grad(loss, wrt="g/**"))

    Source: Goodfellow et al., "Generative Adversarial Nets", 2014, arxiv.org/abs/1406.2661, algorithm 1.
    """
    often = every or {}
    if not isinstance(often, Mapping):
        facts = (("expected", 'a dict of turns and integers, such as {"g": 5}'), ("got", repr(every)))
        raise FieldTypeError("`alternate`: every is no dict.", facts=facts)
    return Alternate(tuple(turns.items()), tuple(often.items()))
