"""The loop and what stands beside it: it knows a step as something to call."""
