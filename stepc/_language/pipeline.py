"""Transforms and pipelines as values: composition with `@`, and printing as the source that made them.

It knows no particular transform. A transform that is given a function cannot print it from its value, since optax
returns closures. So the text of the argument is read from the call itself, whose columns the byte code keeps.
"""

import ast
import linecache
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from itertools import islice, permutations
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, ClassVar, Never, NoReturn, Self, TypeAlias

import numpy as np
import optax

from stepc._core.nodes import (
    DifferentiateNode,
    MapNode,
    MeanNode,
    Node,
    Program,
    RescaleNode,
    UnderVmap,
    Wrap,
    named,
    turns_of,
)
from stepc._language.kinds import Kind
from stepc._language.semantics import Fn
from stepc.errors import ConfigError, PipelineTypeError, caret, did_you_mean, listed

# What may be on either side of `@`. A plain function is accepted so that the error can name the remedy.
Operand: TypeAlias = "Transform | Pipeline | Callable[..., Any]"

_LONGEST_QUOTE = 60  # columns; a longer argument is printed by its name
_MOST_NUMBERS = 100  # of the closures of one transform: a loss may hold a whole model
_LONGEST_NAME = 40  # columns; messages name a longer value by its type


@dataclass(frozen=True)
class SourceSite:
    """A line of the user's source."""

    file: str
    line: int

    def __str__(self) -> str:
        # The file name of a notebook cell or a prompt is not that of a file.
        return f"{Path(self.file).name}:{self.line}" if Path(self.file).exists() else f"line {self.line}"


@dataclass(frozen=True)
class QuotedArgument:
    """A value that prints as the source that made it. `==` and `hash` ignore the text."""

    value: Any  # Any: an optimizer or a loss, whose own type says nothing
    text: str = field(compare=False)

    def __repr__(self) -> str:
        return self.text


@dataclass(frozen=True)
class AutotuneRequest:
    """A number of parts that a transform leaves to the compiler: the smallest with which the compiled step fits.

    Args:
      most_bytes: what the program may hold at once, on one device.
      resolved: the transform with that number filled in.
    """

    most_bytes: int
    resolved: Callable[[int], "Transform"]


class _Composable:
    """`@` on either side, for transforms and pipelines alike."""

    def __matmul__(self, inner: Operand) -> "Pipeline":
        return compose(self, inner)

    def __rmatmul__(self, outer: Operand) -> "Pipeline":
        return compose(outer, self)

    def __call__(self, inner: Operand, *more: Never) -> "Pipeline":
        """`accumulate(4)(g)` is `accumulate(4) @ g`."""
        if more or (transforms_of(self)[-1].takes is None and not transforms_of(inner)):
            stages = transforms_of(self)
            is_complete = stages[0].gives is Kind.STEP and stages[-1].takes is None
            then = f"Write `compile({self!r})`, and call that with a state and a batch." if is_complete else None
            raise PipelineTypeError(f"`{self!r}` is not a step, and cannot be called with arrays.", suggestion=then)
        return compose(self, inner)

    def _refuse(self, other: object, sign: str) -> NoReturn:
        written = f"{self!r} {sign} {operand_name(other)}"
        orders = [Pipeline((*one, *two)) for one, two in permutations(map(transforms_of, (self, other))) if one and two]
        fits = [f"`{one!r}`" for one in orders if _meets(one)]
        choice = f"Write {fits[0]}" if len(fits) == 1 else f"Either write {', or '.join(fits)}"
        raise PipelineTypeError(
            f"Transforms are composed with `@`, not with `{sign}`.",
            where=caret(written, sign, str(site_of_caller())),
            suggestion=f"{choice}: the rightmost acts first." if fits else None,
        )

    def __or__(self, other: object) -> NoReturn:
        self._refuse(other, "|")

    def __rshift__(self, other: object) -> NoReturn:
        self._refuse(other, ">>")

    def __lshift__(self, other: object) -> NoReturn:
        self._refuse(other, "<<")

    def __mul__(self, other: object) -> NoReturn:
        self._refuse(other, "*")

    def __add__(self, other: object) -> NoReturn:
        self._refuse(other, "+")

    def __and__(self, other: object) -> NoReturn:
        self._refuse(other, "&")


@dataclass(frozen=True, repr=False)
class Transform(_Composable, ABC):
    """One transform of the language: a frozen value with two kinds, a reference semantics and an expansion.

    To write your own, subclass it as a frozen dataclass, set `takes` and `gives`, check the fields in `__post_init__`,
    and test the result with `stepc.testing.check_transform`.
    """

    takes: ClassVar[Kind | None]  # None: nothing stands on its right
    gives: ClassVar[Kind]
    # Where in a pipeline it may be, within what its kinds allow: "anywhere", "once", or "outermost".
    position: ClassVar[str] = "anywhere"

    def __new__(cls, *_: object, **__: object) -> Self:
        # Not a field: the site is not compared, hashed or printed, and a subclass need not know about it.
        self = super().__new__(cls)
        object.__setattr__(self, "_site", site_of_caller())
        return self

    @property
    def site(self) -> SourceSite:
        """The line of the user's source where it was made."""
        return self.__dict__["_site"]

    @abstractmethod
    def reference(self, inner: Fn) -> Fn:
        """The definition, as plain Python loops: no jit, no scan, no mesh."""

    @abstractmethod
    def expand(self) -> tuple[Node | Wrap, ...]:
        """The transform in core nodes (`stepc.nodes`), outermost first; a transform of losses in `Wrap`s."""

    def autotune_request(self) -> AutotuneRequest | None:
        """What it leaves to the compiler, which then replaces it; None if it leaves nothing."""
        return None

    def with_parts(self, num: int) -> "Transform | None":
        """The same with another number of parts, one after another; None if it makes no such parts."""
        return None

    def nested(self) -> tuple["Transform", ...]:
        """The transforms of the pipelines that it is given; messages and compiled text name them too."""
        return ()

    def __repr__(self) -> str:
        return f"{transform_name(type(self))}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.default is not MISSING and value == one.default:
                continue
            yield f"{one.name}={_source_of(value)}" if one.kw_only else _source_of(value)


@dataclass(frozen=True, repr=False)
class Objective(Transform):
    """A plain loss as the innermost transform, as in `grad(cast(jnp.bfloat16) @ loss)`. It prints as the function."""

    takes: ClassVar = None
    gives: ClassVar = Kind.LOSS
    loss: QuotedArgument

    def reference(self, inner: Fn) -> Fn:
        return Fn(inner.init, self.loss.value, inner.axes)

    def expand(self) -> tuple[Node, ...]:
        return ()  # the loss itself is a field of `DifferentiateNode`

    def __repr__(self) -> str:
        return repr(self.loss)


@dataclass(frozen=True, repr=False)
class Pipeline(_Composable):
    """Two or more transforms, outermost first, as written. A partial pipeline still takes something on its right."""

    transforms: tuple[Transform, ...]

    def __repr__(self) -> str:
        return " @ ".join(map(repr, self.transforms))

    @property
    def takes(self) -> Kind | None:
        """What its rightmost transform takes; None for a complete pipeline."""
        return self.transforms[-1].takes

    @property
    def gives(self) -> Kind:
        """What its leftmost transform gives."""
        return self.transforms[0].gives


def compose(outer: Operand, inner: Operand) -> Pipeline:
    """`outer @ inner`, read as in mathematics: `inner` acts first.

    Errors: PipelineTypeError if `inner` does not give what `outer` takes, or if a transform that is not linear would
      see the gradient of a scaled loss.
    """
    left, right = transforms_of(outer), transforms_of(inner)
    if left and not right and left[-1].takes is Kind.LOSS and callable(inner):
        right = (Objective(QuotedArgument(inner, function_name(inner))),)
    if left and right and left[-1].takes is right[0].gives:
        pipeline = Pipeline((*left, *right))
        _check_scale(pipeline)
        _check_heads(pipeline)
        return pipeline
    if left and right:
        raise _kind_mismatch(outer, inner, left, right)
    raise _not_a_transform(outer, inner)


def transforms_of(operand: object) -> tuple[Transform, ...]:
    """The transforms of a transform or a pipeline; none for anything else."""
    match operand:
        case Transform():
            return (operand,)
        case Pipeline(transforms):
            return transforms
        case _:
            return ()


def expand_transforms(transforms: Iterable[Transform]) -> Program:
    """The core program of these transforms."""
    return tuple(node for transform in transforms for node in transform.expand() if not isinstance(node, Wrap))


def transform_name(kind: type) -> str:
    """The name that a user writes for a transform class: `skip_nonfinite` for `SkipNonfinite`."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")


def operand_name(operand: object) -> str:
    """How a message names what stands beside an `@`: its own repr if that is short, or else its type."""
    if transforms_of(operand):
        return repr(operand)
    name = operand.__name__ if isinstance(operand, FunctionType) else repr(operand)
    return name if len(name) <= _LONGEST_NAME else type(operand).__name__


def function_name(loss: Callable[..., Any]) -> str:
    """How a function prints when its source text cannot be read."""
    return loss.__name__ if isinstance(loss, FunctionType) else type(loss).__name__


def site_of_caller() -> SourceSite:
    """The line outside stepc that is being executed."""
    frame = _frame_of_caller()
    return SourceSite(frame.f_code.co_filename, frame.f_lineno)


def quoted_argument(value: object, *, position: int, keyword: str, otherwise: str) -> QuotedArgument:
    """`value`, printed as the argument was written in the call outside stepc that is being executed."""
    code = "" if _is_called_by_us() else _source_of_call(_frame_of_caller())
    call = _parsed_call(code)
    if call is None:
        return QuotedArgument(value, otherwise)
    named = [one.value for one in call.keywords if one.arg == keyword]
    starred = any(isinstance(one, ast.Starred) for one in call.args)
    given = named or ([] if starred else call.args[position : position + 1])
    text = ast.get_source_segment(code, given[0]) if given else None
    if text is None or len(text) > _LONGEST_QUOTE or "\n" in text:
        return QuotedArgument(value, otherwise)
    return QuotedArgument(value, text)


def settings_of(pipeline: "Transform | Pipeline") -> list[tuple[str, dict[str, str]]]:
    """Each transform as it prints, with the numbers that it does not print: those in the closures of its arguments.

    Why: `update(tx)` prints alike for every learning rate, since optax keeps it in a closure.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for transform in transforms_of(pipeline):
        numbers: dict[str, str] = {}
        for one in fields(transform):
            _add_numbers(getattr(transform, one.name), one.name, numbers, seen=set())
        found.append((repr(transform), numbers))
    return found


def _add_numbers(value: object, name: str, numbers: dict[str, str], seen: set[int]) -> None:
    """Add the numbers and names that a value holds, each by the function that it belongs to."""
    if id(value) in seen or len(numbers) >= _MOST_NUMBERS:
        return
    match value:
        case QuotedArgument(value=inner):
            _add_numbers(inner, name, numbers, seen)
        case Pipeline(transforms=parts):
            for part in parts:
                for one in fields(part):
                    _add_numbers(getattr(part, one.name), one.name, numbers, seen)
        case FunctionType(__closure__=cells, __code__=code):
            seen.add(id(value))
            owner = value.__qualname__.partition(".")[0]
            for variable, cell in zip(code.co_freevars, cells or (), strict=True):
                with suppress(ValueError):  # a variable that has no value yet
                    _add_numbers(cell.cell_contents, f"{owner}.{variable}", numbers, seen)
        case partial(func=function, args=args, keywords=keywords):
            for one, part in (("", function), *enumerate(args), *keywords.items()):
                _add_numbers(part, f"{name}.{one}", numbers, seen)
        case tuple() | list():
            seen.add(id(value))
            for part in value:
                _add_numbers(part, name, numbers, seen)
        case dict():
            seen.add(id(value))
            for part in value.values():
                _add_numbers(part, name, numbers, seen)
        case bool() | int() | float() | complex() | str() | np.generic() if "." in name:
            text = repr(value).removesuffix(".0")  # optax's schedules make a float of an integer when they are called
            while numbers.get(name, text) != text:
                name += "'"  # of two functions alike, the second
            numbers[name] = text
        case _:
            pass


def _frame_of_caller() -> FrameType:
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] (inspect.stack reads every source file on the way)
    while frame.f_back is not None and _is_ours(frame):
        frame = frame.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    package = module.partition(".")[0]
    # The annotation checkers of our tests put their own frames between the user and us.
    return package in ("stepc", "beartype", "jaxtyping") or frame.f_code.co_filename.startswith("<@beartype")


def _is_called_by_us() -> bool:
    """Whether a part of stepc outside the language made the transform: the user's line is then another call."""
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    modules: list[str] = []
    while frame.f_back is not None and _is_ours(frame):
        modules.append(str(frame.f_globals.get("__name__", "")))
        frame = frame.f_back
    return any(name.startswith("stepc.") and not name.startswith("stepc._language.") for name in modules)


def _source_of_call(frame: FrameType) -> str:
    """The text of the expression that the frame is evaluating; empty if it cannot be read."""
    line, end_line, start, end = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
    if line is None or end_line is None or start is None or end is None:
        return ""
    lines = [text.encode() for text in linecache.getlines(frame.f_code.co_filename)[line - 1 : end_line]]
    if not lines:
        return ""
    lines[-1] = lines[-1][:end]  # the end first: on a single line, cutting the start moves it
    lines[0] = lines[0][start:]
    return b"".join(lines).decode()


def _parsed_call(code: str) -> ast.Call | None:
    try:
        expression = ast.parse(code, mode="eval").body
    except SyntaxError:
        return None
    return expression if isinstance(expression, ast.Call) else None


def _source_of(value: object) -> str:
    match value:
        case str():
            return f'"{value}"'
        case np.dtype():
            return f"jnp.{value.name}"
        case (str(), *rest) if isinstance(value, tuple) and all(isinstance(one, str) for one in rest):
            return f"({', '.join(map(_source_of, value))}{'' if rest else ','})"
        case _:
            return repr(value)


def _kind_mismatch(
    outer: Operand, inner: Operand, left: tuple[Transform, ...], right: tuple[Transform, ...]
) -> PipelineTypeError:
    taker, giver = left[-1], right[0]
    what = f"`{taker!r}` takes {taker.takes}, but the stage on its right returns {giver.gives}."
    if taker.takes is None:
        what = f"`{taker!r}` must be the rightmost stage: it takes no other on its right."
    reordered = _well_typed_order(left, right)
    match taker.takes, giver.gives:
        case Kind.GRADIENT, Kind.LOSS:
            loss = repr(inner) if right[-1].takes is None else f"{inner!r} @ loss"
            suggestion = f"Write `{outer!r} @ grad({loss})`."
        case Kind.LOSS, _:
            suggestion = f"Write `grad({outer!r} @ loss)`: transforms of the loss go inside `grad`."
        case _:
            suggestion = f"Write `{reordered!r}`." if reordered else None
    return PipelineTypeError(
        what,
        where=caret(repr(Pipeline((*left, *right))), repr(taker), str(site_of_caller())),
        facts=(("expected", taker.takes.value if taker.takes else "nothing"), ("got", giver.gives.value)),
        suggestion=suggestion,
    )


def _well_typed_order(left: tuple[Transform, ...], right: tuple[Transform, ...]) -> Pipeline | None:
    """The same transforms with `left` moved inwards to the first place where all kinds meet, if there is one."""
    for place in range(1, len(right) + 1):
        transforms = (*right[:place], *left, *right[place:])
        if _meets(Pipeline(transforms)):
            return Pipeline(transforms)
    return None


def _meets(pipeline: Pipeline) -> bool:
    """Whether the kinds of all neighbours meet."""
    transforms = pipeline.transforms
    return all(one.takes is two.gives for one, two in zip(transforms, transforms[1:], strict=False))


def check_reads(transforms: tuple[Transform, ...]) -> None:
    """Refuse a loss that reads what no transform keeps. Errors: ConfigError."""
    # What is left to the compiler has no nodes yet; it only splits rows.
    made = [node for one in transforms if one.autotune_request() is None for node in one.expand()]
    program = tuple(node for node in made if not isinstance(node, Wrap))

    def kept_by(program: Program) -> set[str]:
        return {name for name, node in named(program).items() if not isinstance(node, MapNode)}

    for turn in turns_of(program):
        node, kept = turn.loss, kept_by(program) | kept_by(turn.program) | {"step"}
        if unknown := [name for name in node.reads if name not in kept]:
            hints = [did_you_mean(name, kept) for name in unknown]
            missing = f"Write `ema(decay) @ ...`: it keeps the slot `{unknown[0]}`." if unknown[0] == "ema" else None
            raise ConfigError(
                f"`{node.written}` reads {listed(map(repr, unknown))}, which the state does not have.",
                facts=(("kept", ", ".join(sorted(kept))),),
                suggestion=" ".join(filter(None, hints)) or missing,
            )


def _check_scale(pipeline: Pipeline) -> None:
    """Refuse a transform that is not linear to the right of a scale of the loss.

    It would see the gradient of the scaled loss: a bound, noise or a measurement of the wrong number.
    """
    transforms = pipeline.transforms
    # What is left to the compiler has no nodes yet; it only splits rows.
    nodes = [one.expand() if one.autotune_request() is None else () for one in transforms]
    scaled = [n for n, made in enumerate(nodes) if any(isinstance(node, RescaleNode) for node in made)]
    if not scaled:
        return
    place, scale = scaled[0], transforms[scaled[0]]
    outer, inner = transforms[:place], transforms[place + 1 :]
    mapped = [n for n, made in enumerate(nodes[place + 1 :]) if any(isinstance(node, MapNode) for node in made)]
    if not mapped:
        return
    last = mapped[-1] + 1
    moved = Pipeline((*outer, *inner[:last], scale, *inner[last:]))
    listed = " and ".join(f"`{inner[n]!r}`" for n in mapped)
    raise PipelineTypeError(
        f"{listed} would see the gradient of the scaled loss: `{scale!r}` on the left divides by the scale later.",
        where=caret(repr(pipeline), repr(inner[mapped[0]]), str(site_of_caller())),
        facts=(
            ("expected", "a linear transform, such as accumulate, shard, rows or scale"),
            ("got", "a transform that is not linear"),
        ),
        suggestion=f"Write `{moved!r}`.",
    )


def _check_heads(pipeline: Pipeline) -> None:
    """Refuse what a loss of the whole batch cannot have on its left: a transform of the loss, or single rows."""
    transforms = pipeline.transforms
    # What is left to the compiler has no nodes yet; it only splits rows.
    nodes = [one.expand() if one.autotune_request() is None else () for one in transforms]
    written, site = repr(pipeline), str(site_of_caller())
    places = [n for n, made in enumerate(nodes) if any(isinstance(one, Wrap) and one.head for one in made)]
    if places and places[-1]:
        place = places[-1]
        moved = Pipeline((transforms[place], *transforms[:place], *transforms[place + 1 :]))
        one = transforms[place - 1]
        raise PipelineTypeError(
            f"`{one!r}` would transform the head and the encoder together, and the program runs them apart.",
            where=caret(written, repr(one), site),
            facts=(("expected", f"`{transforms[place]!r}` as the outermost transform of the loss"),),
            suggestion=None if len(places) > 1 else f"Write `{moved!r}`, which transforms the encoder.",
        )
    has_head = any(isinstance(node, DifferentiateNode) and node.head for made in nodes for node in made)
    single = [one for one, made in zip(transforms, nodes, strict=True) if any(map(_splits_into_rows, made))]
    if has_head and single:
        kept = tuple(one for one in transforms if one not in single)
        raise PipelineTypeError(
            f"`{single[0]!r}` gives the head of `{transforms[-1]!r}` one row at a time, and the head needs the batch.",
            where=caret(written, repr(single[0]), site),
            facts=(("expected", "parts of several rows: accumulate, shard"), ("got", "single rows")),
            suggestion=f"Write `{Pipeline(kept)!r}`.",
        )


def _splits_into_rows(node: Node | Wrap) -> bool:
    return isinstance(node, MeanNode) and isinstance(node.place, UnderVmap)


def _not_a_transform(outer: Operand, inner: Operand) -> PipelineTypeError:
    wrong, stage = (outer, inner) if transforms_of(inner) else (inner, outer)
    name = operand_name(wrong)
    written = f"{name} @ {stage!r}" if wrong is outer else f"{stage!r} @ {name}"
    where = caret(written, name, str(site_of_caller()))
    neighbour = transforms_of(stage)[-1]
    facts = (("expected", "a transform or a pipeline"), ("got", type(wrong).__name__))
    if isinstance(wrong, FunctionType) and wrong.__module__.startswith("stepc._language.transforms."):
        what = f"`{name}` is not called: `{name}(...)` makes the transform."
        return PipelineTypeError(what, where=where, facts=facts)
    if isinstance(wrong, optax.GradientTransformation):
        fits = wrong is outer and transforms_of(stage)[0].gives is Kind.GRADIENT
        suggestion = f"Write `update(optimizer) @ {stage!r}`." if fits else None
        return PipelineTypeError(f"`{name}` is an optimizer, not a transform.", where=where, suggestion=suggestion)
    if wrong is inner and callable(wrong) and neighbour.takes is Kind.GRADIENT:
        what = f"`{neighbour!r}` takes a gradient, but `{name}` on its right is a loss function."
        return PipelineTypeError(what, where=where, suggestion=f"Write `{stage!r} @ grad({name})`.")
    suggestion = None
    if wrong is outer and callable(wrong) and neighbour.takes is Kind.GRADIENT:
        suggestion = f"Write `{stage!r} @ grad({name})`: the rightmost acts first."
    return PipelineTypeError(f"`{name}` is not a transform.", where=where, facts=facts, suggestion=suggestion)
