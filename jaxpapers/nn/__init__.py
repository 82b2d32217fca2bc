"""Layers, initialisers and losses that several papers share.

Map of the room:

- `attention`: full, flash, causal, flow, ProbSparse and LSH attention, as functions of queries, keys and values.
- `dense`: dense layers as plain products of two matrices, which CPUs are faster with.
- `encoder`: a Transformer as PyTorch has it: attention with biases, encoder and decoder blocks, sinusoidal positions.
- `transformer`: a decoder-only Transformer: rotary positions, causal attention with a cache, SwiGLU.
- `vit`, `patches`: vision transformers; grids as patches and back.
- `resnet`: ResNets as torchvision has them.
- `moe`: tokens to experts, none dropped.
- `stack`: many equal blocks: remat, scan over the layers, placement on a mesh.
- `dropout`: with half the random words.
- `norms`: BatchNorm with PyTorch's constants.
- `initializers`: PyTorch's.
- `language`: the loss of the next token, in chunks where the logits are large.
- `losses`: cross-entropy with label smoothing, InfoNCE.

This file imports none of them.
"""
