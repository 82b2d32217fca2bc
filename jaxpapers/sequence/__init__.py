"""Sequence models: recurrences, dynamical systems, forecasting."""
