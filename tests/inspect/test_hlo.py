"""The reader of HLO text, on texts of our own in the dialects of CPU, GPU and TPU, and on real programs."""

import re

import jax
import jax.numpy as jnp
import pytest

from stepc.inspect.hlo import CalledComputation, Shape, parse, text_of
from stepc.inspect.loops import Execution, executions

ONCE = Execution(1, in_loop=False, conditional=False, asynchronous=False)

# A TPU writes no trip counts: tiled layouts, a counter in a multi-output fusion, a fused comparison.
TPU_LOOP = """HloModule jit_step, is_scheduled=true, num_partitions=4

%compared (a: s32[], b: s32[]) -> pred[] {
  %a = s32[]{:T(128)} parameter(0)
  %b = s32[]{:T(128)} parameter(1)
  ROOT %lt = pred[]{:T(512)} compare(%a, %b), direction=LT
}

%cond (arg.1: (s32[], f32[16,128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %limit = s32[]{:T(128)} constant(LIMIT)
  ROOT %fused = pred[]{:T(512)} fusion(%i.1, %limit), kind=kLoop, calls=%compared
}

%moved (c: s32[], x: f32[16,128]) -> (s32[], f32[16,128]) {
  %c = s32[]{:T(128)} parameter(0)
  %x = f32[16,128]{1,0:T(8,128)S(1)} parameter(1)
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} add(%c, %step)
  %doubled = f32[16,128]{1,0:T(8,128)S(1)} add(%x, %x)
  ROOT %both = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) tuple(%next, %doubled)
}

%body (arg.2: (s32[], f32[16,128])) -> (s32[], f32[16,128]) {
  %arg.2 = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %x.2 = f32[16,128]{1,0:T(8,128)S(1)} get-tuple-element(%arg.2), index=1
  ROOT %pair = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)S(1)}) fusion(%i.2, %x.2), kind=kLoop, calls=%moved
}

ENTRY %main (p: f32[16,128], n: s32[]) -> f32[16,128] {
  %p = f32[16,128]{1,0:T(8,128)} parameter(0)
  %n = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, /*index=1*/f32[16,128]{1,0:T(8,128)}) tuple(%COUNTER, /*index=1*/%p)
  %loop = (s32[]{:T(128)}, f32[16,128]{1,0:T(8,128)}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[16,128]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def loop(*, start: int = 0, limit: int = 8, step: int = 1, counter: str = "copied", direction: str = "LT") -> str:
    numbers = {
        "START": start,
        "LIMIT": limit,
        "STEP": step,
        "COUNTER": counter,
        "direction=LT": f"direction={direction}",
    }
    text = TPU_LOOP
    for transform, value in numbers.items():
        text = text.replace(transform, str(value))
    return text


def test_parse_module_names_entry_and_devices() -> None:
    module = parse(loop())
    assert list(module.computations) == ["compared", "cond", "moved", "body", "main"]
    assert module.entry == "main"
    assert module.num_devices == 4


def test_parse_instruction_with_tiled_layout_and_index_comment_reads_all_parts() -> None:
    line = parse(loop()).computations["main"].instructions["init"]
    assert line.opcode == "tuple"
    assert line.shapes == (Shape("s32", ()), Shape("f32", (16, 128)))
    assert line.operands == ("copied", "p")
    assert not line.is_root


def test_parse_while_names_its_computations_by_role() -> None:
    line = parse(loop()).computations["main"].instructions["loop"]
    assert line.calls == (CalledComputation("condition", "cond"), CalledComputation("body", "body"))


def test_parse_operands_with_their_types_keeps_only_names() -> None:
    text = """HloModule long
ENTRY %e (a: f32[2,3], b: f32[2,3]) -> f32[2,3] {
  %a = f32[2,3]{1,0} parameter(0)
  %b = f32[2,3]{1,0} parameter(1)
  ROOT %s = f32[2,3]{1,0} add(f32[2,3]{1,0} %a, f32[2,3]{1,0:T(8,128)(2,1)} %b)
}
"""
    assert parse(text).computations["e"].root.operands == ("a", "b")


def test_parse_text_without_percent_signs_reads_names() -> None:
    text = "HloModule short\n\nENTRY e {\n  a = f32[4] parameter(0)\n  ROOT s = f32[4] add(a, a)\n}\n"
    assert parse(text).computations["e"].root.operands == ("a", "a")


def test_parse_comment_is_dropped_from_operands_and_kept_in_text() -> None:
    text = """HloModule comments
ENTRY e {
  a = f32[4] parameter(0)
  ROOT t = (f32[4], /*index=1*/f32[4]) tuple(a, /*index=1*/a), metadata={op_name="b/*c*/d"}
}
"""
    root = parse(text).computations["e"].root
    assert root.operands == ("a", "a")
    assert root.op_name == "b/*c*/d"


def test_parse_instruction_over_several_lines_is_joined() -> None:
    text = """HloModule broken
ENTRY e {
  c = f32[2,2] constant({
    { 1, 2 },
    { 3, 4 }
  })
  ROOT s = f32[2,2] custom-call(c),
    custom_call_target="f(", backend_config="{\\"a\\": \\"}\\"}"
}
"""
    instructions = parse(text).computations["e"].instructions
    assert list(instructions) == ["c", "s"]
    assert instructions["s"].operands == ("c",)


def test_parse_text_without_entry_raises() -> None:
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule m\n\na {\n  ROOT x = f32[] parameter(0)\n}\n")


def test_parse_line_that_is_no_instruction_raises() -> None:
    with pytest.raises(ValueError, match="not an instruction: nonsense"):
        parse("ENTRY e {\n  nonsense\n}\n")


def test_parse_instruction_without_end_raises() -> None:
    with pytest.raises(ValueError, match="never ends"):
        parse("ENTRY e {\n  a = f32[] add(b,\n}\n")


@pytest.mark.parametrize(
    ("dtype", "dims", "size"),
    [
        ("f32", (3, 5), 60),
        ("bf16", (4,), 8),
        ("pred", (7,), 7),
        ("c64", (), 8),
        ("s4", (3,), 2),
        ("f8e4m3fn", (5,), 5),
        ("token", (), 0),
    ],
)
def test_shape_bytes_follow_the_width_of_the_type(dtype: str, dims: tuple[int, ...], size: int) -> None:
    assert Shape(dtype, dims).bytes == size


@pytest.mark.parametrize(
    ("text", "trips"),
    [
        (loop(), 8),
        (loop(start=3), 5),
        (loop(limit=0), 0),
        (loop(step=3), 3),
        (loop(direction="LE"), 9),
        (loop(start=8, limit=0, step=-2, direction="GT"), 4),
        (loop(step=0), None),
        (loop(counter="n"), None),
        (loop(direction="NE"), None),
    ],
)
def test_executions_of_loop_without_annotation_follow_its_counter(text: str, trips: int | None) -> None:
    assert executions(parse(text))["body"].count == trips


CARRIED_LIMIT = """HloModule carried

cond {
  arg = (s32[], s32[]) parameter(0)
  i = s32[] get-tuple-element(arg), index=0
  n = s32[] get-tuple-element(arg), index=1
  ROOT more = pred[] compare(n, i), direction=GT
}

body {
  arg = (s32[], s32[]) parameter(0)
  i = s32[] get-tuple-element(arg), index=0
  n = s32[] get-tuple-element(arg), index=1
  one = s32[] constant(1)
  next = s32[] add(one, i)
  later = s32[] add(n, one)
  ROOT pair = (s32[], s32[]) tuple(next, n)
}

ENTRY e {
  zero = s32[] constant(0)
  seven = s32[] constant(7)
  init = (s32[], s32[]) tuple(zero, seven)
  ROOT loop = (s32[], s32[]) while(init), condition=cond, body=body
}
"""


def test_executions_of_loop_with_carried_limit_need_the_limit_to_stay() -> None:
    assert executions(parse(CARRIED_LIMIT))["body"].count == 7
    assert executions(parse(CARRIED_LIMIT.replace("tuple(next, n)", "tuple(next, later)")))["body"].count is None


def test_executions_of_condition_are_one_more_than_of_body() -> None:
    known = executions(parse(loop()))
    assert known["cond"] == Execution(9, in_loop=True, conditional=False, asynchronous=False)
    assert known["compared"].count == 9
    assert known["main"] == ONCE


def test_executions_of_annotated_loop_use_the_annotation() -> None:
    note = ', backend_config={"known_trip_count":{"n":"5"}}'
    text = loop().replace("condition=%cond, body=%body", "condition=%cond, body=%body" + note)
    assert executions(parse(text))["body"].count == 5
    escaped = ', backend_config="{\\"known_trip_count\\":{\\"n\\":\\"6\\"}}"'
    assert executions(parse(text.replace(note, escaped)))["body"].count == 6


def test_executions_of_nested_scans_multiply_and_agree_without_annotations() -> None:
    def nested(x: jax.Array) -> jax.Array:
        def inner(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(c @ c), None

        def outer(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.scan(inner, c, length=3)[0] + 1, None

        return jax.lax.scan(outer, x, length=5)[0]

    text = text_of(jax.jit(nested).lower(jnp.ones((32, 32))).compile())
    known = executions(parse(text))
    assert {15, 5} <= {execution.count for execution in known.values()}
    # The same counts must be found from the counters alone, as on a TPU.
    assert executions(parse(re.sub(r", backend_config=.*", "", text))) == known


def test_executions_of_loop_until_data_says_so_are_unknown() -> None:
    def until(n: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, s[1] @ s[1]), (0, jnp.ones((4, 4))))[1]

    known = executions(parse(text_of(jax.jit(until).lower(3).compile())))
    assert None in {execution.count for execution in known.values() if execution.in_loop}


def test_executions_of_branch_are_those_of_the_conditional_at_most() -> None:
    text = """HloModule branches

yes {
  ROOT x = f32[4] parameter(0)
}

no {
  a = f32[4] parameter(0)
  ROOT y = f32[4] negate(a)
}

unused {
  ROOT z = f32[4] parameter(0)
}

ENTRY e {
  p = pred[] parameter(0)
  v = f32[4] parameter(1)
  ROOT c = f32[4] conditional(p, v, v), branch_computations={yes, no}
}
"""
    known = executions(parse(text))
    assert known["yes"] == known["no"] == Execution(1, in_loop=False, conditional=True, asynchronous=False)
    assert known["unused"].count == 0


def test_source_of_older_metadata_uses_file_and_line() -> None:
    text = """HloModule old
ENTRY e {
  a = f32[4] parameter(0), metadata={op_name="x"}
  b = f32[4] negate(a)
  ROOT s = f32[4] add(a, b), metadata={op_type="add" op_name="jit(f)/add" source_file="/d/m.py" source_line=7}
}
"""
    module = parse(text)
    instructions = module.computations["e"].instructions
    assert [module.source(instructions[name]) for name in ("a", "b", "s")] == ["x", "", "m.py:7 (jit(f)/add)"]


def test_text_of_text_is_itself() -> None:
    assert text_of("HloModule m") == "HloModule m"
