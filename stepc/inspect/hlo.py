"""Optimised HLO text, parsed into frozen values. It must not know the questions that others put to them."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePath
from types import MappingProxyType

import jax

from stepc._text import split_outside_brackets

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_STRING_OR_COMMENT = re.compile(r'"(?:[^"\\]|\\.)*"|/\*.*?\*/')
_COMPUTATION = re.compile(r"(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*\)\s*->.*)?\{$")
_ASSIGNMENT = re.compile(r"(ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{[^}]*?S\((\d+)\)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(
    r"\b(body|condition|to_apply|calls|branch_computations|called_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
# The internal packages of stepc. The path is matched, not where stepc is installed: a text may come from elsewhere.
_STEPC_FILE = re.compile(r"(?:^|/)stepc/_\w+(?:/|\.py$)")
# The compiler wraps what a transform asks for in a scope of this name: `stepc:shard(dp("data")) (train.py:41)`.
_TRANSFORM_SCOPE = "stepc:"
# In it is one for the leaves that a collective carries: `stepc-leaves(layers/0/w, head)`.
_LEAVES_SCOPE = "stepc-leaves("
# These parts of an op_name say how a program is built, not what it computes.
_STRUCTURE = frozenset({"body", "closed_call", "cond", "jvp()", "pjit", "shard_map", "transpose(jvp())", "while"})


@dataclass(frozen=True)
class Shape:
    """One array: its element type as HLO writes it, and its sizes.

    `space` is its memory space: 0 is main memory; 1, on a TPU, is the small fast one. `==` ignores it.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = field(default=0, compare=False)

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The size without padding or tiling; 0 for tokens and opaque values."""
        return math.ceil(self.elements * _bits(self.dtype) / 8)


@dataclass(frozen=True)
class CalledComputation:
    """A computation that an instruction runs, and its role: `body`, `calls`, `to_apply`, ..."""

    role: str
    computation: str


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. `shapes` are the leaves of its result; `literal` is the text in its parentheses."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    calls: tuple[CalledComputation, ...]
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of JAX names that led here; empty if the metadata has none."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    @property
    def scopes(self) -> tuple[str, ...]:
        """The parts of `op_name`. A `/` inside brackets does not separate: a transform's scope may name a path."""
        parts = split_outside_brackets(self.op_name, "/")
        return tuple(part.removeprefix(_TRANSFORM_SCOPE) for part in parts if part)


@dataclass(frozen=True)
class Computation:
    """A named list of instructions, in the order of the text."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is that of the computation."""
        listed = tuple(self.instructions.values())
        return next((instruction for instruction in listed if instruction.is_root), listed[-1])


@dataclass(frozen=True)
class Module:
    """A program. `frames` maps a stack frame to the path and line of its innermost call."""

    header: str
    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, tuple[str, str]]

    @property
    def num_devices(self) -> int:
        """The number of devices that run the program: partitions times replicas."""
        partitions = re.search(r"\bnum_partitions=(\d+)", self.header)
        replicas = re.search(r"\breplica_count=(\d+)", self.header)
        return int(partitions[1] if partitions else 1) * int(replicas[1] if replicas else 1)

    def source(self, instruction: Instruction) -> str:
        """The line that asked for an instruction, `train.py:41 (op_name)`, or as much of it as the metadata has.

        Never a file of stepc. Where the innermost line is one, this is the transform that asked, as written and with
        its own line, `shard(dp("data")) (train.py:41)`, or else the op_name without the names of loops and calls.
        """
        file, line = self._location(instruction.attributes)
        op_name = _without_scopes(instruction.op_name, _LEAVES_SCOPE)
        if not file:
            return _transform_scope(op_name) or op_name
        if not _STEPC_FILE.search(file):
            path = _without_scopes(op_name, _TRANSFORM_SCOPE)
            return f"{PurePath(file).name}:{line}" + (f" ({path})" if path else "")
        origins = (_transform_scope(path) or _without_structure(path) for path in _merged_paths(op_name))
        return ", ".join(dict.fromkeys(origin for origin in origins if origin)) or op_name

    def parameters(self, instruction: Instruction) -> str:
        """The paths of the parameters that a collective carries, as the compiler named them: "layers/0/w, head"."""
        op_name, found = instruction.op_name, list[str]()
        end = 0
        while (start := op_name.find(_LEAVES_SCOPE, end)) >= 0:
            end = _end_of_scope(op_name, start)
            found.append(op_name[start + len(_LEAVES_SCOPE) : end].removesuffix(")"))
        return ", ".join(dict.fromkeys(found))

    def _location(self, attributes: str) -> tuple[str, str]:
        frame = re.search(r"\bstack_frame_id=(\d+)", attributes)
        if frame and int(frame[1]) in self.frames:
            return self.frames[int(frame[1])]
        file = re.search(r'\bsource_file="([^"]*)"', attributes)  # what XLA wrote before it had stack frames
        line = re.search(r"\bsource_line=(\d+)", attributes)
        return (file[1], line[1]) if file and line else ("", "")


def text_of(compiled: jax.stages.Compiled | str) -> str:
    """Return the optimised HLO text of an executable; text is returned unchanged."""
    if isinstance(compiled, str):
        return compiled
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"The backend failed to print HLO: {error}") from error
    if text is None:
        raise ValueError("The backend prints no HLO for this executable.")
    return text


@lru_cache(maxsize=1)  # a report asks several questions about one program
def parse(text: str) -> Module:
    """Read optimised HLO text.

    Meaning: the computations, instructions and source tables of the text; nothing is inferred.
    Why: `as_text` is the only public view of an executable that names its instructions.

    Args:
      text: what `jax.stages.Compiled.as_text()` returns, on any backend.
    Errors: ValueError if the text has no entry computation, or has a line that is not an instruction.
    Instructions that XLA hides inside sugared asynchronous operations stay hidden.
    Source: the printer and grammar of XLA, xla/hlo/parser, https://github.com/openxla/xla.
    """
    lines = text.splitlines()
    start = next((at for at, line in enumerate(lines) if _COMPUTATION.match(line.strip())), len(lines))
    computations: dict[str, Computation] = {}
    entry = ""
    for name, is_entry, body in _blocks(lines[start:]):
        read = (_instruction(statement) for statement in _statements(body))
        computations[name] = Computation(name, MappingProxyType({line.name: line for line in read}))
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("This is not HLO text: it has no ENTRY computation.")
    header = next((line for line in lines[:start] if line.strip().startswith("HloModule")), "").strip()
    return Module(header, MappingProxyType(computations), entry, MappingProxyType(_frames(lines[:start])))


def _blocks(lines: Iterable[str]) -> Iterator[tuple[str, bool, list[str]]]:
    """Split the text into computations: the name, whether it is the entry, its lines."""
    opened: re.Match[str] | None = None
    body: list[str] = []
    for line in map(str.strip, lines):
        if opened is None:
            opened, body = _COMPUTATION.match(line), []
        elif line == "}" or line.startswith("}, execution_thread="):
            yield opened[2], opened[1] is not None, body
            opened = None
        elif line:
            body.append(line)


def _statements(lines: Iterable[str]) -> Iterator[str]:
    """Join the lines of instructions that the printer wrapped, and drop `/*index=5*/`."""
    pending = ""
    for line in lines:
        kept = _STRING_OR_COMMENT.sub(lambda found: found[0] if found[0][0] == '"' else "", line)
        pending = f"{pending} {kept}".strip()
        bare = _STRING.sub("", pending)
        is_closed = bare.count("(") == bare.count(")") and bare.count("{") == bare.count("}")
        if is_closed and not bare.endswith(","):
            yield pending
            pending = ""
    if pending:
        raise ValueError(f"This HLO instruction never ends: {pending[:200]}")


def _instruction(statement: str) -> Instruction:
    # Quoted text may contain brackets; a mask of the same length keeps positions valid.
    bare = _STRING.sub(lambda found: '"' + "_" * (len(found[0]) - 2) + '"', statement)
    assigned = _ASSIGNMENT.match(bare)
    shape_start = assigned.end() if assigned else 0
    shape_end = _closing(bare, shape_start) if bare.startswith("(", shape_start) else bare.find(" ", shape_start)
    opcode = _OPCODE.match(bare, shape_end)
    if not assigned or not opcode:
        raise ValueError(f"This HLO line is not an instruction: {statement[:200]}")
    literal_end = _closing(bare, opcode.end() - 1)
    literal = statement[opcode.end() : literal_end - 1].strip()
    return Instruction(
        name=assigned[2],
        opcode=opcode[1],
        shapes=tuple(_shapes(bare[shape_start:shape_end])),
        operands=() if opcode[1] in ("constant", "parameter") else _operands(literal),
        literal=literal,
        attributes=statement[literal_end:].lstrip(", "),
        calls=tuple(_calls(bare[literal_end:])),
        is_root=assigned[1] is not None,
    )


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"This HLO line has unbalanced brackets: {text[:200]}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, space in _ARRAY.findall(text):
        # `<=5` is a bound on a dynamic size.
        sizes = tuple(int(size.strip().lstrip("<=")) for size in dims.split(",") if size.strip())
        yield Shape(dtype, sizes, int(space or 0))


def _operands(literal: str) -> tuple[str, ...]:
    # XLA prints `%` before names whenever it prints operand types, whose commas would break a split.
    names = _NAME.findall(literal) if "%" in literal else literal.split(",")
    return tuple(name.strip() for name in names if name.strip())


def _calls(attributes: str) -> Iterator[CalledComputation]:
    for role, names in _CALLS.findall(attributes):
        for name in names.strip("{}").split(","):
            yield CalledComputation(role, name.strip().removeprefix("%"))


def _frames(lines: Iterable[str]) -> dict[int, tuple[str, str]]:
    """Resolve the tables after the header: a frame names a location, a location names a file."""
    tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
    table: dict[int, str] = {}
    for line in map(str.strip, lines):
        number, _, row = line.partition(" ")
        if line in tables:
            table = tables[line]
        elif number.isdigit():
            table[int(number)] = row
    files = {key: row.strip('"') for key, row in tables["FileNames"].items()}
    locations: dict[int, tuple[str, str]] = {}
    for key, row in tables["FileLocations"].items():
        found = re.search(r"file_name_id=(\d+).*?\bline=(\d+)", row)
        if found and int(found[1]) in files:
            locations[key] = files[int(found[1])], found[2]
    frames = {key: re.search(r"file_location_id=(\d+)", row) for key, row in tables["StackFrames"].items()}
    return {key: locations[int(found[1])] for key, found in frames.items() if found and int(found[1]) in locations}


def _merged_paths(op_name: str) -> list[str]:
    """The paths of the operations that XLA merged into one: `f/a/psum` and `f/b/psum` of `f/(a/psum:b/psum)`."""
    *outer, last = split_outside_brackets(op_name, "/")
    if not last.startswith("(") or not last.endswith(")"):
        return [op_name]
    paths: list[str] = []
    for part in split_outside_brackets(last[1:-1], ":"):
        if paths and f"{paths[-1]}:".endswith(_TRANSFORM_SCOPE):  # this colon belongs to a scope
            paths[-1] += f":{part}"
        else:
            paths.append(part)
    return ["/".join((*outer, path)) for path in paths]


def _transform_scope(op_name: str) -> str:
    """The innermost transform that an op_name names, as written."""
    start = op_name.rfind(_TRANSFORM_SCOPE)
    if start < 0:
        return ""
    # A composition has a dot in a scope: XLA drops what follows an `@` in a name.
    written = op_name[start : _end_of_scope(op_name, start)].replace(" . ", " @ ")
    return written.removeprefix(_TRANSFORM_SCOPE)


def _without_scopes(op_name: str, scope: str) -> str:
    """`jit(step)/jvp()/tanh` of `jit(step)/jvp(stepc:grad(loss) (train.py:41))/tanh`."""
    while (start := op_name.find(scope)) >= 0:
        op_name = op_name[:start] + op_name[_end_of_scope(op_name, start) :]
    return "/".join(part for part in op_name.split("/") if part)


def _end_of_scope(op_name: str, start: int) -> int:
    """Where a scope that begins at `start` ends: at a `/`, or at the bracket of a `jvp(...)` around it."""
    depth = 0
    for at in range(start, len(op_name)):
        depth += (op_name[at] in "([{") - (op_name[at] in ")]}")
        if depth < 0 or (depth == 0 and op_name[at] == "/"):
            return at
    return len(op_name)


def _without_structure(path: str) -> str:
    """What a path says about the computation: `microbatches/psum` of `jit(step)/microbatches/while/body/psum`."""
    parts = split_outside_brackets(path, "/")
    return "/".join(part for part in parts if part not in _STRUCTURE and not part.startswith("jit("))


def _bits(dtype: str) -> int:
    """The bits of one element: `f8e4m3fn` has 8; a `pred` takes a whole byte."""
    if dtype == "pred":
        return 8
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 0
