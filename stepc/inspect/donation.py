"""Which arguments of a compiled program are written over by its results."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax

from stepc.inspect.hlo import parse, text_of

_ALIAS = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")
_DONOR = re.compile(r"\((\d+),\s*\{([\d,\s]*)\}\)")


@dataclass(frozen=True)
class DonatedLeaf:
    """One leaf of the arguments: whether its donation was asked for, and whether a result took its buffer."""

    path: str
    donated: bool
    aliased: bool


@dataclass(frozen=True)
class Aliases(Mapping[int, int]):
    """From the number of a flat argument to the number of the flat result that takes its buffer.

    `donors` are arguments that were given away and match no result; the program may use their buffers
    within, and may not.
    """

    pairs: tuple[tuple[int, int], ...]
    donors: tuple[int, ...]

    def __getitem__(self, argument: int) -> int:
        return dict(self.pairs)[argument]

    def __iter__(self) -> Iterator[int]:
        return (argument for argument, _ in self.pairs)

    def __len__(self) -> int:
        return len(self.pairs)


def aliases(compiled: jax.stages.Compiled | str) -> Aliases:
    """Return which arguments a program overwrites with which results.

    Meaning: `input_output_alias` and `buffer_donor` of the program's header.
    Why: a donation that cannot be used costs a whole copy, and is reported by one line of warning.

    Args:
      compiled: what `jax.jit(f, keep_unused=True).lower(...).compile()` returns, or its `as_text()`.
    Errors: ValueError if the backend prints no HLO.
    Compile with `keep_unused=True`. Otherwise JAX drops the arguments that are not used, and the numbers
    count only those that are left.
    Source: ours.
    """
    header = parse(text_of(compiled)).header
    pairs = {
        # With very many arguments JAX passes one tuple, and the position in it is the argument.
        _number(index, otherwise=argument): _number(output, otherwise="0")
        for output, argument, index in _ALIAS.findall(_field(header, "input_output_alias"))
    }
    donors = _DONOR.findall(_field(header, "buffer_donor"))
    return Aliases(
        tuple(sorted(pairs.items())),
        tuple(sorted(_number(index, otherwise=argument) for argument, index in donors)),
    )


def donated_leaves(compiled: jax.stages.Compiled) -> tuple[DonatedLeaf, ...]:
    """Every leaf of the arguments, its keys joined by `/`, and whether a result is written over it.

    Nothing, if jax dropped arguments that are not used: the numbers of the rest are then not those of the leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(compiled.args_info)
    module = parse(text_of(compiled))
    taken = [one for one in module.computations[module.entry].instructions.values() if one.opcode == "parameter"]
    if len(taken) != len(leaves):
        return ()
    found = aliases(compiled)
    # The first key says whether it is a positional argument or one by name, the second which.
    named = ((jax.tree_util.keystr(path[1:], simple=True, separator="/"), info) for path, info in leaves)
    return tuple(DonatedLeaf(path, info.donated, number in found) for number, (path, info) in enumerate(named))


def _field(header: str, name: str) -> str:
    """The text between the outer braces of `name={ ... }`, or nothing."""
    found = re.search(rf"\b{name}=\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", header)
    return found[1] if found else ""


def _number(index: str, *, otherwise: str) -> int:
    return int(index.strip() or otherwise)
