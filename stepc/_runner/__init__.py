"""`run` and what stands beside its loop: data, policies, checkpoints, loggers. It knows a step as something to call."""
