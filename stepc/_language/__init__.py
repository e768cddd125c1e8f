"""What a user writes, and what it means. It knows nothing of the compiler."""
