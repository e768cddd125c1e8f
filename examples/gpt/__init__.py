"""A byte-level GPT learns the source of Python's standard library: `python -m examples.gpt`."""
