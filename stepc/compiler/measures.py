"""What a compiled step has of the promises that only its plan explains; it holds nobody to them."""

from math import prod

import jax
from jax.sharding import Mesh, NamedSharding

from stepc.compiler.breakdown import lying_of
from stepc.compiler.plan import Leaf, Plan
from stepc.inspect.budget import Measure, reductions_of
from stepc.inspect.collectives import Collectives

# Of the state, what a step reduces: its gradient has the shapes of the parameters, and a carry is averaged.
_REDUCED = ("params", "carry")


def gradient_reductions(plan: Plan, executable: jax.stages.Compiled, rows: Collectives) -> Measure:
    """How often each element of the gradient is reduced, over whichever axis of the plan it is most often."""
    axes = tuple({axis: None for one in plan.collectives for axis in one.axes})
    sizes = [
        _elements(leaf, sharding, axes)
        for leaf, sharding in zip(plan.leaves, lying_of(executable, 0), strict=True)
        if sharding is not None and leaf.path.partition("/")[0] in _REDUCED
    ]
    elements = sum(size for size in sizes if size > 1)
    # Along each axis for itself: what is summed in parts is summed along one axis, and then along the others.
    along = [reductions_of(rows, axes=(axis,), elements=max(elements, 1)) for axis in axes]
    unknown = [one for one in along if one.value is None]
    return max(unknown or along, key=lambda one: one.value or 0, default=Measure(0))


def _elements(leaf: Leaf, sharding: jax.sharding.Sharding, axes: tuple[str, ...]) -> int:
    """The elements of a leaf of the gradient before it is reduced: whole along `axes`, split along all others."""
    return prod(leaf.shape) // _parts(sharding, axes)


def _parts(sharding: jax.sharding.Sharding, axes: tuple[str, ...]) -> int:
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return 1
    named = [axis for entry in sharding.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
    return prod(sharding.mesh.shape[axis] for axis in named if axis not in axes)
