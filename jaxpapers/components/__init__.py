"""Components: activations, layers and quantisers that other models are built from."""
