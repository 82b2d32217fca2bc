"""The rivals that are trained: CE-ViT, SisRafNet and one dense layer."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from jaxpapers.nn.initializers import torch_dense
from jaxpapers.nn.patches import patchify, require_divisible, unpatchify
from jaxpapers.perception.adafortitran.convolution import Convolutions
from jaxpapers.perception.adafortitran.linear import bilinear_interpolate
from jaxpapers.perception.adafortitran.model import (
    AnyArray,
    ChannelAdapter,
    PatchEncoder,
    both_parts,
    require_conditions,
    require_pilots,
)


class LinearEstimator(nn.Module):
    """The upsampler alone: one dense layer, trained with the same loss.

    Attributes:
        size: (K, T).
        pilot_shape: (r, c).
    """

    size: tuple[int, int] = (120, 14)
    pilot_shape: tuple[int, int] = (40, 2)

    @nn.compact
    def __call__(
        self,
        ls: Complex[AnyArray, "batch r c"],
        conditions: Float[AnyArray, "batch 3"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Complex[Array, "batch K T"]:
        """Estimates channels; conditions and dropout mean nothing to it.

        Raises:
            ValueError: pilots of another shape.
        """
        require_pilots(ls, self.pilot_shape)
        inputs = self.pilot_shape[0] * self.pilot_shape[1]
        dense = torch_dense(self.size[0] * self.size[1], inputs, precision="highest", name="linear")
        return both_parts(lambda pilots: dense(pilots.reshape(len(pilots), -1)).reshape(-1, *self.size), ls)


class CEViT(nn.Module):
    """CE-ViT: one pre-norm encoder layer over patches of the interpolated grid, real and imaginary part side by side.

    Attributes:
        size: (K, T).
        pilot_rows: where the pilots lie.
        pilot_columns: likewise.
        patch: subcarriers and symbols of a token, of the grid (K, 2 T).
        width: of the encoder.
        num_heads: of the encoder.
        dropout_rate: of the encoder.
        dtype: of the encoder up to its last layer.
        condition_scale: as `scale` of `ChannelAdapter`.
    """

    size: tuple[int, int] = (120, 14)
    pilot_rows: Sequence[int] = tuple(range(1, 120, 3))
    pilot_columns: Sequence[int] = (2, 11)
    patch: tuple[int, int] = (10, 4)
    width: int = 128
    num_heads: int = 4
    dropout_rate: float = 0.1
    dtype: DTypeLike | None = None
    condition_scale: tuple[Sequence[float], Sequence[float]] | None = None

    def setup(self) -> None:
        """Declares the layers."""
        K, T = self.size
        require_divisible((K, 2 * T), self.patch)
        entries = self.patch[0] * self.patch[1]
        tokens = 2 * K * T // entries
        self.adapter = ChannelAdapter((2 * tokens,), tokens, self.condition_scale)
        self.encoder = PatchEncoder(
            entries,
            self.width,
            self.num_heads,
            1,
            tokens,
            "pre",
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )

    def __call__(
        self,
        ls: Complex[AnyArray, "batch r c"],
        conditions: Float[AnyArray, "batch 3"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Complex[Array, "batch K T"]:
        """Estimates channels; arguments as of `FortiTran`.

        Raises:
            ValueError: pilots of another shape or outside the grid; no conditions; patches that do not fill the grid.
        """
        require_pilots(ls, (len(self.pilot_rows), len(self.pilot_columns)))
        dense = bilinear_interpolate(ls, self.pilot_rows, self.pilot_columns, *self.size)
        return self.refine(dense, conditions, deterministic=deterministic)

    def refine(
        self,
        dense: Complex[AnyArray, "batch K T"],
        conditions: Float[AnyArray, "batch 3"] | None,
        *,
        deterministic: bool = True,
    ) -> Complex[Array, "batch K T"]:
        """Estimates channels from interpolated ones.

        Raises:
            ValueError: no conditions.
        """
        conditions = require_conditions(self, conditions)
        dense = jnp.asarray(dense)
        tokens = patchify(jnp.concatenate([dense.real, dense.imag], axis=-1)[..., None], self.patch)
        tokens = jnp.concatenate([tokens, self.adapter(conditions).astype(tokens.dtype)], axis=-1)
        K, T = self.size
        both = unpatchify(self.encoder(tokens, deterministic), (K, 2 * T), self.patch)[..., 0]
        return lax.complex(*jnp.split(both, 2, axis=-1))


class BidirectionalGRU(nn.Module):
    """A GRU forwards and one backwards, as torch.nn.GRU has them: r, z, n in this order, a bias on both products.

        h <- (1 - z) n + z h,    n = tanh(W_n x + b_n + r (U_n h + c_n))

    Attributes:
        width: units of each direction.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[AnyArray, "batch time inputs"]) -> Float[Array, "batch time outputs"]:
        """States of both directions, one behind the other."""
        bound = self.width**-0.5

        def init(key: Array, shape: Sequence[int]) -> Array:
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        W = self.param("input_kernel", init, (2, x.shape[-1], 3 * self.width))
        b = self.param("input_bias", init, (2, 3 * self.width))
        U = self.param("state_kernel", init, (2, self.width, 3 * self.width))
        c = self.param("state_bias", init, (2, 3 * self.width))
        x = jnp.asarray(x)
        projected = jnp.einsum("dbti,dio->tdbo", jnp.stack([x, x[:, ::-1]]), W) + b[:, None]

        def step(h: Array, inputs: Array) -> tuple[Array, Array]:
            products = jnp.einsum("dbi,dio->dbo", h, U) + c[:, None]
            (r, z, n), (r_h, z_h, n_h) = (jnp.split(part, 3, axis=-1) for part in (inputs, products))
            r, z = nn.sigmoid(r + r_h), nn.sigmoid(z + z_h)
            h = (1 - z) * jnp.tanh(n + r * n_h) + z * h
            return h, h

        start = jnp.zeros((2, len(x), self.width), projected.dtype)
        forwards, backwards = jnp.moveaxis(lax.scan(step, start, projected)[1], 0, 2)
        return jnp.concatenate([forwards, backwards[:, ::-1]], axis=-1)


class SisRafNet(nn.Module):
    """SisRafNet: convolutions on the pilots, bidirectional GRUs over frequency, a dense layer to the rows of a pilot.

    The paper's sizes were not found; these are of the same order as FortiTran's.

    Attributes:
        size: (K, T); K is a multiple of the pilot rows.
        pilot_shape: (r, c).
        channels: of the two convolutions.
        width: of the two GRUs, of each direction.
    """

    size: tuple[int, int] = (120, 14)
    pilot_shape: tuple[int, int] = (40, 2)
    channels: int = 16
    width: int = 64

    @nn.compact
    def __call__(
        self,
        ls: Complex[AnyArray, "batch r c"],
        conditions: Float[AnyArray, "batch 3"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Complex[Array, "batch K T"]:
        """Estimates channels; conditions and dropout mean nothing to it.

        Raises:
            ValueError: pilots of another shape, or rows that do not divide the subcarriers.
        """
        (K, T), (r, _) = self.size, self.pilot_shape
        require_pilots(ls, self.pilot_shape)
        if K % r:
            raise ValueError(f"{r} pilot rows do not divide {K} subcarriers")
        convolutions = Convolutions((self.channels, self.channels), name="convolutions")
        recurrences = [BidirectionalGRU(self.width, name=f"gru{index}") for index in range(2)]
        dense = torch_dense(K // r * T, 2 * self.width, precision="highest", name="dense")

        def network(pilots: Array) -> Array:
            x = nn.relu(convolutions(pilots)).reshape(len(pilots), r, -1)
            for recurrence in recurrences:
                x = recurrence(x)
            return dense(x).reshape(-1, K, T)

        return both_parts(network, ls)
