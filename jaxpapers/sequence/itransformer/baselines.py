"""What iTransformer is compared with: the Transformer of time tokens, DLinear, RLinear, PatchTST (Tables 1 and 2)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray

from jaxpapers.nn.attention import AttentionFunction, full_attention, probsparse_attention
from jaxpapers.nn.dropout import Dropout
from jaxpapers.nn.encoder import LAYER_NORM_EPSILON, DecoderBlock, gelu, sinusoidal_positions
from jaxpapers.nn.initializers import torch_default_bias_init, torch_default_kernel_init, torch_dense
from jaxpapers.nn.norms import torch_batch_norm
from jaxpapers.sequence.itransformer.model import (
    Block,
    check_window,
    instance_denorm,
    instance_norm,
)
from jaxpapers.typing import AnyArray


def fold_variates(x: Float[AnyArray, "batch time variates"]) -> Float[Array, "series time"]:
    """Every variate a sample of its own, those of a sample side by side: how channel-independent models see x."""
    return jnp.moveaxis(jnp.asarray(x), 2, 1).reshape(-1, x.shape[1])


def unfold_variates(y: Float[AnyArray, "series horizon"], variates: int) -> Float[Array, "batch horizon variates"]:
    """The inverse of `fold_variates`."""
    return jnp.asarray(y).reshape(-1, variates, y.shape[-1]).swapaxes(1, 2)


class TimeEmbedding(nn.Module):
    """Tokens of time steps: a circular convolution over the variates + sinusoidal positions + a map of the calendar.

    Attributes:
        width: of the tokens.
        dropout_rate: of the sum.
        dtype: of the computation; None: that of inputs and parameters.
    """

    width: int
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time variates"],
        marks: Float[AnyArray, "batch time covariates"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch time width"]:
        """Embeds."""
        conv = nn.Conv(
            self.width,
            (3,),
            padding="CIRCULAR",
            use_bias=False,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),  # Kaiming's
            dtype=self.dtype,
            name="values",
        )
        h = conv(x)
        h = h + sinusoidal_positions(x.shape[1], self.width).astype(h.dtype)
        if marks is not None:
            dense = torch_dense(self.width, marks.shape[-1], use_bias=False, dtype=self.dtype, name="marks")
            h = h + dense(jnp.asarray(marks))
        return Dropout(self.dropout_rate, deterministic)(h)


class Distil(nn.Module):
    """Half as many tokens: convolution over three of them, BatchNorm, ELU, maximum of three (Informer, Eq. 5).

    The authors' code for iTransformer pads its circular convolution by two on each side, which gives one token more;
    this one pads by one, as the paper's does.

    Attributes:
        dtype: of the computation; None: that of inputs and parameters.
    """

    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], deterministic: bool = True
    ) -> Float[Array, "batch half width"]:
        """Applies the layer."""
        width = x.shape[-1]
        conv = nn.Conv(
            width,
            (3,),
            padding="CIRCULAR",
            kernel_init=torch_default_kernel_init,
            bias_init=torch_default_bias_init(3 * width),
            dtype=self.dtype,
            name="conv",
        )
        x = conv(x)
        x = nn.elu(torch_batch_norm(deterministic, dtype=self.dtype, name="norm")(x))
        return nn.max_pool(x, (3,), (2,), ((1, 1),))


class TimeEncoder(nn.Module):
    """Encoder on time tokens: embedding, blocks, LayerNorm. Attributes as of `VanillaTransformer`."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    attention: str | AttentionFunction = "full"
    distil: bool = False
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time variates"],
        marks: Float[AnyArray, "batch time covariates"] | None,
        deterministic: bool = True,
    ) -> Float[Array, "batch tokens width"]:
        """Tokens of the window, fewer than its steps with distilling."""
        h = TimeEmbedding(self.d_model, self.dropout_rate, self.dtype, name="embedding")(x, marks, deterministic)
        for layer in range(self.num_layers):
            if layer and self.distil:
                h = Distil(self.dtype, name=f"distil_{layer - 1}")(h, deterministic)
            block = Block(
                self.num_heads,
                self.d_ff,
                attention=self.attention,
                activation=self.activation,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layers_{layer}",
            )
            h = block(h, deterministic)
        return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(h)


class TimeDecoder(nn.Module):
    """Decoder on time tokens: embedding, causal and cross-attention, LayerNorm, a map to the variates.

    Attributes as of `VanillaTransformer`, and the factor of ProbSparse attention, for both kinds; None: full attention.
    """

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    probsparse_factor: int | None = None
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch time variates"],
        marks: Float[AnyArray, "batch time covariates"] | None,
        memory: Float[Array, "batch tokens width"],
        deterministic: bool = True,
    ) -> Float[Array, "batch time variates"]:
        """Values at all steps of x, known and to come.

        Args:
            x: known steps, then zeros.
            marks: calendar covariates of all of them.
            memory: the encoder's tokens.
            deterministic: False: with dropout.
        """
        attention: AttentionFunction = partial(full_attention, dropout_rate=self.dropout_rate)
        if self.probsparse_factor is not None:
            attention = partial(probsparse_attention, factor=self.probsparse_factor)
        h = TimeEmbedding(self.d_model, self.dropout_rate, self.dtype, name="embedding")(x, marks, deterministic)
        for layer in range(self.num_layers):
            block = DecoderBlock(
                self.num_heads,
                self.d_ff,
                self.activation,
                attention,
                self.dropout_rate,
                self.dtype,
                name=f"layers_{layer}",
            )
            h = block(h, memory, deterministic)
        h = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(h)
        return torch_dense(x.shape[-1], self.d_model, dtype=self.dtype, name="projection")(h)


class VanillaTransformer(nn.Module):
    """The Transformers of time tokens that are inverted (Table 2, "Original").

    An encoder on the window and a decoder that sees the last known steps and zeros in the place of those to come. The
    name of the attention chooses the authors' model:

    full, flow, flash    Transformer, Flowformer, Flashformer: the encoder's attention; that of the decoder is full
    probsparse           Informer (with `distil`): ProbSparse attention in the decoder, too
    lsh                  Reformer: no decoder; the encoder sees the zeros behind the window, and a map of its tokens is
                         the forecast

    Attributes:
        pred_len: S, steps of the forecast.
        d_model: D, width of a token.
        d_ff: hidden units of the feed-forward layers.
        num_layers: blocks of the encoder.
        num_decoder_layers: blocks of the decoder, where there is one.
        num_heads: of attention; they divide d_model.
        label_len: known steps that the decoder sees.
        attention: one of `ATTENTIONS`, see above, or a function of `nn.attention` for the encoder.
        factor: of ProbSparse attention.
        distil: halve the tokens between the encoder's blocks (with BatchNorm: variables `batch_stats`); not with "lsh".
        use_norm: take mean and standard deviation out of the window and give them back to the forecast.
        channel_independent: forecast every variate alone, by the same parameters.
        activation: of the feed-forward layers.
        dropout_rate: of embeddings, branches, feed-forward layers and the weights of full attention.
        dtype: of the computation; None: that of inputs and parameters.
    """

    pred_len: int
    d_model: int = 512
    d_ff: int = 512
    num_layers: int = 2
    num_decoder_layers: int = 1
    num_heads: int = 8
    label_len: int = 48
    attention: str | AttentionFunction = "full"
    factor: int = 1
    distil: bool = False
    use_norm: bool = False
    channel_independent: bool = False
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "batch time variates"],
        marks: Float[AnyArray, "windows steps covariates"] | None = None,
        future_marks: Float[AnyArray, "windows ahead covariates"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch horizon variates"]:
        """Forecasts the S steps behind the window.

        Args:
            x: windows.
            marks: calendar covariates of the same steps.
            future_marks: those of the S steps to come; with `marks`, or neither.
            deterministic: False: with dropout, from the stream `dropout`.

        Raises:
            ValueError: T or S below 1; marks of other windows, or of one side alone; a label_len that the window has
                not; `distil` with "lsh"; NaN in x, outside of jit; or as `Block`.
        """
        check_window(x, marks, self.pred_len)
        if not 0 <= self.label_len <= x.shape[1]:
            raise ValueError(f"label_len must be between 0 and the window's {x.shape[1]} steps, got {self.label_len}")
        if self.distil and self.attention == "lsh":
            raise ValueError("distil leaves no token for each step to come, which attention 'lsh' needs")
        ahead = (x.shape[0], self.pred_len)
        if (marks is None) != (future_marks is None) or (future_marks is not None and future_marks.shape[:2] != ahead):
            raise ValueError(f"marks and future_marks go together, the latter of batch and time {ahead}")
        variates = x.shape[2]
        x = jnp.asarray(x)
        if self.use_norm:
            x, stats = instance_norm(x)
        if self.channel_independent:
            x = fold_variates(x)[..., None]
            marks, future_marks = (
                None if each is None else jnp.repeat(jnp.asarray(each), variates, axis=0)
                for each in (marks, future_marks)
            )
        sizes: dict[str, Any] = {
            "d_model": self.d_model,
            "d_ff": self.d_ff,
            "num_heads": self.num_heads,
            "dtype": self.dtype,
        }
        sizes |= {"activation": self.activation, "dropout_rate": self.dropout_rate}
        probsparse = self.attention == "probsparse"
        attention = partial(probsparse_attention, factor=self.factor) if probsparse else self.attention
        encoder = TimeEncoder(
            num_layers=self.num_layers, attention=attention, distil=self.distil, name="encoder", **sizes
        )
        # What is known at the end of the window, and zeros.
        known = x.shape[1] if self.attention == "lsh" else self.label_len
        shown = jnp.pad(x[:, x.shape[1] - known :], ((0, 0), (0, self.pred_len), (0, 0)))
        calendar = None
        if marks is not None:
            past = jnp.asarray(marks)[:, marks.shape[1] - known :]
            calendar = jnp.concatenate([past, jnp.asarray(future_marks)], axis=1)
        if self.attention == "lsh":
            h = encoder(shown, calendar, deterministic)
            y = torch_dense(x.shape[2], self.d_model, dtype=self.dtype, name="projection")(h)
        else:
            memory = encoder(x, marks, deterministic)
            factor = self.factor if probsparse else None
            decoder = TimeDecoder(num_layers=self.num_decoder_layers, probsparse_factor=factor, name="decoder", **sizes)
            y = decoder(shown, calendar, memory, deterministic)
        y = y[:, known:]
        if self.channel_independent:
            y = unfold_variates(y[..., 0], variates)
        return instance_denorm(y, stats) if self.use_norm else y


def moving_average(x: Float[AnyArray, "batch time variates"], kernel: int) -> Float[Array, "batch time variates"]:
    """Mean over `kernel` steps around each, the first and last step repeated beyond the ends.

    Raises:
        ValueError: an even kernel, or one below 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
    side = kernel // 2
    return nn.avg_pool(jnp.pad(jnp.asarray(x), ((0, 0), (side, side), (0, 0)), mode="edge"), (kernel,))


class DLinear(nn.Module):
    """Two linear maps in time, shared by all variates: of the moving average and of the rest (arXiv 2205.13504).

    Attributes:
        pred_len: S, steps of the forecast.
        kernel: steps of the moving average; odd.
    """

    pred_len: int
    kernel: int = 25

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "batch time variates"],
        marks: Float[AnyArray, "windows steps covariates"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch horizon variates"]:
        """Forecasts the S steps behind the window; covariates are not used.

        Raises:
            ValueError: an even kernel; T or S below 1; marks of other windows; NaN in x, outside of jit.
        """
        check_window(x, marks, self.pred_len)
        time = x.shape[1]
        trend = moving_average(x, self.kernel)
        mean = partial(torch_dense, self.pred_len, time, kernel_init=nn.initializers.constant(1 / time))
        y = mean(name="trend")(trend.swapaxes(1, 2)) + mean(name="remainder")((x - trend).swapaxes(1, 2))
        return y.swapaxes(1, 2)


class RLinear(nn.Module):
    """Instance normalisation around one linear map in time, shared by all variates (arXiv 2305.10721).

    Attributes:
        pred_len: S, steps of the forecast.
    """

    pred_len: int

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "batch time variates"],
        marks: Float[AnyArray, "windows steps covariates"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch horizon variates"]:
        """Forecasts the S steps behind the window; covariates are not used.

        Raises:
            ValueError: T or S below 1; marks of other windows; NaN in x, outside of jit.
        """
        check_window(x, marks, self.pred_len)
        x, stats = instance_norm(x)
        y = torch_dense(self.pred_len, x.shape[1], name="projection")(x.swapaxes(1, 2)).swapaxes(1, 2)
        return instance_denorm(y, stats)


class PatchTST(nn.Module):
    """A Transformer on patches of one variate at a time (arXiv 2211.14730), with BatchNorm: variables `batch_stats`.

    Attributes:
        pred_len: S, steps of the forecast.
        patch_len: steps of a patch.
        stride: from patch to patch; the last step is repeated as often, so that the last patch is not lost.
        d_model: D, width of a token.
        d_ff: hidden units of the feed-forward layers.
        num_layers: blocks.
        num_heads: of attention; they divide d_model.
        dropout_rate: of the embedding, branches and feed-forward layers.
        dtype: of the computation; None: that of inputs and parameters.
    """

    pred_len: int
    patch_len: int = 16
    stride: int = 8
    d_model: int = 128
    d_ff: int = 256
    num_layers: int = 3
    num_heads: int = 16
    dropout_rate: float = 0.2
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "batch time variates"],
        marks: Float[AnyArray, "windows steps covariates"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch horizon variates"]:
        """Forecasts the S steps behind the window; covariates are not used.

        Raises:
            ValueError: a patch longer than window and stride; T or S below 1; marks of other windows; NaN in x, outside
                of jit; or as `Block`.
        """
        check_window(x, marks, self.pred_len)
        x, stats = instance_norm(x)
        h = patches(fold_variates(x), self.patch_len, self.stride)
        h = torch_dense(self.d_model, self.patch_len, dtype=self.dtype, name="embedding")(h)
        h = h + self.param("positions", _positions, h.shape[1:]).astype(h.dtype)
        h = Dropout(self.dropout_rate, deterministic)(h)
        for layer in range(self.num_layers):
            block = Block(
                self.num_heads,
                self.d_ff,
                attention=full_attention,  # no dropout of its weights
                dropout_rate=self.dropout_rate,
                batch_norm=True,
                dtype=self.dtype,
                name=f"layers_{layer}",
            )
            h = block(h, deterministic)
        h = h.reshape(h.shape[0], -1)
        y = torch_dense(self.pred_len, h.shape[-1], dtype=self.dtype, name="projection")(h)
        return instance_denorm(unfold_variates(y, x.shape[2]), stats)


def patches(x: Float[AnyArray, "series time"], patch_len: int, stride: int) -> Float[Array, "series patches patch_len"]:
    """Overlapping pieces of series that go on with their last value for `stride` steps (PatchTST, Sec. 3.1).

    Raises:
        ValueError: patch_len or stride below 1, or a patch longer than time + stride.
    """
    steps = x.shape[1] + stride
    if stride < 1 or not 1 <= patch_len <= steps:
        raise ValueError(f"needs stride >= 1 and 1 <= patch_len <= {steps} = time + stride, got {stride}, {patch_len}")
    starts = np.arange(0, steps - patch_len + 1, stride)
    return jnp.pad(jnp.asarray(x), ((0, 0), (0, stride)), mode="edge")[:, starts[:, None] + np.arange(patch_len)]


def _positions(key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, shape, minval=-0.02, maxval=0.02)
