"""XLA's flags for the tests: they compile thousands of small programs and run each of them once."""

# CPU seconds to compile one small step: 0.39 with the defaults, 0.22 without the MLIR emitters, 0.10 without LLVM's
# optimizations as well, and 0.06 if LLVM gets one module and not 32. None of the three touches the passes over HLO, so
# collectives, fusions and buffers are those that a user gets. What XLA_FLAGS says already wins:
# `XLA_FLAGS="--xla_cpu_use_fusion_emitters=true --xla_backend_optimization_level=3" make test` runs the users' code.
FAST_COMPILES = " ".join(
    (
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
