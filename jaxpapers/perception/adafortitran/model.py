"""FortiTran and AdaFortiTran, their parts, and their loss (Sec. III)."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Complex, Float

from jaxpapers.nn.attention import full_attention
from jaxpapers.nn.encoder import EncoderBlock
from jaxpapers.nn.initializers import torch_dense
from jaxpapers.nn.patches import patchify, require_divisible, unpatchify
from jaxpapers.perception.adafortitran.convolution import Convolutions
from jaxpapers.typing import AnyArray

CONDITIONS = ("snr", "delay_spread", "doppler")  # in dB, ns, Hz
# Layers of a step of the scan. Measured on a CPU, where they take half as long again one by one; harmless elsewhere.
UNROLLED = 6


class ConvEnhancer(nn.Module):
    """Four 3x3 convolutions, 1 -> 8 -> 32 -> 8 -> 1 channels, ReLU between them.

    Attributes:
        channels: of the hidden layers.
    """

    channels: Sequence[int] = (8, 32, 8)

    @nn.compact
    def __call__(self, x: Float[AnyArray, "batch K T"]) -> Float[Array, "batch K T"]:
        """Cleans grids."""
        return Convolutions((*self.channels, 1), name="convolutions")(x)[..., 0]


class ChannelAdapter(nn.Module):
    """SNR, delay spread and Doppler shift, each by an MLP of its own, to two numbers for every token.

    Attributes:
        sizes: of the layers; ReLU between them.
        num_tokens: P; the last size is 2 P.
        scale: (means, standard deviations) of the three, by which they are standardised first; None: taken as they
            are, up to 1000, as the authors do.
    """

    sizes: Sequence[int] = (7, 42, 560)
    num_tokens: int = 280
    scale: tuple[Sequence[float], Sequence[float]] | None = None

    @nn.compact
    def __call__(self, conditions: Float[AnyArray, "batch 3"]) -> Float[Array, "batch tokens 6"]:
        """Codes, in the order of the conditions.

        Raises:
            ValueError: another last size.
        """
        if len(self.sizes) < 1 or self.sizes[-1] != 2 * self.num_tokens:
            raise ValueError(
                f"the adapter's last size must be 2 x {self.num_tokens} tokens = {2 * self.num_tokens}, "
                f"got sizes {tuple(self.sizes)}"
            )
        if self.scale is not None:
            mean, deviation = (jnp.asarray(part, jnp.float32) for part in self.scale)
            conditions = (conditions - mean) / deviation
        codes = []
        for index, name in enumerate(CONDITIONS):
            code = jnp.asarray(conditions)[:, index : index + 1]
            for layer, size in enumerate(self.sizes):
                code = nn.relu(code) if layer else code
                code = torch_dense(size, code.shape[-1], name=f"{name}{layer}")(code)
            codes.append(code.reshape(-1, self.num_tokens, 2))
        return jnp.concatenate(codes, axis=-1)


class PatchEncoder(nn.Module):
    """Transformer encoder over patches with learned positions.

    All layers start from the same numbers, as copies of one do in torch.nn.TransformerEncoder.

    Attributes:
        features: outputs of a token.
        width: d.
        num_heads: h.
        num_layers: L.
        max_tokens: rows of the positional table.
        norm: "post" or "pre".
        dropout_rate: of the attention's weights, of both branches and inside the MLP.
        remat: compute a layer's activations again in the backward pass instead of keeping them.
        dtype: of the computation up to the last layer, which has that of the tokens; None: that of inputs and
            parameters.
    """

    features: int
    width: int = 32
    num_heads: int = 4
    num_layers: int = 6
    max_tokens: int = 512
    norm: str = "post"
    dropout_rate: float = 0.1
    remat: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, tokens: Float[AnyArray, "batch tokens inputs"], deterministic: bool = True
    ) -> Float[Array, "batch tokens outputs"]:
        """Encodes.

        Raises:
            ValueError: more tokens than positions; heads that do not divide the width; no layers.
        """
        count, inputs = tokens.shape[1:]
        if count > self.max_tokens:
            raise ValueError(f"{count} tokens need as many positions, max_tokens is {self.max_tokens}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        x = torch_dense(self.width, inputs, dtype=self.dtype, name="embed")(tokens)
        # The authors' trunc_normal_ cuts at 100 standard deviations: a normal.
        positions = self.param("positions", nn.initializers.normal(0.02), (self.max_tokens, self.width))
        x = x + positions[:count].astype(x.dtype)

        def body(block: nn.Module, x: Array) -> tuple[Array, None]:
            return block(x, deterministic), None

        block = nn.remat(EncoderBlock, prevent_cse=False, static_argnums=(2,)) if self.remat else EncoderBlock
        layers = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": False, "dropout": True},
            length=self.num_layers,
            # Without a loop XLA would merge the second computation with the first.
            unroll=1 if self.remat else UNROLLED,
        )
        x, _ = layers(
            block(
                self.num_heads,
                2 * self.width,
                self.norm,
                attention=partial(full_attention, dropout_rate=self.dropout_rate),
                packed=True,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name="layers",
            ),
            x,
        )
        # All digits of float32, on accelerators as well: below -25 dB fewer would be the error.
        return torch_dense(self.features, self.width, precision="highest", name="unembed")(x.astype(tokens.dtype))


def both_parts(network: Callable[[Array], Array], ls: Complex[AnyArray, "batch r c"]) -> Complex[Array, "batch K T"]:
    """network(Re) + i network(Im), in one pass; parts of a slot stay neighbours, on one device."""
    ls = jnp.asarray(ls)
    parts = jnp.stack([ls.real, ls.imag], axis=1)
    out = network(parts.reshape(-1, *ls.shape[1:]))
    out = out.reshape(-1, 2, *out.shape[1:])
    return lax.complex(out[:, 0], out[:, 1])


def require_pilots(ls: Complex[AnyArray, "batch r c"], pilot_shape: tuple[int, int]) -> None:
    """Refuses pilots of another shape.

    Raises:
        ValueError: with both.
    """
    if ls.shape[1:] != tuple(pilot_shape):
        raise ValueError(f"expected pilots of shape {tuple(pilot_shape)}, got {ls.shape[1:]}")


def require_conditions(model: nn.Module, conditions: Float[AnyArray, "batch 3"] | None) -> Float[AnyArray, "batch 3"]:
    """Refuses to go on without conditions.

    Raises:
        ValueError: there are none.
    """
    if conditions is None:
        raise ValueError(f"{type(model).__name__} needs conditions: SNR in dB, delay spread in ns, Doppler shift in Hz")
    return conditions


class FortiTran(nn.Module):
    """The model without the adapter: h^ = F(Re ls) + i F(Im ls) (Sec. III).

    The upsampler belongs to one pattern of pilots: another spacing needs another model.

    Attributes:
        size: (K, T).
        pilot_shape: (r, c).
        patch: subcarriers and symbols of a token.
        width: d of the encoder.
        num_heads: of the encoder.
        num_layers: of the encoder: 1, 3, 6 (the paper's choice) or 12.
        max_tokens: rows of the positional table.
        dropout_rate: of the encoder.
        remat: as of `PatchEncoder`.
        dtype: of the encoder up to its last layer. That one, the upsampler, the CNNs and the sum are in float32, their
            products as well (on TPUs the CNNs' to 1e-6).
    """

    size: tuple[int, int] = (120, 14)
    pilot_shape: tuple[int, int] = (40, 2)
    patch: tuple[int, int] = (3, 2)
    width: int = 32
    num_heads: int = 4
    num_layers: int = 6
    max_tokens: int = 512
    dropout_rate: float = 0.1
    remat: bool = False
    dtype: DTypeLike | None = None

    def setup(self) -> None:
        """Declares the layers."""
        require_divisible(self.size, self.patch)
        inputs = self.pilot_shape[0] * self.pilot_shape[1]
        self.upsampler = torch_dense(self.size[0] * self.size[1], inputs, precision="highest")
        self.enhancer = ConvEnhancer()
        self.encoder = PatchEncoder(
            self.patch[0] * self.patch[1],
            self.width,
            self.num_heads,
            self.num_layers,
            self.max_tokens,
            dropout_rate=self.dropout_rate,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.refiner = ConvEnhancer()

    def __call__(
        self,
        ls: Complex[AnyArray, "batch r c"],
        conditions: Float[AnyArray, "batch 3"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Complex[Array, "batch K T"]:
        """Estimates channels.

        Args:
            ls: least-squares estimates at the pilots.
            conditions: SNR in dB, delay spread in ns, Doppler shift in Hz; of the adaptive model alone.
            deterministic: False: with dropout, from the stream `dropout`.

        Raises:
            ValueError: pilots of another shape; patches that do not fill the grid; more tokens than positions; heads
                that do not divide the width; an adaptive model without conditions.
        """
        require_pilots(ls, self.pilot_shape)
        code = self.code(conditions)

        def network(pilots: Array) -> Array:
            coarse = self.upsampler(pilots.reshape(len(pilots), -1)).reshape(-1, *self.size)
            clean = self.enhancer(coarse)
            tokens = patchify(clean[..., None], self.patch)
            if code is not None:
                tokens = jnp.concatenate([tokens, jnp.repeat(code, 2, axis=0).astype(tokens.dtype)], axis=-1)
            return self.refiner(clean + unpatchify(self.encoder(tokens, deterministic), self.size, self.patch)[..., 0])

        return both_parts(network, ls)

    def code(self, conditions: Float[AnyArray, "batch 3"] | None) -> Float[Array, "batch tokens 6"] | None:
        """What every token has behind its patch: nothing."""
        return None


class AdaFortiTran(FortiTran):
    """FortiTran whose tokens carry the conditions' code behind the patch.

    Attributes:
        adapter_sizes: of the adapter's three MLPs; the last is twice the number of tokens.
        condition_scale: as `scale` of `ChannelAdapter`.
    """

    adapter_sizes: Sequence[int] = (7, 42, 560)
    condition_scale: tuple[Sequence[float], Sequence[float]] | None = None

    def setup(self) -> None:
        """Declares the layers."""
        super().setup()
        tokens = self.size[0] * self.size[1] // (self.patch[0] * self.patch[1])
        self.adapter = ChannelAdapter(self.adapter_sizes, tokens, self.condition_scale)

    def code(self, conditions: Float[AnyArray, "batch 3"] | None) -> Float[Array, "batch tokens 6"] | None:
        """What every token has behind its patch: six numbers of the adapter.

        Raises:
            ValueError: no conditions, or an adapter of another size.
        """
        return self.adapter(require_conditions(self, conditions))


def complex_mse(h: Complex[AnyArray, "*shape"], estimate: Complex[AnyArray, "*shape"]) -> Float[Array, ""]:
    """E|h - h^|^2 over all entries: what is reported."""
    error = jnp.asarray(h) - estimate
    return jnp.mean(jnp.square(error.real) + jnp.square(error.imag))


def estimation_loss(h: Complex[AnyArray, "*shape"], estimate: Complex[AnyArray, "*shape"]) -> Float[Array, ""]:
    """Mean of the squared errors of real and imaginary entries: what is minimised, half of `complex_mse`."""
    return complex_mse(h, estimate) / 2


def to_db(x: Float[AnyArray, "*shape"] | float) -> Float[Array, "*shape"]:
    """10 log10(x); of a mean, never the mean of these."""
    return 10 * jnp.log10(x)
