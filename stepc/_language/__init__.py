"""What a user writes: transforms, pipelines, losses, and the reference semantics. It knows no law and no pass."""
