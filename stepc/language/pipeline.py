"""Words and their composition: `@`, calling, printing, comparing. It knows no particular word."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from types import FunctionType
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np

from stepc.core.nodes import Node, Program, Wrap
from stepc.errors import PipelineTypeError, caret
from stepc.language.kinds import Kind
from stepc.language.meaning import Fn
from stepc.language.source import Quoted, Site, site_of_caller

# What may stand beside `@`; a plain function is accepted only to be refused with a remedy.
Operand: TypeAlias = "Transform | Pipeline | Callable[..., Any]"

_LONGEST_NAME = 40  # columns; whatever prints longer is named by its type in messages


def word_of(kind: type) -> str:
    """The word that a class is written as: `SkipNonfinite` is `skip_nonfinite`."""
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in kind.__name__).lstrip("_")


def _shown(value: object) -> str:
    match value:
        case str():
            return f'"{value}"'
        case np.dtype():
            return f"jnp.{value.name}"
        case _:
            return repr(value)


@dataclass(frozen=True)
class Question:
    """What a word leaves to the compiler: the least number of parts with which the compiled step fits.

    Args:
      most_bytes: what the program may hold at once, on one device.
      answered: the word that says the number itself.
    """

    most_bytes: int
    answered: Callable[[int], "Transform"]


@dataclass(frozen=True, repr=False)
class Transform(ABC):
    """One word of the language: a frozen value with two kinds, a meaning and an expansion.

    Subclass it as a frozen dataclass, set `takes` and `gives`, check the fields in `__post_init__`, and
    hold the result to the house with `stepc.testing.check_transform`.
    """

    takes: ClassVar[Kind | None]  # None: nothing stands on its right
    gives: ClassVar[Kind]
    stands: ClassVar[str] = "anywhere"  # that its kinds allow; or "once" in a pipeline, or only "outermost"

    def __new__(cls, *_: object, **__: object) -> Self:
        # The site is no field: it is not compared, hashed or printed, and a subclass need not know of it.
        self = super().__new__(cls)
        object.__setattr__(self, "site", site_of_caller())
        return self

    @abstractmethod
    def meaning(self, inner: Fn) -> Fn:
        """The definition, as plain Python loops: no jit, no scan, no mesh."""

    @abstractmethod
    def expand(self) -> tuple[Node | Wrap, ...]:
        """The word in core nodes, outermost first; `stepc.core.nodes` lists them. A word of losses: in wraps."""

    def asks(self) -> Question | None:
        """What it leaves to the compiler, which puts the answer in its place; None if it leaves nothing."""
        return None

    def __matmul__(self, inner: Operand) -> "Pipeline":
        return compose(self, inner)

    def __rmatmul__(self, outer: Operand) -> "Pipeline":
        return compose(outer, self)

    def __call__(self, inner: Operand) -> "Pipeline":
        """`accumulate(4)(g)` is `accumulate(4) @ g`."""
        return compose(self, inner)

    def __repr__(self) -> str:
        return f"{word_of(type(self))}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for one in fields(self):
            value = getattr(self, one.name)
            if one.default is not MISSING and value == one.default:
                continue
            yield f"{one.name}={_shown(value)}" if one.kw_only else _shown(value)


@dataclass(frozen=True, repr=False)
class Objective(Transform):
    """A plain loss as the innermost word, as in `grad(cast(jnp.bfloat16) @ loss)`. It prints as the function."""

    takes: ClassVar = None
    gives: ClassVar = Kind.LOSS
    loss: Quoted

    def meaning(self, inner: Fn) -> Fn:
        return Fn(inner.init, self.loss.value, inner.axes)

    def expand(self) -> tuple[Node, ...]:
        return ()  # the loss itself is a field of `Differentiate`

    def __repr__(self) -> str:
        return repr(self.loss)


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Two or more words, outermost first, as they are written. Incomplete ones are recipes."""

    words: tuple[Transform, ...]

    def __matmul__(self, inner: Operand) -> "Pipeline":
        return compose(self, inner)

    def __rmatmul__(self, outer: Operand) -> "Pipeline":
        return compose(outer, self)

    def __call__(self, inner: Operand) -> "Pipeline":
        """`recipe(g)` is `recipe @ g`."""
        return compose(self, inner)

    def __repr__(self) -> str:
        return " @ ".join(map(repr, self.words))

    @property
    def takes(self) -> Kind | None:
        """What its rightmost word takes; None for a complete pipeline."""
        return self.words[-1].takes

    @property
    def gives(self) -> Kind:
        """What its leftmost word gives."""
        return self.words[0].gives


def compose(outer: Operand, inner: Operand) -> Pipeline:
    """`outer @ inner`, read as in mathematics: `inner` acts first.

    Errors: PipelineTypeError if what `inner` gives is not what `outer` takes.
    """
    left, right = words_of(outer), words_of(inner)
    if left and not right and left[-1].takes is Kind.LOSS and callable(inner):
        right = (Objective(Quoted(inner, name_of(inner))),)
    if left and right and left[-1].takes is right[0].gives:
        return Pipeline((*left, *right))
    raise _mismatch(outer, inner, site_of_caller())


def expanded(words: Iterable[Transform]) -> Program:
    """The core program of these words."""
    return tuple(node for word in words for node in word.expand() if not isinstance(node, Wrap))


def name_of(loss: Callable[..., Any]) -> str:
    """How a function prints where its text in the source is not to be had."""
    return loss.__name__ if isinstance(loss, FunctionType) else type(loss).__name__


def words_of(operand: object) -> tuple[Transform, ...]:
    """The words of a word or a pipeline; none for anything else."""
    match operand:
        case Transform():
            return (operand,)
        case Pipeline(words):
            return words
        case _:
            return ()


def _mismatch(outer: Operand, inner: Operand, site: Site) -> PipelineTypeError:
    left, right = words_of(outer), words_of(inner)
    if not (left and right):
        return _not_a_word(outer, inner, site)
    meet, other = left[-1], right[0]
    what = f"`{meet!r}` takes {meet.takes}, but the stage on its right gives {other.gives}."
    if meet.takes is None:
        what = f"`{meet!r}` takes nothing from its right: it is where {meet.gives} begins."
    facts = (("expected", meet.takes.value if meet.takes else "nothing"), ("got", other.gives.value))
    remedy = _well_typed_order(left, right)
    where = caret(repr(Pipeline((*left, *right))), repr(meet), str(site))
    suggestion = f"Write `{remedy!r}`." if remedy else None
    match meet.takes, other.gives:
        case Kind.GRADIENT, Kind.LOSS:
            suggestion = f"Write `{outer!r} @ grad({inner!r})`."
        case Kind.LOSS, _:
            suggestion = f"Write `grad({outer!r} @ loss)`: words of losses stand inside of `grad`."
        case _:
            pass
    return PipelineTypeError(what, where=where, facts=facts, suggestion=suggestion)


def _not_a_word(outer: Operand, inner: Operand, site: Site) -> PipelineTypeError:
    wrong, word = (outer, inner) if words_of(inner) else (inner, outer)
    name = wrong.__name__ if isinstance(wrong, FunctionType) else repr(wrong)
    name = name if len(name) <= _LONGEST_NAME else type(wrong).__name__
    shown, neighbour = (f"{word!r} @ {name}", words_of(word)[-1])
    if wrong is outer:
        shown, neighbour = f"{name} @ {word!r}", words_of(word)[0]
    facts = (("expected", "a word or a pipeline"), ("got", type(wrong).__name__))
    where = caret(shown, name, str(site))
    if wrong is inner and callable(wrong) and neighbour.takes is Kind.GRADIENT:
        what = f"`{neighbour!r}` takes a gradient, but `{name}` on its right is a plain function: a loss."
        return PipelineTypeError(what, where=where, suggestion=f"Write `{word!r} @ grad({name})`.")
    return PipelineTypeError(f"`{name}` is not a word of stepc.", where=where, facts=facts)


def _well_typed_order(left: tuple[Transform, ...], right: tuple[Transform, ...]) -> Pipeline | None:
    """The same words with `left` moved inwards to the first place where all kinds meet, if there is one."""
    for place in range(1, len(right) + 1):
        words = (*right[:place], *left, *right[place:])
        if all(one.takes is two.gives for one, two in zip(words, words[1:], strict=False)):
            return Pipeline(words)
    return None
