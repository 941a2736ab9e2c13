"""Counting what a compiled program does: against formulas, and on hand-written TPU text."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jax_klrlhf.plan import hlo
from jax_klrlhf.plan.cost import Cost, cost, trips
from jax_klrlhf.training import mesh as meshes

F32 = 4


def counted(function, *args) -> Cost:
    return cost(hlo.parse(jax.jit(function).lower(*args).compile().as_text()))


def test_a_loop_counts_its_body_as_often_as_it_runs():
    batch, width, layers, rounds = 16, 64, 5, 3

    def program(x, w):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        def turn(_, x):
            return jax.lax.scan(layer, x, w)[0]

        return jax.lax.fori_loop(0, rounds, turn, x)

    x, w = jnp.ones((batch, width)), jnp.ones((layers, width, width))
    once = 2 * batch * width * width
    assert counted(program, x, w).flops == once * layers * rounds
    # XLA's own count of the same program has one body: what this module is for.
    theirs = jax.jit(program).lower(x, w).compile().cost_analysis()
    assert theirs is not None
    assert theirs["flops"] < 1.5 * once

    # The gradient takes two products more of every one, forward included: three.
    gradient = jax.grad(lambda w: program(x, w).sum())
    assert counted(gradient, w).flops == pytest.approx(3 * once * layers * rounds, rel=0.05)


def test_products_of_any_shape_equal_their_formula():
    keys, heads, rows, size = 24, 4, 12, 16
    q, k = jnp.ones((3, heads, rows, size)), jnp.ones((3, heads, keys, size))
    found = counted(lambda q, k: jnp.einsum("bhtd,bhsd->bhts", q, k), q, k)
    assert found.flops == 2 * 3 * heads * rows * keys * size
    found = counted(lambda q, k: jnp.einsum("bhtd,bhsd->ts", q, k), q, k)
    assert found.flops == 2 * 3 * heads * rows * keys * size
    x, y = jnp.ones((3, 5, 7)), jnp.ones((7, 5, 2))
    found = counted(lambda x, y: jnp.einsum("abc,cbd->ad", x, y), x, y)
    assert found.flops == 2 * 3 * 5 * 7 * 2


@pytest.mark.parametrize(
    ("start", "bound", "step", "expected"),
    [(0, 7, 1, 7), (3, 11, 2, 4), (0, 8, 3, 3), (5, 5, 1, 0)],
)
def test_trip_counts_are_read_off_the_condition(start, bound, step, expected):
    """Text as the TPU compiler writes it, which has no trip count beside the loop."""
    text = f"""HloModule m, num_partitions=1

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %p = (s32[], f32[4]{{0:T(128)}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{{0:T(128)}} get-tuple-element(%p), index=1
  %by = s32[] constant({step})
  %next = s32[] add(%i, %by)
  ROOT %t = (s32[], f32[4]{{0:T(128)}}) tuple(%next, %x)
}}

%condition (q: (s32[], f32[4])) -> pred[] {{
  %q = (s32[], f32[4]{{0:T(128)}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %bound = s32[] constant({bound})
  ROOT %lt = pred[] compare(%j, %bound), direction=LT
}}

ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4]{{0:T(128)}} parameter(0)
  %zero = s32[]{{:T(128)}} constant({start})
  %start = s32[] copy(%zero)
  %init = (s32[], f32[4]{{0:T(128)}}) tuple(%start, %a)
  %loop = (s32[], f32[4]{{0:T(128)}}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[4]{{0:T(128)}} get-tuple-element(%loop), index=1
}}
"""
    module = hlo.parse(text)
    entry = module.computations[module.entry]
    assert trips(module, entry, entry["loop"]) == expected


def test_a_loop_that_may_end_early_counts_to_its_bound():
    def program(x):
        def go_on(carry):
            step, x = carry
            return (step < 11) & (x.sum() < 1e6)

        return jax.lax.while_loop(go_on, lambda c: (c[0] + 1, c[1] @ c[1]), (0, x))[1]

    assert counted(program, jnp.ones((8, 8))).flops == 11 * 2 * 8**3


def test_a_loop_goes_on_where_the_one_before_it_left_off():
    """A sampler's caches grow: a loop for each size, with one counter through all of them."""
    sizes = (8, 16, 30)

    def program(x):
        def turn(carry):
            return carry[0] + 1, carry[1] @ carry[1]

        carry = (jnp.int32(1), x)
        for size in sizes:
            go_on = lambda c, size=size: (c[0] < size) & (c[1].sum() < 1e6)  # noqa: E731
            carry = jax.lax.while_loop(go_on, turn, carry)
            carry = (carry[0], jnp.sin(carry[1]))
        return carry[1]

    assert counted(program, jnp.ones((8, 8))).flops == (sizes[-1] - 1) * 2 * 8**3


def test_bytes_read_through_a_nested_view_are_counted():
    text = """HloModule m

%view (q: f32[10,64]) -> f32[640] {
  %q = f32[10,64]{1,0} parameter(0)
  ROOT %flat = f32[640]{0} bitcast(%q)
}

%outer (p: f32[10,64]) -> f32[] {
  %p = f32[10,64]{1,0} parameter(0)
  %inner = f32[640]{0} fusion(%p), kind=kLoop, calls=%view
  ROOT %sum = f32[] negate(%inner)
}

ENTRY %main (a: f32[10,64]) -> f32[] {
  %a = f32[10,64]{1,0} parameter(0)
  ROOT %one = f32[]{:S(1)} fusion(%a), kind=kLoop, calls=%outer
}
"""
    assert cost(hlo.parse(text)).bytes == 640 * F32


def test_of_a_stack_that_is_laid_out_anew_before_it_is_sliced_the_slice_is_read():
    """So the TPU compiler fuses a layer's weights in eight bits into their product."""
    text = """HloModule m

%lay (q: s8[10,64]) -> s8[10,64] {
  %q = s8[10,64]{1,0} parameter(0)
  ROOT %laid = s8[10,64]{0,1} copy(%q)
}

%outer (p: s8[10,64], i: s32[]) -> s8[1,64] {
  %p = s8[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %inner = s8[10,64]{0,1} fusion(%p), kind=kLoop, calls=%lay
  %zero = s32[] constant(0)
  ROOT %row = s8[1,64]{1,0} dynamic-slice(%inner, %i, %zero), dynamic_slice_sizes={1,64}
}

ENTRY %main (a: s8[10,64], n: s32[]) -> s8[1,64] {
  %a = s8[10,64]{1,0} parameter(0)
  %n = s32[]{:S(2)} parameter(1)
  ROOT %one = s8[1,64]{1,0:S(1)} fusion(%a, %n), kind=kLoop, calls=%outer
}
"""
    assert cost(hlo.parse(text)).bytes == 64
    row = "ROOT %row = s8[1,64]{1,0} dynamic-slice(%inner, %i, %zero), dynamic_slice_sizes={1,64}"
    used = text.replace(row, "ROOT %row = s8[1,64]{1,0} negate(%inner)")
    assert cost(hlo.parse(used)).bytes == 640
    handed_on = text.replace("  %inner =", "  ROOT %inner =").replace(f"  {row}\n", "")
    assert cost(hlo.parse(handed_on)).bytes == 640


def test_collectives_by_kind_size_group_and_runs():
    """Eight devices as 4 x 2; each collective inside a loop of five turns."""
    mesh = meshes.make(fsdp=4, tensor=2)

    def body(x, _):
        whole = jax.lax.all_gather(x, "fsdp", tiled=True)
        # Values that differ over devices, or the compiler sees through the collectives.
        mine = whole * (1 + jax.lax.axis_index(("fsdp", "tensor"))).astype(x.dtype)
        part = jax.lax.psum_scatter(mine, "fsdp", tiled=True)
        summed = jax.lax.psum(jnp.cos(part), "tensor")
        turned = jax.lax.ppermute(summed, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        return jnp.sin(turned) + x, None

    def program(x):
        return jax.lax.scan(body, x, None, length=5)[0]

    mapped = jax.shard_map(program, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    found = counted(jax.jit(mapped), jnp.ones((32, 16)))
    by_kind = {one.kind: one for one in found.collectives}
    whole, shard = 32 * 16 * F32, 8 * 16 * F32
    expected = {
        "all-gather": (whole, 4, whole * 3 / 4),
        "reduce-scatter": (whole, 4, whole * 3 / 4),
        "all-reduce": (shard, 2, 2 * shard / 2),
        "collective-permute": (shard, 2, shard),
    }
    assert set(by_kind) == set(expected)
    assert len(found.collectives) == 4
    for kind, (size, group, received) in expected.items():
        one = by_kind[kind]
        assert (one.size, one.group, one.runs, one.received) == (size, group, 5, received), kind
        assert one.elements == size // F32


TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[] parameter(0)
  %y = bf16[] parameter(1)
  ROOT %s = bf16[] add(%x, %y)
}

%start_fusion (p0: bf16[4,8]) -> (bf16[4,8], bf16[32,8]) {
  %p0 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=3, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %pair = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) tuple(%p0, %gather.1)
}

%done_fusion (p1: bf16[4,8], p2: bf16[32,8]) -> bf16[32,8] {
  %p1 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %p2 = bf16[32,8]{1,0:T(8,128)(2,1)} parameter(1)
  %gather.2 = bf16[32,8]{1,0:T(8,128)(2,1)} all-gather(%p1), channel_id=3, \
replica_groups=mesh['axis_0'=8,'axis_1'=1] {'axis_0'}, dimensions={0}
  ROOT %joined = bf16[32,8]{1,0} custom-call(%p1, %p2, %gather.2), \
custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (input: bf16[32,8]) -> bf16[16,8] {
  %input = bf16[32,8]{1,0} parameter(0)
  %sum = bf16[32,8]{1,0} all-reduce(%input), channel_id=5, replica_groups=[4,2]<=[8], \
to_apply=%add
  %where = s32[] constant(0)
  %zero = s32[] constant(0)
  ROOT %shard = bf16[16,8]{1,0} dynamic-slice(%sum, %where, %zero), dynamic_slice_sizes={16,8}
}

ENTRY %main (a: bf16[4,8], b: bf16[8,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %begun = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) fusion(%a), kind=kCustom, calls=%start_fusion
  %own = bf16[4,8]{1,0} get-tuple-element(%begun), index=0
  %buffer = bf16[32,8]{1,0} get-tuple-element(%begun), index=1
  %whole = bf16[32,8]{1,0:T(8,128)(2,1)} fusion(%own, %buffer), kind=kCustom, calls=%done_fusion
  %product = bf16[32,8]{1,0:T(8,128)(2,1)} convolution(%whole, %b), dim_labels=bf_io->bf
  %splash_mha_fwd.1 = bf16[32,8]{1,0} custom-call(%product, %b), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/attention"}
  ROOT %scattered = bf16[16,8]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter.7
}
"""


def test_tpu_text_asynchronous_and_fused_collectives_count_once():
    found = cost(hlo.parse(TPU))
    kinds = {one.kind: one for one in found.collectives}
    assert sorted(one.kind for one in found.collectives) == ["all-gather", "reduce-scatter"]
    assert (kinds["all-gather"].group, kinds["all-gather"].size) == (8, 32 * 8 * 2)
    assert (kinds["reduce-scatter"].group, kinds["reduce-scatter"].size) == (2, 32 * 8 * 2)
    assert found.flops == 2 * 32 * 8 * 8
    assert found.kernels == [("splash_mha_fwd.1", 1)]


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[4,16]<=[64]", 16),
        ("[16,4]<=[4,16]T(1,0)", 4),
        ("{{0,1},{2,3}}", 2),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0'}", 8),
        ("mesh['axis_0'=8,'axis_1'=2] {'axis_0':(1)4,'axis_1'}", 8),
        # As libtpu 0.0.42 writes an fsdp axis of 16 beside a data axis of 4.
        (
            "mesh['axis_0'=1,'axis_1'=16,'axis_2'=1,'axis_3'=4], device_ids=([4,16]T(1,0)) "
            "{'axis_1'}",
            16,
        ),
        ("{}", 64),
        ("as nobody writes them", 64),
    ],
)
def test_tpu_text_groups(groups, size):
    text = f"""HloModule m, num_partitions=64

ENTRY %main (a: bf16[4,8]) -> bf16[64,8] {{
  %a = bf16[4,8]{{1,0}} parameter(0)
  ROOT %g = bf16[64,8]{{1,0}} all-gather(%a), channel_id=3, replica_groups={groups}, \
dimensions={{0}}, use_global_device_ids=true
}}
"""
    found = cost(hlo.parse(text))
    (one,) = found.collectives
    assert one.group == size
    assert found.unread == (
        ["the groups of g: all devices are taken for one"] if "nobody" in groups else []
    )


def test_tpu_text_a_kernel_reads_what_it_declares():
    """A part of a stack, say; one that declares nothing takes in and gives out all."""
    text = """  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %k = f32[32]{0:T(128)} custom-call(%a), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config":{"body":"","cost_estimate":{"flops":"77",\
"transcendentals":"5","bytes_accessed":"99"}}}"""
    found = cost(hlo.parse(line(text)))
    assert (found.bytes, found.flops, found.kernels) == (99, 77, [])
    silent = cost(hlo.parse(line(re.sub(r'"cost_estimate":\{[^}]*\}', '"x":{}', text))))
    assert silent.bytes == 64 * 32 * 2 + 32 * F32
    assert silent.kernels == [("k", 1)]


def line(text: str) -> str:
    return f"""HloModule m

ENTRY %main (a: bf16[1], b: bf16[1]) -> bf16[1] {{
{text}
}}
"""


def test_tpu_text_a_batched_product_is_a_convolution_that_is_mostly_padding():
    """Batch of 6 as a dilated spatial axis, contraction over a window: the TPU compiler's forms."""
    batch, rows, inner, columns = 6, 5, 7, 3
    dilated = line(
        f"""  %a = bf16[{batch},{rows},{inner}]{{2,1,0}} parameter(0)
  %b = bf16[{batch},{inner},{columns}]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{batch},{rows},{columns}]{{2,1,0}} convolution(%a, %b), \
window={{size={batch} stride={batch - 1} lhs_dilate={batch}}}, dim_labels=0bf_0io->0bf"""
    )
    assert cost(hlo.parse(dilated)).flops == 2 * batch * rows * inner * columns
    window = line(
        f"""  %a = bf16[{batch},{inner},{rows}]{{2,1,0}} parameter(0)
  %b = bf16[{batch},{inner},{columns}]{{2,1,0}} parameter(1)
  ROOT %c = bf16[{rows},{columns},1]{{2,1,0}} convolution(%a, %b), window={{size={batch}}}, \
dim_labels=0fb_0io->bf0"""
    )
    assert cost(hlo.parse(window)).flops == 2 * batch * rows * inner * columns


def test_bytes_leave_out_on_chip_memory_and_what_is_not_sliced():
    sliced = """HloModule m

%slicing (p: f32[10,64], i: s32[]) -> f32[64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,64]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,64}
  ROOT %flat = f32[64]{0} bitcast(%row)
}

ENTRY %main (a: f32[10,64], n: s32[]) -> f32[64] {
  %a = f32[10,64]{1,0} parameter(0)
  %n = s32[]{:S(2)} parameter(1)
  %one = f32[64]{0:T(128)S(1)} fusion(%a, %n), kind=kLoop, calls=%slicing
  ROOT %two = f32[64]{0} negate(%one)
}
"""
    # The slice is read (64 floats) into on-chip memory; the negation writes 64 floats.
    assert cost(hlo.parse(sliced)).bytes == 2 * 64 * F32


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("not a program")
