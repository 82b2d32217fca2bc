"""Instance normalisation, the block, `ITransformer`, and what its analyses need (Sec. 3, 4.2, 4.3)."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxpapers.nn.attention import (
    AttentionFunction,
    LSHSelfAttention,
    flash_attention,
    flow_attention,
    full_attention,
    probsparse_attention,
)
from jaxpapers.nn.dropout import Dropout
from jaxpapers.nn.encoder import LAYER_NORM_EPSILON, EncoderMLP, MultiHeadAttention, gelu
from jaxpapers.nn.initializers import torch_dense
from jaxpapers.nn.norms import torch_batch_norm
from jaxpapers.typing import AnyArray

ATTENTIONS = ("full", "flash", "flow", "probsparse", "lsh")
COMPONENTS = ("attention", "ffn", "none")


class Stats(NamedTuple):
    """What `instance_norm` took out of every sample and variate.

    Attributes:
        mean: over time.
        std: sqrt(biased variance + eps).
    """

    mean: Float[Array, "batch variates"]
    std: Float[Array, "batch variates"]


def instance_norm(
    x: Float[AnyArray, "batch time variates"], eps: float = 1e-5
) -> tuple[Float[Array, "batch time variates"], Stats]:
    """(x - mean) / sqrt(var + eps) over time, per sample and variate, and these two.

    Args:
        x: windows.
        eps: inside the root.
    """
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axis=1)
    centred = x - mean[:, None]
    std = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1) + eps)
    return centred / std[:, None], Stats(mean, std)


def instance_denorm(y: Float[AnyArray, "batch horizon series"], stats: Stats) -> Float[Array, "batch horizon series"]:
    """The inverse, for forecasts of the same variates.

    Raises:
        ValueError: another number of variates than in `stats`.
    """
    if y.shape[-1] != stats.mean.shape[-1]:
        raise ValueError(f"stats are of {stats.mean.shape[-1]} variates, got {y.shape[-1]}")
    return jnp.asarray(y) * stats.std[:, None] + stats.mean[:, None]


def check_window(
    x: Float[AnyArray, "batch time variates"],
    marks: Float[AnyArray, "windows steps covariates"] | None,
    pred_len: int,
) -> None:
    """Refuses what no model of this paper can forecast from.

    Args:
        x: windows.
        marks: calendar covariates of the same steps, or None.
        pred_len: S.

    Raises:
        ValueError: T or S below 1; marks of other windows; NaN in x, where its values are known (outside of jit).
    """
    if pred_len < 1 or x.shape[1] < 1:
        raise ValueError(f"window and pred_len need at least 1 step, got {x.shape[1]} and {pred_len}")
    if marks is not None and marks.shape[:2] != x.shape[:2]:
        raise ValueError(f"marks must have x's batch and time {x.shape[:2]}, got {marks.shape[:2]}")
    if not isinstance(x, jax.core.Tracer) and np.isnan(np.asarray(x)).any():
        raise ValueError("x contains NaN")


def attention_layer(
    attention: str | AttentionFunction, num_heads: int, dropout_rate: float, dtype: DTypeLike | None, name: str
) -> nn.Module:
    """Self-attention by its name, or with any function of `nn.attention`.

    Args:
        attention: one of `ATTENTIONS`, or a function, such as `partial(probsparse_attention, factor=3)`.
        num_heads: they divide the width.
        dropout_rate: of the weights of "full"; the authors' others have no such dropout.
        dtype: of the computation.
        name: of the module.

    Raises:
        ValueError: an unknown name.
    """
    functions: dict[str, AttentionFunction] = {
        "full": partial(full_attention, dropout_rate=dropout_rate),
        "flash": flash_attention,
        "flow": flow_attention,
        "probsparse": probsparse_attention,
    }
    if attention == "lsh":
        return LSHSelfAttention(num_heads, dtype=dtype, name=name)
    if isinstance(attention, str):
        if attention not in functions:
            raise ValueError(f"attention {attention!r} is unknown, expected one of {ATTENTIONS} or a function")
        attention = functions[attention]
    return MultiHeadAttention(num_heads, attention, dtype=dtype, name=name)


class Block(nn.Module):
    """One component along the tokens, then one along the features: x <- norm(x + drop(component(x))), twice.

    With ("attention", "ffn") it is a Transformer's encoder block. The other pairs are the ablations of Table 3:
    "none" leaves the component out with its residual and norm; a feed-forward layer along the tokens and attention
    among the features work on the transposed x. These two have parameters of the number of tokens, for which a model
    with them is made; attention among features maps a feature's values at all tokens to the block's width and back,
    since heads need not divide their number.

    Attributes:
        num_heads: of attention.
        hidden: units of the feed-forward layer.
        tokens: component along the token axis, one of `COMPONENTS`.
        features: component along the feature axis, one of `COMPONENTS`.
        attention: one of `ATTENTIONS`, or a function of `nn.attention`.
        activation: of the feed-forward layer.
        dropout_rate: of both components, inside the feed-forward layer, and of the weights of full attention.
        batch_norm: BatchNorm over batch and tokens in the place of LayerNorm.
        dtype: of the computation; None: that of inputs and parameters.
    """

    num_heads: int
    hidden: int
    tokens: str = "attention"
    features: str = "ffn"
    attention: str | AttentionFunction = "full"
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.0
    batch_norm: bool = False
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], deterministic: bool = True
    ) -> Float[Array, "batch tokens width"]:
        """Applies the block.

        Raises:
            ValueError: an unknown component or attention; heads that do not divide the width.
        """
        for axis, component in (("tokens", self.tokens), ("features", self.features)):
            if component not in COMPONENTS:
                raise ValueError(f"component {component!r} is unknown, expected one of {COMPONENTS}")
            if component == "none":
                continue
            make = self._attention if component == "attention" else self._feed_forward
            branch = make(x, axis, deterministic)
            x = x + Dropout(self.dropout_rate, deterministic)(branch)
            name = f"{axis}_norm"
            if self.batch_norm:
                x = torch_batch_norm(deterministic, dtype=self.dtype, name=name)(x)
            else:
                x = nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name=name)(x)
        return x

    def _attention(self, x: Array, axis: str, deterministic: bool) -> Array:
        attend = attention_layer(self.attention, self.num_heads, self.dropout_rate, self.dtype, axis)
        if axis == "tokens":
            return attend(x, deterministic=deterministic)
        tokens, width = x.shape[1:]
        lifted = torch_dense(width, tokens, dtype=self.dtype, name="lift")(x.swapaxes(1, 2))
        attended = attend(lifted, deterministic=deterministic)
        return torch_dense(tokens, width, dtype=self.dtype, name="lower")(attended).swapaxes(1, 2)

    def _feed_forward(self, x: Array, axis: str, deterministic: bool) -> Array:
        layer = EncoderMLP(self.hidden, self.activation, self.dropout_rate, self.dtype, name=axis)
        return layer(x, deterministic) if axis == "features" else layer(x.swapaxes(1, 2), deterministic).swapaxes(1, 2)


class InvertedEncoder(nn.Module):
    """Blocks on variate tokens, and a LayerNorm behind the last (Sec. 3.2).

    Sows the output of every block as `features` into the collection `intermediates` where it is mutable.

    Attributes:
        num_layers: blocks.
        num_heads: of attention.
        d_ff: hidden units of the feed-forward layers.
        attention: one of `ATTENTIONS`, or a function of `nn.attention`.
        variate: component on the variate axis, one of `COMPONENTS`.
        temporal: component on the temporal axis, one of `COMPONENTS`.
        activation: of the feed-forward layers.
        dropout_rate: see `Block`.
        dtype: of the computation; None: that of inputs and parameters.
    """

    num_layers: int
    num_heads: int
    d_ff: int
    attention: str | AttentionFunction = "full"
    variate: str = "attention"
    temporal: str = "ffn"
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], deterministic: bool = True
    ) -> Float[Array, "batch tokens width"]:
        """Applies the blocks. Raises as `Block`."""
        for layer in range(self.num_layers):
            block = Block(
                self.num_heads,
                self.d_ff,
                self.variate,
                self.temporal,
                self.attention,
                self.activation,
                self.dropout_rate,
                dtype=self.dtype,
                name=f"layers_{layer}",
            )
            x = block(x, deterministic)
            self.sow("intermediates", "features", x)
        return nn.LayerNorm(LAYER_NORM_EPSILON, dtype=self.dtype, name="norm")(x)


class ITransformer(nn.Module):
    """Forecasts all variates at once, each of them a token (Eq. 1).

    Attributes:
        pred_len: S, steps of the forecast.
        d_model: D, width of a token.
        d_ff: hidden units of the feed-forward layers.
        num_layers: blocks.
        num_heads: of attention; they divide d_model.
        attention: one of `ATTENTIONS` (Table 2), or a function of `nn.attention`.
        variate: component on the variate axis, one of `COMPONENTS` (Table 3). With "ffn" here, or "attention" on the
            temporal axis, the parameters depend on the number of tokens (see `Block`).
        temporal: component on the temporal axis, one of `COMPONENTS`.
        use_norm: take mean and standard deviation out of the window and give them back to the forecast.
        activation: of the feed-forward layers.
        dropout_rate: of the embedding and in the blocks.
        dtype: of the computation; None: that of inputs and parameters. Normalisation is in float32 at least.
    """

    pred_len: int
    d_model: int = 512
    d_ff: int = 512
    num_layers: int = 2
    num_heads: int = 8
    attention: str | AttentionFunction = "full"
    variate: str = "attention"
    temporal: str = "ffn"
    use_norm: bool = True
    activation: Callable[[Array], Array] = gelu
    dropout_rate: float = 0.1
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "batch time variates"],
        marks: Float[AnyArray, "windows steps covariates"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "batch horizon variates"]:
        """Forecasts the S steps behind the window.

        Args:
            x: windows.
            marks: calendar covariates of the same steps; they become tokens beside the variates, without instance
                normalisation, and are not forecast.
            deterministic: False: with dropout, from the stream `dropout`.

        Raises:
            ValueError: T or S below 1; marks of other windows; NaN in x, outside of jit; or as `Block`.
        """
        check_window(x, marks, self.pred_len)
        variates, time = x.shape[2], x.shape[1]
        x = jnp.asarray(x)
        if self.use_norm:
            x, stats = instance_norm(x)
        tokens = x if marks is None else jnp.concatenate([x, jnp.asarray(marks, x.dtype)], axis=2)
        h = torch_dense(self.d_model, time, dtype=self.dtype, name="embedding")(tokens.swapaxes(1, 2))
        h = Dropout(self.dropout_rate, deterministic)(h)
        encoder = InvertedEncoder(
            self.num_layers,
            self.num_heads,
            self.d_ff,
            self.attention,
            self.variate,
            self.temporal,
            self.activation,
            self.dropout_rate,
            self.dtype,
            name="encoder",
        )
        h = encoder(h, deterministic)[:, :variates]
        y = torch_dense(self.pred_len, self.d_model, dtype=self.dtype, name="projection")(h).swapaxes(1, 2)
        return instance_denorm(y, stats) if self.use_norm else y


class Analysis(NamedTuple):
    """What happens inside a forecast (Sec. 4.3).

    Attributes:
        forecast: the model's output.
        attention: weights of every layer's heads, rows sum to 1; the first layer's resemble the lagged correlations of
            the window's variates, the last layer's those of the future.
        features: output of every block, for `linear_cka`.
    """

    forecast: Float[Array, "batch horizon variates"]
    attention: Float[Array, "layers batch heads tokens tokens"]
    features: Float[Array, "layers batch tokens width"]


def analyse(
    model: ITransformer,
    params: PyTree,
    x: Float[AnyArray, "batch time variates"],
    marks: Float[AnyArray, "windows steps covariates"] | None = None,
) -> Analysis:
    """A forecast with its attention maps and representations; tokens are the variates, then the covariates.

    Args:
        model: with full or flash attention on the variate axis.
        params: its parameters.
        x: windows.
        marks: calendar covariates.

    Raises:
        ValueError: a model without attention maps, or as the model.
    """
    attention = getattr(model.attention, "func", model.attention)  # what a partial is of
    if attention not in ("full", "flash", full_attention, flash_attention) or model.variate != "attention":
        raise ValueError(
            f"only full and flash attention on the variate axis have maps, got {model.attention!r} as {model.variate!r}"
        )
    forecast, sown = model.apply({"params": params}, x, marks, mutable="intermediates")
    encoder = sown["intermediates"]["encoder"]
    maps = [encoder[f"layers_{i}"]["tokens"]["attention_weights"][0] for i in range(model.num_layers)]
    return Analysis(forecast, jnp.stack(maps), jnp.stack(encoder["features"]))


def random_variate_subset(key: PRNGKeyArray, n: int, m: int) -> Int[Array, "subset"]:
    """Indices of m of the n variates, without replacement, in random order: the variates of one batch (Sec. 4.3).

    Raises:
        ValueError: m below 1 or above n.
    """
    if not 1 <= m <= n:
        raise ValueError(f"a subset of {n} variates has 1 to {n} of them, got {m}")
    return jax.random.permutation(key, n)[:m]


def params_from_torch(state: Mapping[str, Float[AnyArray, "..."]]) -> PyTree:
    """Parameters of `ITransformer` or `VanillaTransformer` from a checkpoint of the authors' code.

    Args:
        state: the state dict of iTransformer, iFlowformer, iFlashformer, iInformer or iReformer, or of the models that
            these invert; of Informer without distilling.

    Raises:
        ValueError: a name that neither model has.
    """
    params: dict[str, Any] = {}
    for name, value in state.items():
        if name.endswith("position_embedding.pe"):  # the table of sines
            continue
        module, _, kind = name.rpartition(".")
        path = _path(module, name)
        leaf = np.asarray(value)
        if kind == "weight":
            kind = "scale" if leaf.ndim == 1 else "kernel"
            leaf = leaf[..., 0] if leaf.shape[2:] == (1,) else leaf  # a 1 x 1 convolution
        node = params
        for part in path:
            node = node.setdefault(part, {})
        node[kind] = jnp.asarray(leaf.T)
    return params


_PREFIXES = {
    "enc_embedding.value_embedding.tokenConv": "encoder.embedding.values",
    "enc_embedding.temporal_embedding.embed": "encoder.embedding.marks",
    "enc_embedding.value_embedding": "embedding",
    "dec_embedding.value_embedding.tokenConv": "decoder.embedding.values",
    "dec_embedding.temporal_embedding.embed": "decoder.embedding.marks",
    "encoder.norm": "encoder.norm",
    "decoder.norm": "decoder.norm",
    "decoder.projection": "decoder.projection",
    "projector": "projection",
    "projection": "projection",
}
_LAYERS = {
    "encoder.attn_layers": {
        r"attention\.(query|key|value|out)_projection": r"tokens.\1",
        r"attention\.attn\.toqk": "tokens.query_key",
        r"attention\.attn\.tov": "tokens.value",
        r"attention\.attn\.to_out": "tokens.out",
        "conv1": "features.up",
        "conv2": "features.down",
        "norm1": "tokens_norm",
        "norm2": "features_norm",
    },
    "decoder.layers": {
        r"(self|cross)_attention\.(query|key|value|out)_projection": r"\1_attention.\2",
        "conv1": "mlp.up",
        "conv2": "mlp.down",
        "norm1": "self_norm",
        "norm2": "cross_norm",
        "norm3": "mlp_norm",
    },
}


def _path(module: str, name: str) -> list[str]:
    if module in _PREFIXES:
        return _PREFIXES[module].split(".")
    for stack, patterns in _LAYERS.items():
        inside = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", module)
        if inside is None:
            continue
        for pattern, ours in patterns.items():
            if found := re.fullmatch(pattern, inside[2]):
                return [stack.split(".")[0], f"layers_{inside[1]}", *found.expand(ours).split(".")]
    raise ValueError(f"{name!r} is no parameter of iTransformer or of the Transformers that it inverts")
