"""Experiments with the papers of `jaxpapers.sequence`."""
