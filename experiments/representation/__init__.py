"""Experiments with the papers of `jaxpapers.representation`."""
