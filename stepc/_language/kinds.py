"""The three kinds of value that flow between transforms, and the names of the trees in annotations."""

from collections.abc import Mapping
from enum import Enum
from typing import Any, TypeAlias

# Any: these are the user's own pytrees. stepc checks their leaves and never names their type.
Params: TypeAlias = Any  # parameters: floating-point leaves
Grads: TypeAlias = Any  # gradients: the tree and shapes of the parameters
Batch: TypeAlias = Any  # a batch: every leaf has the same number of rows on axis 0
BatchRows: TypeAlias = Any  # some rows of a batch: the same tree
Metrics: TypeAlias = dict[str, Any]  # arrays by name
HostMetrics: TypeAlias = Mapping[str, Any]  # on the host: floats, and arrays of numpy where they are no scalars


class Kind(Enum):
    """What a transform takes from its right, or gives to its left."""

    LOSS = "loss"
    GRADIENT = "gradient"
    STEP = "step"

    def __str__(self) -> str:
        return f"a {self.value}"
