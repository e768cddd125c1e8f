"""From a core program to one XLA program. Its passes never see a transform."""
