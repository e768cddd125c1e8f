"""What a warm step costs the interpreter, counted: a time would depend on the load of the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# How many calls of Python functions a step may make. Python 3.11 counts more than 3.12, which calls no function for
# a comprehension.
MOST = {
    "call": 18,
    "call on a mesh of one device": 23,
    "call on a mesh of two devices": 28,
    "run": 58,
    "run with all": 65,
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    script = Path(__file__).with_name("overhead.py")
    ended = subprocess.run([sys.executable, script], env=os.environ | flags, stdout=subprocess.PIPE, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MOST)
def test_warm_step_makes_few_calls(counted: dict[str, dict[str, float]], name: str) -> None:
    calls = counted[name]
    assert 0 < sum(calls.values()) <= MOST[name], calls
