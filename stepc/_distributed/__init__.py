"""Several processes as one job: how they start, find each other, share short texts and fail together.

Nothing here knows a step, a batch or a checkpoint; `_compiler.multihost` and `_runner.multihost` build on it.
"""
