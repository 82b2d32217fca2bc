"""Normalisations with the constants of the frameworks that the papers' authors used."""

from functools import partial

import flax.linen as nn

# PyTorch's momentum, 0.1, is one minus Flax's.
torch_batch_norm = partial(nn.BatchNorm, momentum=0.9, epsilon=1e-5)
