"""Which arguments of a compiled program share their buffers with its results."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax

from stepc.inspect.hlo import parse, text_of

_ALIAS = re.compile(r"\{([\d,\s]*)\}:\s*\((\d+),\s*\{([\d,\s]*)\}")
_DONOR = re.compile(r"\((\d+),\s*\{([\d,\s]*)\}\)")


@dataclass(frozen=True)
class DonatedLeaf:
    """One leaf of the arguments: whether the caller donates it, and whether a result reuses its buffer."""

    path: str
    donated: bool
    aliased: bool


@dataclass(frozen=True)
class Aliases(Mapping[int, int]):
    """From the position of a flat argument to the position of the flat result that reuses its buffer.

    `donors` are donated arguments that match no result; the program may reuse their buffers for temporaries.
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
    """Return which arguments a program aliases with which results.

    Meaning: `input_output_alias` and `buffer_donor` in the program's header.
    Why: a donation that cannot be used costs a full copy, and JAX reports it only as a warning.

    Args:
      compiled: what `jax.jit(f, keep_unused=True).lower(...).compile()` returns, or its `as_text()`.
    Errors: ValueError if the backend prints no HLO.
    Compile with `keep_unused=True`: otherwise JAX drops unused arguments, and positions count only the rest.
    Source: ours.
    """
    header = parse(text_of(compiled)).header
    pairs = {
        # With very many arguments JAX passes one tuple; the index into it is then the position of the argument.
        _position(index, default=argument): _position(output, default="0")
        for output, argument, index in _ALIAS.findall(_field(header, "input_output_alias"))
    }
    donors = _DONOR.findall(_field(header, "buffer_donor"))
    return Aliases(
        tuple(sorted(pairs.items())),
        tuple(sorted(_position(index, default=argument) for argument, index in donors)),
    )


def donated_leaves(compiled: jax.stages.Compiled) -> tuple[DonatedLeaf, ...]:
    """Every leaf of the arguments by its path, and whether a result reuses its buffer.

    Empty if JAX dropped unused arguments: the positions of the rest then do not match the leaves.
    """
    leaves = jax.tree_util.tree_leaves_with_path(compiled.args_info)
    module = parse(text_of(compiled))
    entry = module.computations[module.entry]
    parameters = [one for one in entry.instructions.values() if one.opcode == "parameter"]
    if len(parameters) != len(leaves):
        return ()
    found = aliases(compiled)
    # The first key only separates positional from keyword arguments: it is no part of the path.
    named = ((jax.tree_util.keystr(path[1:], simple=True, separator="/"), info) for path, info in leaves)
    return tuple(DonatedLeaf(path, info.donated, number in found) for number, (path, info) in enumerate(named))


def _field(header: str, name: str) -> str:
    """The text between the outer braces of `name={ ... }`; empty if there is none."""
    found = re.search(rf"\b{name}=\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", header)
    return found[1] if found else ""


def _position(index: str, *, default: str) -> int:
    return int(index.strip() or default)
