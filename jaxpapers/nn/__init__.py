"""Layers and initialisers that several papers share."""
