"""Programs that use stepc as any user does: the public package alone."""
