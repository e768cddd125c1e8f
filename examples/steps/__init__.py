"""Training steps of many kinds, each in a file of its own that runs: `python -m examples.steps.qlora`."""
