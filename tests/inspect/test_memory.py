"""Memory and flops of programs for which both can be worked out by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from stepc.inspect import Cost, Memory, cost, memory

TYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])


def compiled(f: Callable[..., jax.Array], *shapes: tuple[int, ...], dtype: type = jnp.float32) -> jax.stages.Compiled:
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)).compile()


def test_memory_of_donated_update_aliases_the_donated_bytes() -> None:
    def update(params: jax.Array, grads: jax.Array) -> jax.Array:
        return params - grads

    vector = jax.ShapeDtypeStruct((1000,), jnp.float32)
    kept = memory(jax.jit(update).lower(vector, vector).compile())
    donated = memory(jax.jit(update, donate_argnums=0).lower(vector, vector).compile())
    assert (kept.arguments, kept.outputs, kept.aliased) == (8000, 4000, 0)
    assert (donated.arguments, donated.outputs, donated.aliased) == (8000, 4000, 4000)
    assert kept.total - donated.total == 4000


def test_memory_prints_each_part_and_the_total() -> None:
    shown = str(Memory(arguments=8000, outputs=4000, aliased=4000, temporaries=126_800_000, code=0))
    assert shown == (
        "arguments       8.0 kB\n"
        "outputs         4.0 kB\n"
        "aliased        -4.0 kB\n"
        "temporaries   126.8 MB\n"
        "code               0 B\n"
        "total         126.8 MB"
    )


@TYPES
@pytest.mark.parametrize("size", [4, 32, 256])
def test_cost_of_matrix_product_is_two_flops_a_term(size: int, dtype: type) -> None:
    program = compiled(lambda a, b: jnp.tanh(a @ b), (size, size), (size, size), dtype=dtype)
    assert (cost(program).flops, cost(program).uncounted) == (2 * size**3, ())


@TYPES
def test_cost_of_batched_product_counts_each_member(dtype: type) -> None:
    program = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (3, 8, 16), (3, 16, 32), dtype=dtype)
    assert cost(program).flops == 2 * 3 * 8 * 16 * 32


def test_cost_of_matrix_times_vector_is_two_flops_a_term() -> None:
    assert cost(compiled(lambda a, b: a @ b, (64, 32), (32,))).flops == 2 * 64 * 32


def test_cost_of_nested_scans_multiplies_their_lengths() -> None:
    def layers(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=3)[0]

    def steps(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (layers(w, c) + 1, None), x, length=5)[0]

    assert cost(compiled(steps, (32, 32), (16, 32))).flops == 15 * 2 * 16 * 32 * 32


def test_cost_of_product_in_loop_of_unknown_length_is_unknown() -> None:
    def until(w: jax.Array) -> jax.Array:
        return lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w @ w, w)

    assert cost(compiled(until, (16, 16))).flops is None


def test_cost_of_loop_without_products_is_zero_whatever_its_length() -> None:
    assert cost(compiled(lambda w: lax.while_loop(lambda w: w[0] < 9, lambda w: w + 1, w), (16,))).flops == 0


def convolve(images: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, (stride, stride), "SAME", feature_group_count=groups)


def test_cost_of_convolution_leaves_out_the_padding() -> None:
    program = compiled(lambda a, b: convolve(a, b, 1, 1), (2, 3, 16, 16), (8, 3, 3, 3))
    # Along one axis 16 outputs meet 3 inputs each, but for one at either end: 46 pairs.
    assert cost(program).flops == 2 * 2 * 8 * 3 * 46**2


def test_cost_of_strided_grouped_convolution_gradient_agrees_with_xla() -> None:
    def loss(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return convolve(images, kernel, 2, 2).sum()

    program = compiled(jax.grad(loss), (2, 4, 16, 16), (8, 2, 3, 3))
    reported = program.cost_analysis()
    assert reported is not None
    assert cost(program).flops == reported["flops"]  # nothing but the convolution has flops here


TPU_PRODUCTS = """HloModule products
ENTRY %main (a: bf16[8,16], b: bf16[16,32], c: bf16[4,8,16], d: bf16[4,16,32]) -> bf16[4,8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %c = bf16[4,8,16]{2,1,0} parameter(2)
  %d = bf16[4,16,32]{2,1,0} parameter(3)
  %plain = f32[8,32]{1,0:T(8,128)} convolution(%a, %b), dim_labels=bf_io->bf
  ROOT %batched = bf16[4,8,32]{2,1,0} convolution(%c, %d), window={size=4 pad=0_0 stride=3 lhs_dilate=4}, \
dim_labels=0bf_0io->0bf
}
"""


def test_cost_of_tpu_products_written_as_convolutions_is_that_of_the_products() -> None:
    assert cost(TPU_PRODUCTS).flops == 2 * 8 * 16 * 32 + 2 * 4 * 8 * 16 * 32


GPU_PRODUCT = """HloModule product
ENTRY %main (a: bf16[8,16], b: bf16[16,32]) -> bf16[8,32] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %gemm = (bf16[8,32]{1,0}, s8[1024]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %product = bf16[8,32]{1,0} get-tuple-element(%gemm), index=0
  ROOT %mine = bf16[8,32]{1,0} custom-call(%product), custom_call_target="mine"
}
"""


def test_cost_of_gpu_library_call_is_counted_and_unknown_calls_are_named() -> None:
    product, mine = 2 * (8 * 16 + 16 * 32 + 8 * 32) + 1024, 2 * 2 * 8 * 32
    assert cost(GPU_PRODUCT) == Cost(2 * 8 * 16 * 32, product + mine, ("mine",))
