"""Assertions and probes for testing your own steps and transforms; `stepc.testing.strategies` needs hypothesis."""

from stepc.testing.assertions import (
    assert_equal_trees,
    assert_equivalent,
    assert_split_invariant,
    assert_within_budget,
)
from stepc.testing.probes import PROBES, probe_batch, probe_params
from stepc.testing.transforms import check_transform

__all__ = [
    "PROBES",
    "assert_equal_trees",
    "assert_equivalent",
    "assert_split_invariant",
    "assert_within_budget",
    "check_transform",
    "probe_batch",
    "probe_params",
]
