"""Experiments with the papers of `jaxpapers.components`."""
