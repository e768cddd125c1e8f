"""XLA's flags for the tests: they compile thousands of small programs and run each of them once."""

import os
from importlib.metadata import version

# CPU seconds to compile one small step: 0.39 with the defaults, 0.22 without the MLIR emitters, 0.10 without LLVM's
# optimizations as well, and 0.06 if LLVM gets one module and not 32. Collectives and loops are those that a user gets:
# none of the three turns off the passes over HLO that make them. Machine code is not, and XLA may fuse otherwise, size
# buffers otherwise and round otherwise. `STEPC_XLA_DEFAULTS=1 make test` runs what a user runs; CI does so every night.
# XLA ends a process that sets a flag it does not know. The first one went with jaxlib 0.11.
FAST_COMPILES = (
    ""
    if os.environ.get("STEPC_XLA_DEFAULTS")
    else " ".join(
        (
            *(("--xla_cpu_use_fusion_emitters=false",) if version("jaxlib").startswith("0.10.") else ()),
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
        )
    )
)
