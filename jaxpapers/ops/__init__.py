"""Numerics that several papers share: recurrences, solvers, measures.

Map of the room:

- `scan`: affine recurrences, step by step or in parallel over time.
- `newton`: nonlinear recurrences, all steps at once.
- `fused`: nonlinear recurrences of independent channels in one pass over memory: Pallas kernels.
- `dsr_metrics`: does a free run have the attractor, the spectrum, the exponents of a dynamical system?
- `search`: the nearest vectors, exactly, over a mesh as well; measures of what is found; nearest class means.
- `similarity`: unit vectors, linear CKA of representations, effective rank.
- `checks`: refusals of labels and sizes out of range.

This file imports none of them.
"""
