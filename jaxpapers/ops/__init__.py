"""Numerics that several papers share: recurrences, solvers, measures."""
