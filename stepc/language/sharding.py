"""Rules of `shard`: where the parts of a batch lie, and where parameters and optimizer state lie."""

from dataclasses import dataclass

from stepc.language.fields import axis_name


@dataclass(frozen=True)
class DataParallel:
    """Rows along one mesh axis; parameters and optimizer state whole on every device of it."""

    axis: str

    def __post_init__(self) -> None:
        axis_name("dp", "axis", self.axis)

    def __repr__(self) -> str:
        return f'dp("{self.axis}")'


def dp(axis: str) -> DataParallel:
    """Data parallelism: each device of a mesh axis computes its own rows.

    Meaning: rows [j B/n, (j + 1) B/n) belong to device j of the n devices along `axis`.
    Why: n devices share the rows of a batch; parameters are replicated, so one reduction a step is all they say
      to each other.

    Args:
      axis: the name of a mesh axis. The batch size must be a multiple of its size.
    Errors: FieldTypeError, FieldValueError for a bad name; ShardingError at `compile` if the mesh has no such axis.
    Example:
      >>> dp("data")
      dp("data")

    Source: ours; the layout is that of `jax.sharding.NamedSharding(mesh, PartitionSpec(axis))`.
    """
    return DataParallel(axis)
