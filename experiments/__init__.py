"""Experiments: one file per paper, in the same rooms as the library."""
