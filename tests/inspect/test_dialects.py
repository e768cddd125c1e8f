"""Collectives of texts of our own, in the dialects of GPU and TPU; XLA's parser accepts all of them."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from stepc.inspect import collectives
from stepc.inspect.collectives import axes_of, groups
from stepc.inspect.hlo import parse


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))


GROUPS = """HloModule m, num_partitions=8
ENTRY e {
  a = f32[8] parameter(0)
  ROOT r = f32[8] all-reduce(a), channel_id=1, GROUPS, use_global_device_ids=true, to_apply=add
}
"""
EVEN = ((0, 2, 4, 6), (1, 3, 5, 7))
ALL = ((0, 1, 2, 3, 4, 5, 6, 7),)


@pytest.mark.parametrize(
    ("written", "expected", "axes"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", EVEN, ("data",)),
        ("replica_groups={}", ALL, ("data", "model")),
        ("replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}", tuple((i,) for i in range(8)), ()),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", EVEN, ("data",)),
        ("replica_groups=[1,8]<=[8]", ALL, ("data", "model")),
        ("replica_groups=[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7)), ("model",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", EVEN, ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", ALL, ("data", "model")),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", EVEN, ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", EVEN, ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7)), ("data",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7)), ("data",)),
    ],
)
def test_groups_in_every_spelling_give_devices_and_axes(
    written: str, expected: tuple[tuple[int, ...], ...], axes: tuple[str, ...]
) -> None:
    module = parse(GROUPS.replace("GROUPS", written))
    found = groups(module, module.computations["e"].root)
    assert found == expected
    assert axes_of(found, mesh()) == axes


def test_groups_of_unknown_spelling_raise() -> None:
    module = parse(GROUPS.replace("GROUPS", "replica_groups=torus(2,4)"))
    with pytest.raises(ValueError, match="unknown form"):
        groups(module, module.computations["e"].root)


def test_axes_of_device_outside_the_mesh_raises() -> None:
    with pytest.raises(ValueError, match="uses device 8"):
        axes_of(((0, 8),), mesh())


GPU = """HloModule gpu, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (q: f32[16]) -> f32[2] {
  %q = f32[16]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%q), channel_id=4, replica_groups={}, dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[16], b: bf16[4]) -> f32[2] {
  %a = f32[16]{0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %ar = (f32[16]{0}, bf16[4]{0}) all-reduce-start(%a, %b), \
replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %ar.done = (f32[16]{0}, bf16[4]{0}) all-reduce-done(%ar)
  %ag = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%b), replica_groups=[1,8]<=[8], dimensions={0}
  %ag.done = bf16[32]{0} all-gather-done(%ag)
  %cp = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%a), \
source_target_pairs={{0,2},{2,0}}, backend_config={"collective_backend_config":{"is_sync":true}}
  %cp.done = f32[16]{0} collective-permute-done(%cp)
  %rs.start = ((f32[16]{0}), f32[2]{0}, s32[]) async-start(%a), calls=%wrapped, async_execution_thread="main"
  %rs.update = ((f32[16]{0}), f32[2]{0}, s32[]) async-update(%rs.start), calls=%wrapped
  ROOT %rs.done = f32[2]{0} async-done(%rs.update), calls=%wrapped
}
"""


def test_collectives_of_gpu_text_count_start_and_done_once() -> None:
    rows = collectives(GPU, mesh())
    assert [(row.kind, row.bytes, row.axes, row.executions, row.asynchronous) for row in rows] == [
        ("reduce-scatter", 64, ("data", "model"), 1, True),
        ("all-reduce", 72, ("model",), 1, True),
        ("all-gather", 64, ("data", "model"), 1, True),
        ("collective-permute", 64, ("data",), 1, False),
    ]


def test_collectives_of_sugared_async_text_read_the_start_itself() -> None:
    sugared = GPU.replace(
        'async-start(%a), calls=%wrapped, async_execution_thread="main"',
        "reduce-scatter-start(%a), replica_groups={}, dimensions={0}, to_apply=%add",
    )
    sugared = sugared.replace("async-update(%rs.start), calls=%wrapped", "reduce-scatter-update(%rs.start)")
    sugared = sugared.replace("async-done(%rs.update), calls=%wrapped", "reduce-scatter-done(%rs.update)")
    unused, *_, row = collectives(sugared, mesh())
    assert unused.executions == 0
    assert (row.kind, row.bytes, row.executions, row.asynchronous) == ("reduce-scatter", 64, 1, True)


TPU = """HloModule tpu, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start_computation (s: f32[16,128]) -> (f32[16,128], u32[]) {
  %s = f32[16,128]{1,0:T(8,128)S(1)} parameter(0)
  %ar.1 = f32[16,128]{1,0:T(8,128)S(1)} all-reduce(%s), channel_id=7, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %flag.1 = u32[]{:T(128)S(2)} constant(0)
  ROOT %out.1 = (f32[16,128]{1,0:T(8,128)S(1)}, u32[]{:T(128)S(2)}) tuple(%ar.1, %flag.1)
}

%async_collective_fusion.3 (t: f32[16,128], u: u32[]) -> f32[16,128] {
  %t = f32[16,128]{1,0:T(8,128)} parameter(0)
  %u = u32[]{:T(128)S(2)} parameter(1)
  ROOT %ar.2 = f32[16,128]{1,0:T(8,128)} all-reduce(%t), channel_id=7, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%done_computation (v: f32[16,128]) -> f32[16,128] {
  %v = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %ar.3 = f32[16,128]{1,0:T(8,128)} all-reduce(%v), channel_id=7, \
replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%all-reduce-scatter.3 (w: f32[16,128]) -> f32[8,128] {
  %w = f32[16,128]{1,0:T(8,128)} parameter(0)
  %ar.4 = f32[16,128]{1,0:T(8,128)} all-reduce(%w), replica_groups=[4,2]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[8,128]{1,0:T(8,128)} dynamic-slice(%ar.4, %zero, %zero), dynamic_slice_sizes={8,128}
}

%offloaded (z: bf16[16,128]) -> bf16[16,128] {
  %z = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ar.5 = bf16[16,128]{1,0:T(8,128)(2,1)} all-reduce(%z), replica_groups={}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (a: f32[16,128], b: bf16[16,128]) -> f32[8,128] {
  %a = f32[16,128]{1,0:T(8,128)} parameter(0)
  %b = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %async-collective-start = (f32[16,128]{1,0:T(8,128)S(1)}, u32[]{:T(128)S(2)}) \
fusion(%a), kind=kCustom, calls=%start_computation
  %g.0 = f32[16,128]{1,0:T(8,128)S(1)} get-tuple-element(%async-collective-start), index=0
  %g.1 = u32[]{:T(128)S(2)} get-tuple-element(%async-collective-start), index=1
  %fusion.9 = f32[16,128]{1,0:T(8,128)} fusion(%g.0, %g.1), kind=kOutput, calls=%async_collective_fusion.3
  %async-collective-done = f32[16,128]{1,0:T(8,128)} fusion(%fusion.9), kind=kCustom, calls=%done_computation
  %call-start = ((bf16[16,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)}) \
call-start(%b), async_execution_thread="sparsecore", to_apply=%offloaded
  %call-done = bf16[16,128]{1,0:T(8,128)(2,1)} call-done(%call-start)
  ROOT %fusion.3 = f32[8,128]{1,0:T(8,128)} \
fusion(%async-collective-done), kind=kCustom, calls=%all-reduce-scatter.3
}
"""


def test_collectives_of_tpu_text_count_asynchronous_fusions_once() -> None:
    rows = collectives(TPU, mesh())
    assert [(row.kind, row.bytes, row.axes, row.executions, row.asynchronous) for row in rows] == [
        ("all-reduce", 8192, ("data", "model"), 1, True),
        ("reduce-scatter", 8192, ("model",), 1, False),
        ("all-reduce", 4096, ("data", "model"), 1, True),
    ]
