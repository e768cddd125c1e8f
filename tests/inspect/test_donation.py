"""Which arguments are overwritten, read from headers of our own and from a donated program."""

import jax
import jax.numpy as jnp

from stepc.inspect import aliases


def test_aliases_of_two_results_give_flat_positions_and_donors() -> None:
    text = """HloModule m, input_output_alias={ {0}: (2, {}, may-alias), {1}: (0, {}, must-alias) }, \
buffer_donor={ (1, {}) }, num_partitions=8
ENTRY e {
  ROOT a = f32[4] parameter(0)
}
"""
    found = aliases(text)
    assert dict(found) == {2: 0, 0: 1}
    assert found.donors == (1,)


def test_aliases_of_tupled_arguments_use_the_position_in_the_tuple() -> None:
    text = """HloModule m, input_output_alias={ {0}: (0, {5}, may-alias) }
ENTRY e {
  ROOT a = f32[4] parameter(0)
}
"""
    assert dict(aliases(text)) == {5: 0}


def test_aliases_of_compiled_program_name_the_donated_argument() -> None:
    def second(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
        return c + 1

    arrays = (jnp.ones(3), jnp.ones(4), jnp.ones(5))
    compiled = jax.jit(second, donate_argnums=2, keep_unused=True).lower(*arrays).compile()
    assert dict(aliases(compiled)) == {2: 0}
    assert dict(aliases(jax.jit(second).lower(*arrays).compile())) == {}
