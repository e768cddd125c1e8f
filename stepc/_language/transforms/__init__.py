"""The transforms, one file each. No transform imports another."""
