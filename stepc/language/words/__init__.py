"""The words, one file each. No word imports another."""
