"""Vision Transformer (Dosovitskiy et al., arXiv 2010.11929): patches as tokens, pre-norm blocks, one vector out.

    encoder = ViTB16()
    z = encoder.apply(encoder.init(key, images), images)

It computes what torchvision's `vit_b_16` does: GELU with erf, LayerNorms with epsilon 1e-6, torch's attention with
biases; and starts as it does but for the MLPs (see `ViT`). The authors' code, in JAX, has the same architecture and
epsilon, but GELU by tanh and the matrices of attention and MLPs Xavier-uniform one by one.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpapers.nn.attention import AttentionFunction, full_attention
from jaxpapers.nn.dense import Dense
from jaxpapers.nn.encoder import EncoderBlock
from jaxpapers.nn.patches import patchify
from jaxpapers.nn.stack import Stack
from jaxpapers.typing import AnyArray

POOLS = ("class", "mean")
LAYER_NORM_EPSILON = 1e-6  # torchvision's ViT and the authors'; other layers of PyTorch have 1e-5


class ViT(nn.Module):
    """Images to one vector each.

    The patches' layer starts as N(0, 1 / inputs) with biases 0, the learned positions as N(0, 0.02^2), the class token
    as 0, the attention as torch.nn.MultiheadAttention: all as in torchvision. The MLPs start as torch.nn.Linear
    (torchvision's: Xavier-uniform, biases N(0, 1e-12)).

    Attributes:
        patch: pixels of a patch's side.
        width: of the tokens, and of the result.
        num_layers: blocks.
        num_heads: of the attention.
        hidden: units of the MLPs.
        pool: "class": the token that is put before the patches; "mean": the mean of the patches' tokens.
        attention: any function of `nn.attention`.
        remat: compute the activations of a block again in the backward pass.
        scan: one block in the program instead of num_layers (see `nn.stack`).
        dtype: of the computation; None: that of inputs and parameters. The result is float32 at least.
    """

    patch: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    pool: str = "class"
    attention: AttentionFunction = full_attention
    remat: bool = False
    scan: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "batch height width channels"]) -> Float[Array, "batch features"]:
        """Features of images.

        Raises:
            ValueError: an unknown pool; patches that do not divide the images, heads that do not divide the width.
        """
        if self.pool not in POOLS:
            raise ValueError(f"pool {self.pool!r} is unknown, expected one of {POOLS}")
        patches = patchify(x, (self.patch, self.patch))
        start = nn.initializers.normal(patches.shape[-1] ** -0.5)
        tokens = Dense(self.width, dtype=self.dtype, kernel_init=start, name="patches")(patches)
        if self.pool == "class":
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width))
            shape = (len(x), 1, self.width)
            tokens = jnp.concatenate([jnp.broadcast_to(token.astype(tokens.dtype), shape), tokens], axis=1)
        positions = self.param("positions", nn.initializers.normal(0.02), tokens.shape[1:])
        options = {
            "num_heads": self.num_heads,
            "hidden": self.hidden,
            "norm": "pre",
            "attention": self.attention,
            "packed": True,
            "dtype": self.dtype,
            "epsilon": LAYER_NORM_EPSILON,
        }
        stack = Stack(EncoderBlock, self.num_layers, options, self.remat, self.scan, name="blocks")
        tokens = stack(tokens + positions.astype(tokens.dtype))
        exact = jnp.promote_types(tokens.dtype, jnp.float32)
        tokens = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=exact, name="norm")(tokens)
        return tokens[:, 0] if self.pool == "class" else jnp.mean(tokens, axis=1)


ViTS16: Callable[..., ViT] = partial(ViT, 16, 384, 12, 6, 1536)
ViTB16: Callable[..., ViT] = partial(ViT, 16, 768, 12, 12, 3072)
