"""Experiments with the papers of `jaxpapers.perception`."""
