"""Convolutional encoder and decoder of the flow experiments (cylinder, dam)."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from jaxpapers.nn.initializers import torch_default_bias_init, torch_dense
from jaxpapers.typing import AnyArray

DROPOUT = 0.1


def _conv(features: int, width: int, inputs: int, name: str, transposed: bool = False) -> nn.Conv:
    # A transposed convolution of stride 1 is a convolution with the kernel mirrored: only PyTorch's fan_in, which
    # counts the outputs there, tells them apart.
    init = torch_default_bias_init(width**2 * (features if transposed else inputs))
    return nn.Conv(features, (width, width), kernel_init=init, bias_init=init, name=name)


def upsample(x: Float[AnyArray, "*batch height width channels"]) -> Float[Array, "*batch height2 width2 channels"]:
    """Doubles height and width by linear interpolation that keeps the corners (PyTorch's align_corners=True)."""

    def weights(size: int) -> np.ndarray:
        place = np.linspace(0, size - 1, 2 * size)
        return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(size))).astype(x.dtype)

    rows, columns = weights(x.shape[-3]), weights(x.shape[-2])
    return jnp.einsum("ih,jw,...hwc->...ijc", rows, columns, x, precision="highest")


class ConvEncoder(nn.Module):
    """Five convolutions (7, 5, 3, 3, 3 wide; 16 to 256 channels), four halvings, one dense layer.

    Dropout is on where the caller gives a "dropout" key.

    Attributes:
        latent_dim: d.
    """

    latent_dim: int = 512

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch height width channels"]) -> Float[Array, "*batch dim"]:
        """Latents of fields.

        Raises:
            ValueError: a height or width that four halvings do not divide.
        """
        *batch, height, width, _ = x.shape
        if height % 16 or width % 16 or not height * width:
            raise ValueError(f"height and width must be positive multiples of 16, got {height} and {width}")
        x = jnp.asarray(x)
        for index, (features, size) in enumerate(((16, 7), (32, 5), (64, 3), (128, 3))):
            x = _conv(features, size, x.shape[-1], f"conv{index}")(x)
            # The authors pool before or after the ReLU, not the same in every layer.
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2)) if index == 1 else nn.relu(nn.avg_pool(x, (2, 2), (2, 2)))
        x = nn.relu(_conv(256, 3, x.shape[-1], "conv4")(x))
        x = nn.Dropout(DROPOUT, deterministic=not self.has_rng("dropout"))(x)
        x = x.reshape(*batch, -1)
        return torch_dense(self.latent_dim, x.shape[-1], name="latent")(x)


class ConvDecoder(nn.Module):
    """Mirror of `ConvEncoder`, bilinear doublings between stride-1 transposed convolutions, then three 1x1 ones.

    Dropout is on where the caller gives a "dropout" key.

    Attributes:
        shape: (height, width, channels) of the field.
    """

    shape: tuple[int, int, int] = (64, 64, 2)

    @nn.compact
    def __call__(self, z: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch height width channels"]:
        """Fields of latents.

        Raises:
            ValueError: a height or width that is not 16 times an integer.
        """
        height, width, channels = self.shape
        if height % 16 or width % 16 or not height * width:
            raise ValueError(f"height and width must be positive multiples of 16, got {height} and {width}")
        small = (height // 16, width // 16, 256)
        x = nn.relu(torch_dense(int(np.prod(small)), z.shape[-1], name="expand")(z))
        x = nn.Dropout(DROPOUT, deterministic=not self.has_rng("dropout"))(x).reshape(*z.shape[:-1], *small)
        x = nn.relu(_conv(128, 3, 256, "up0", transposed=True)(x))
        for index, (features, size) in enumerate(((64, 3), (32, 3), (16, 5), (channels, 7)), 1):
            x = _conv(features, size, x.shape[-1], f"up{index}", transposed=True)(upsample(x))
            if index < 4:
                x = nn.relu(x)
        x = nn.relu(_conv(64, 1, channels, "mix0")(x))
        x = nn.relu(_conv(32, 1, 64, "mix1")(x))
        return _conv(channels, 1, 32, "mix2")(x)
