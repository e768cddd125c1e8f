"""`measure`: metrics of the gradient and the parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stepc._core.nodes import MapNode
from stepc._language.kinds import Grads, Kind, Metrics, Params
from stepc._language.pipeline import QuotedArgument, Transform, function_name, quoted_argument
from stepc._language.semantics import Fn, Gradient, Microbatch
from stepc._language.state import ARRAY_LIKE, State
from stepc.errors import ConfigError, FieldTypeError

Measurement = Callable[[Grads, Params], Mapping[str, Any]]  # Any: arrays


@dataclass(frozen=True, repr=False)
class Measure(Transform):
    """The gradient as it is, with metrics of it and of the parameters."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.GRADIENT
    fn: QuotedArgument

    def __post_init__(self) -> None:
        if not callable(self.fn.value) or isinstance(self.fn.value, Transform):
            facts = (("expected", "a function of (grads, params)"), ("got", type(self.fn.value).__name__))
            raise FieldTypeError(f"`measure({self.fn!r})`: fn must be a function.", facts=facts)

    def reference(self, inner: Fn) -> Fn:
        def apply(state: State, microbatch: Microbatch) -> Gradient:
            def measured(grads: Grads) -> tuple[Grads, Metrics]:
                return grads, metrics_of(grads, state.trained, self.fn.value, repr(self))[1]

            return inner.apply(state, microbatch).map(measured)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[MapNode, ...]:
        return (
            MapNode(
                unchanged,
                (self.fn.value, repr(self)),
                keeps_finite=True,
                measure=metrics_of,
                reads="params",
                written=repr(self),
            ),
        )


def metrics_of(grads: Grads, params: Params, fn: Measurement, written: str) -> tuple[None, Metrics]:
    """The metrics that the user's function returns. Errors: ConfigError if it does not return a dict by name."""
    returned = fn(grads, params)
    if not isinstance(returned, Mapping) or not all(isinstance(name, str) for name in returned):
        facts = (("expected", "a dict of arrays by name"), ("got", type(returned).__name__))
        raise ConfigError(f"The function of `{written}` does not return metrics.", facts=facts)
    if wrong := [(name, type(value).__name__) for name, value in returned.items() if not isinstance(value, ARRAY_LIKE)]:
        facts = tuple((f"metric {name!r}", f"expected an array, got {kind}") for name, kind in wrong)
        raise ConfigError(f"The function of `{written}` does not return metrics.", facts=facts)
    return None, dict(returned)


def unchanged(grads: Grads, _: None, __: Measurement, ___: str) -> Grads:
    """The gradient as it is."""
    return grads


def measure(fn: Measurement) -> Measure:
    """Add metrics of the gradient and the parameters; the gradient passes as it is.

    Meaning: g, with the metrics `fn(g, params)` beside the others.
    Why: norms by layer, histograms, the share of the gradient that is zero: measured inside the program, between the
      transforms where it stands.

    Args:
      fn: `fn(grads, params)` returns a dict of arrays by name, computed with `jax.numpy`. A name must not be that of
        another metric.
    Shapes: `grads` and `params` have the shapes of the parameters that are trained, with None in the place of frozen
      ones; a metric has any shape.
    Units: those of `fn`. `grads` is the mean gradient of the rows on its right.
    Type: gradient -> gradient; adds the metrics of `fn`
    Errors: FieldTypeError if `fn` is not a function; PipelineTypeError if the stage on its right returns no gradient;
      ConfigError at the first call if `fn` returns something else, or a name that is taken. Exceptions of `fn` pass
      through.
    It needs the reduced gradient, so its position matters: `measure(fn) @ accumulate(k)` measures once a step, and
    `accumulate(k) @ measure(fn)` measures each microbatch and reports the mean. There the gradient of an `sc.Mean`
    becomes a value, and from there on microbatches weigh equally.
    Example:
      >>> measure(norms) @ accumulate(4) @ grad(loss)
      measure(norms) @ accumulate(4) @ grad(loss)

    Source: ours.
    """
    return Measure(quoted_argument(fn, position=0, keyword="fn", otherwise=function_name(fn)))
