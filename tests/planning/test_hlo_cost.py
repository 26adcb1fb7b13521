"""The reader of compiled programs against counts by hand, and against XLA's own where a program has no loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignx_jax import sharding
from alignx_jax.planning import hlo, hlo_cost


def compiled(function, *shapes, mesh=None, specs=()):
    """The compiled function of float32 arrays, which `specs` shard over the mesh."""
    shardings = [NamedSharding(mesh, spec) for spec in specs] or [None] * len(shapes)
    like = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=n) for s, n in zip(shapes, shardings, strict=True)]
    return jax.jit(function).lower(*like).compile()


def cost(function, *shapes, **placed) -> hlo_cost.Cost:
    return hlo_cost.cost(hlo.Module(compiled(function, *shapes, **placed).as_text()))


def test_a_loop_in_a_loop_is_counted_as_often_as_it_runs():
    def nested(x_4x8, w_8x8):
        def inner(x, _):
            return jnp.sin(x @ w_8x8), None

        def outer(x, _):
            return jax.lax.scan(inner, x @ w_8x8, length=5)[0], None

        return jax.lax.scan(outer, x_4x8, length=3)[0]

    program = compiled(nested, (4, 8), (8, 8))
    found = hlo_cost.cost(hlo.Module(program.as_text()))
    assert found.flops == 3 * (1 + 5) * 2 * 4 * 8 * 8 and found.unknown_loops == 0
    assert program.cost_analysis()["flops"] < found.flops / 3, "XLA's own count has each body once"


def test_a_scan_reads_each_slice_of_its_stack_once():
    layers, size = 32, 128

    def scanned(x_8x128, stack_32x128x128):
        return jax.lax.scan(lambda x, w: (x @ w, None), x_8x128, stack_32x128x128)[0]

    stack = layers * size * size * 4
    # Read once, or cut out first and read then; the whole stack in each trip would be 32 times as much.
    assert stack <= cost(scanned, (8, size), (layers, size, size)).hbm_bytes < 4 * stack


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [("ij,jk->ik", (5, 7), (7, 3)), ("bij,bjk->bik", (2, 5, 7), (2, 7, 3)), ("rtd,dnh->rtnh", (2, 3, 8), (8, 4, 5))],
)
def test_products(equation, left, right):
    sizes = dict(zip("".join(equation.split("->")[0].split(",")), (*left, *right), strict=True))
    found = cost(lambda x, y: jnp.einsum(equation, x, y), left, right)
    assert found.flops == 2 * math.prod(sizes.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": [(0, 0)], "window_strides": (1,)},
        {"padding": [(7, 7)], "window_strides": (1,)},
        {"padding": [(2, 1)], "window_strides": (2,)},
        {"padding": [(0, 0)], "window_strides": (7,), "lhs_dilation": (8,)},
        {"padding": [(3, 5)], "window_strides": (1,), "rhs_dilation": (2,)},
        {"padding": [(1, 1)], "window_strides": (1,), "feature_group_count": 2},
    ],
    ids=lambda settings: ",".join(settings),
)
def test_convolutions_the_form_of_products_on_a_tpu(settings):
    """Against XLA's count, which holds nothing else here."""
    groups = settings.get("feature_group_count", 1)
    x, y = jnp.ones((3, 4, 8)), jnp.ones((6, 4 // groups, 8))

    def convolve(x, y):
        return jax.lax.conv_general_dilated(x, y, dimension_numbers=("NCH", "OIH", "NCH"), **settings)

    lowered = jax.jit(convolve).lower(x, y)
    text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
    assert hlo_cost.cost(hlo.Module(text)).flops == lowered.cost_analysis()["flops"]


@pytest.fixture
def mesh():
    return sharding.make_mesh("4x2")


def test_collectives_of_a_loop(mesh):
    """What a device sends of x, [16,32] of float32 on it, in each of three trips."""

    def body(x, _):
        return (
            jax.lax.psum(x, "data")
            + jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), (4, 1))
            + jax.lax.all_gather(x, "model", tiled=True)[:16]
            + jax.lax.all_to_all(x, "data", 0, 1, tiled=True).reshape(16, 32)
            + jax.lax.ppermute(x, "data", [(n, (n + 1) % 4) for n in range(4)])
        ), None

    def loop(x):
        return jax.lax.scan(body, x, length=3)[0]

    mapped = jax.shard_map(
        loop, mesh=mesh, in_specs=P(("data", "model")), out_specs=P(("data", "model")), check_vma=False
    )
    found = cost(mapped, (8 * 16, 32), mesh=mesh, specs=[P(("data", "model"))])
    size = 16 * 32 * 4
    assert {(c.kind, c.group, c.times) for c in found.collectives} == {
        ("all-reduce", 4, 3),
        ("reduce-scatter", 4, 3),
        ("all-gather", 2, 3),
        ("all-to-all", 4, 3),
        ("collective-permute", 2, 3),
    }
    assert found.sent() == {
        "all-gather": 3 * size,  # the other's part, from it
        "reduce-scatter": 3 * size * 3 / 4,
        "all-reduce": 3 * 2 * size * 3 / 4,
        "all-to-all": 3 * size * 3 / 4,
        "collective-permute": 3 * size,
    }


def test_a_matrix_product_over_a_sharded_dimension_is_summed(mesh):
    found = cost(lambda x, y: x @ y, (8, 64), (64, 16), mesh=mesh, specs=[P(None, "data"), P("data", None)])
    assert found.flops == 2 * 8 * 64 * 16 / 4
    assert found.sent() == {"all-reduce": 2 * 8 * 16 * 4 * 3 / 4}


def test_bytes_of_a_program_without_loops_are_those_of_xla():
    def network(x, y, z):
        return jnp.sum(jax.nn.softmax(jnp.sin(x @ y)) @ z, axis=0)

    program = compiled(network, (64, 32), (32, 48), (48, 16))
    found = hlo_cost.cost(hlo.Module(program.as_text()))
    assert found.hbm_bytes == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)


TPU = """HloModule step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%scatter (g: f32[8,16]) -> f32[2,16] {
  %g = f32[8,16]{1,0:T(8,128)} parameter(0)
  %sum.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%g), channel_id=2, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%sum
  %zero = s32[] constant(0)
  ROOT %own = f32[2,16]{1,0:T(8,128)} dynamic-slice(%sum.1, %zero, %zero), dynamic_slice_sizes={2,16}
}

%piece (w: bf16[4,16]) -> bf16[16,16] {
  %w = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (t: (s32[], f32[8,16], bf16[4,16])) -> (s32[], f32[8,16], bf16[4,16]) {
  %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, /*index=2*/bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[8,16]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %y = bf16[4,16]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=2
  %first = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%piece
  %again = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} fusion(%y), kind=kCustom, calls=%piece.2
  %product = f32[8,16]{1,0:T(8,128)} convolution(%x, %again), dim_labels=bf_io->bf
  %own = f32[2,16]{1,0:T(8,128)} fusion(%product), kind=kCustom, calls=%scatter
  %kernel = f32[8,16]{1,0:T(8,128)} custom-call(%product), custom_call_target="tpu_custom_call", COST
  %bare = f32[8,16]{1,0:T(8,128)} custom-call(%kernel), custom_call_target="tpu_custom_call", backend_config={}
  %one = s32[] constant(1)
  %next = s32[]{:T(128)} add(%n, %one)
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) tuple(%next, %bare, %y)
}

%piece.2 (w: bf16[4,16]) -> bf16[16,16] {
  %w = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
}

%end (t: (s32[], f32[8,16], bf16[4,16])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %limit = s32[] constant(7)
  %n = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

ENTRY %main (x: f32[8,16], y: bf16[4,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %y = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(1)
  %start = s32[] constant(2)
  %in = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)(2,1)}) tuple(%start, %x, %y)
  %loop = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}, bf16[4,16]{1,0:T(8,128)}) while(%in), condition=%end, body=%body
  ROOT %result = f32[8,16]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
""".replace("COST", 'backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","transcendentals":"0"}}}')
"""The forms in which libtpu writes a loop, a collective in pieces, a reduce-scatter and a kernel."""


def test_the_forms_of_a_tpu():
    found = hlo_cost.cost(hlo.Module(TPU))
    trips = 7 - 2
    assert found.unknown_loops == 0 and found.kernels_without_estimate == 1
    assert found.flops == trips * (2 * 8 * 16 * 16 + 100)
    gather, scatter = sorted(found.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.operand_bytes, gather.group, gather.times) == ("all-gather", 4 * 16 * 2, 4, trips)
    assert (scatter.kind, scatter.operand_bytes, scatter.group) == ("reduce-scatter", 8 * 16 * 4, 4)
    x, y, own = 8 * 16 * 4, 4 * 16 * 2, 2 * 16 * 4
    # Weights are gathered into vector memory by two fusions, and read once. Product and kernels read and write x; then
    # the counter.
    assert found.hbm_bytes == trips * (y + 2 * x + (x + own) + 2 * x + 2 * x + 3 * 4) + (trips + 1) * (2 * 4 + 1)


def test_a_loop_that_the_compiler_unrolled_counts_by_its_step():
    unrolled = hlo.Module(TPU.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)"))
    assert unrolled.runs["body"] == 3 and unrolled.runs["end"] == 4  # of 2, 4 and 6


def splash(name: str, blocks: int, results: int = 1) -> float:
    """FLOPs of one kernel as libtpu writes it: 3 rows, 4 heads, 2 of keys, 512 tokens a block, head size 32."""
    length = 512 * blocks
    result = ", ".join(["f32[3,4,8,32]"] * results)
    text = f"""HloModule kernel

ENTRY %main () -> f32[] {{
  %map = s8[1,{blocks},{blocks}]{{2,1,0}} parameter(0)
  %query = bf16[3,4,{length},32]{{3,2,1,0}} parameter(1)
  %key = bf16[3,2,{length},32]{{3,2,1,0}} parameter(2)
  ROOT %{name}_x.1 = ({result}) custom-call(%map, %map, %query, %key), custom_call_target="tpu_custom_call", a={{
"more":"{{}}"
}}}}
}}
"""
    found = hlo_cost.cost(hlo.Module(text))
    assert found.kernels_without_estimate == 0
    return found.flops


def test_splash_attention_skips_the_blocks_above_the_diagonal():
    product = 2 * 3 * 4 * 512 * 512 * 32  # of one block
    assert splash("splash_mha_fwd", 1) == 2 * product
    assert splash("splash_mha_dkv", 1, results=5) == 5 * product, "both gradients in one"
    assert splash("splash_mha_fwd", 4) == 2 * 10 * product
    assert splash("splash_mha_dq", 4) + splash("splash_mha_dkv", 4) == 7 * 10 * product


def test_a_loop_whose_end_is_unknown_is_counted_once_and_said():
    def halve(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ jnp.eye(4) / 2, x)

    found = cost(halve, (4, 4))
    assert found.unknown_loops == 1 and found.flops == 2 * 4 * 4 * 4


@pytest.mark.parametrize(
    "form",
    [
        "{{0,1,2,3},{4,5,6,7}}",
        "[2,4]<=[4,2]T(1,0)",
        "mesh['x'=2,'y'=4] {'y'}",
        "mesh['x'=8] {'x':(2)4}",
        "mesh['x'=1,'y'=2,'z'=4], device_ids=([4,2]T(1,0)) {'x','z'}",
    ],
)
def test_replica_groups_of_four(form):
    found = hlo_cost.cost(hlo.Module(TPU.replace("mesh['x'=2,'y'=4] {'y'}", form)))
    assert [c.group for c in found.collectives if c.kind == "reduce-scatter"] == [4]


def test_replica_groups_of_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="replica groups"):
        hlo_cost.cost(hlo.Module(TPU.replace("[2,4]<=[8]", "something")))


def test_sizes_of_arrays():
    text = TPU.replace("f32[8,16]", "s4[8,16]")
    arrays = hlo.Module(text).computations["main"]["in"].arrays
    assert [a.bytes for a in arrays] == [4, 8 * 16 // 2, 4 * 16 * 2] and np.prod(arrays[1].dims) == 128


CUDNN = """HloModule attention

ENTRY %main (q: bf16[24,512,32,128], k: bf16[24,512,8,128]) -> bf16[24,32,512,128] {
  %q = bf16[24,512,32,128]{3,2,1,0} parameter(0)
  %k = bf16[24,512,8,128]{3,2,1,0} parameter(1)
  %fmha = (bf16[24,32,512,128]{3,1,2,0}, f32[24,32,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaScaleBiasSoftmaxNAME", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.088, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["24", "32", "512", "512"], "tuple_shapes": []}, "is_flash_attention": true, "mask_type": "MASK"}}
  ROOT %out = bf16[24,32,512,128]{3,1,2,0} get-tuple-element(%fmha), index=0
}
"""  # noqa: E501


@pytest.mark.parametrize(("name", "products"), [("", 2), ("Backward", 5)])
def test_attention_of_cudnn_skips_the_blocks_above_the_diagonal(name, products):
    def flops(mask: str) -> float:
        found = hlo_cost.cost(hlo.Module(CUDNN.replace("NAME", name).replace("MASK", mask)))
        assert found.kernels_without_estimate == 0
        return found.flops

    product = 2 * 24 * 32 * 512 * 512 * 128
    assert flops("NO_MASK") == products * product
    assert flops("CAUSAL") == products * product * 10 / 16, "of 4 x 4 blocks of 128"


def test_a_kernel_of_cudnn_that_is_not_known_is_counted_as_such():
    assert hlo_cost.cost(hlo.Module(CUDNN.replace("fmhaScaleBiasSoftmaxNAME", "norm"))).kernels_without_estimate == 1


SPREAD = """HloModule gather

%first (p: f32[2,8], q: f32[8,8], s: s32[2]) -> (f32[8,8], f32[2,8], f32[8,8], s32[2]) {
  %p = f32[2,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  %s = s32[2]{0} parameter(2)
  %gathered = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="layer/dot"}
  %product = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %all = (f32[8,8]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, s32[2]{0}) tuple(%product, %p, %gathered, %s)
}

%last (p.1: f32[2,8], s.1: s32[2]) -> f32[8,8] {
  %p.1 = f32[2,8]{1,0} parameter(0)
  %s.1 = s32[2]{0} parameter(1)
  ROOT %gathered.1 = f32[8,8]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}, metadata={op_name="layer/dot"}
}

ENTRY %main (x: f32[2,8], y: f32[8,8], z: s32[2]) -> f32[8,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %y = f32[8,8]{1,0} parameter(1)
  %z = s32[2]{0} parameter(2)
  %one = (f32[8,8]{1,0}, f32[2,8]{1,0}, f32[8,8]{1,0}, s32[2]{0}) fusion(%x, %y, %z), kind=kOutput, calls=%first
  %shard = f32[2,8]{1,0} get-tuple-element(%one), index=1
  %state = s32[2]{0} get-tuple-element(%one), index=3
  ROOT %two = f32[8,8]{1,0} fusion(%shard, %state), kind=kCustom, calls=%last
}
"""  # noqa: E501


def test_a_gather_that_is_spread_over_fusions_moves_its_bytes_once():
    found = hlo_cost.cost(hlo.Module(SPREAD))
    (gather,) = found.collectives
    product = 2 * 8 * 8 * 4  # y in, the product out; it is contracted with itself
    assert found.hbm_bytes == product + (2 * 8 + 8 * 8) * 4 and gather.sent == 3 * 2 * 8 * 4
