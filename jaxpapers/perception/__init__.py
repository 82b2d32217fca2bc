"""Perception: images, radio channels, shapes."""
