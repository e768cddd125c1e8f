"""What users get to test their own steps and transforms. `stepc.testing.strategies` needs hypothesis, so it is apart."""

from stepc.testing.assertions import assert_equal_trees as assert_equal_trees
from stepc.testing.assertions import assert_equivalent as assert_equivalent
from stepc.testing.assertions import assert_within_budget as assert_within_budget
from stepc.testing.house import check_transform as check_transform
from stepc.testing.probes import PROBES as PROBES
from stepc.testing.probes import probe_batch as probe_batch
from stepc.testing.probes import probe_params as probe_params
