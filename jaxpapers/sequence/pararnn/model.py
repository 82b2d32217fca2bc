"""The language models of the paper's tables and its small models of synthetic tasks (App. C.1; Tables 3, 4, 6)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from jaxpapers.nn.dense import Dense
from jaxpapers.nn.stack import Stack
from jaxpapers.nn.transformer import SwiGLU
from jaxpapers.sequence.pararnn.mixers import (
    CELLS,
    NORM_EPSILON,
    SKIPS,
    AttentionMixer,
    Mamba2Mixer,
    ParaRNNMixer,
    make_cell,
)
from jaxpapers.typing import AnyArray

VOCABULARY = 50_432  # the GPT-NeoX tokenizer's, padded
MIXERS = (*CELLS, "mamba2", "attention")
RECURRENT = ("A", "C")  # the leaves whose size is bounded
DECAYED = ("kernel", "embedding", "B", "up", "gate", "down")  # the leaves with weight decay: matrices, experts' too


def make_mixer(
    mixer: str,
    num_heads: int,
    skip: str,
    options: Mapping[str, Any],
    dtype: DTypeLike | None,
    cache_length: int | None,
) -> nn.Module:
    """A mixer by its name, as a module called "mixer".

    Args:
        mixer: one of `MIXERS`: "gru", "lstm" and "linear" are cells in a `ParaRNNMixer`.
        num_heads: of a cell or of attention; Mamba2's follow from its head_dim.
        skip: "inner" or "outer"; the rivals have no skip but "inner" is accepted.
        options: further arguments of the mixer's class.
        dtype: of the computation.
        cache_length: not None: keep what the mixer remembers between calls.

    Raises:
        ValueError: an unknown mixer or skip; an outer skip without a cell.
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer {mixer!r} is unknown, expected one of {MIXERS}")
    if skip not in SKIPS or (skip == "outer" and mixer not in CELLS):
        raise ValueError(f"skip {skip!r} does not fit {mixer!r}, expected one of {SKIPS}, and 'inner' without a cell")
    shared = {"dtype": dtype, "cache_length": cache_length, "name": "mixer", **options}
    if mixer == "mamba2":
        return Mamba2Mixer(**shared)
    if mixer == "attention":
        return AttentionMixer(num_heads, **shared)
    return ParaRNNMixer(num_heads, cell=mixer, skip=skip, **shared)


class ParaRNNBlock(nn.Module):
    """y = x + Mixer(RMSNorm(x)), then y + SwiGLU(RMSNorm(y)); with skip="outer" the first is scale.x + Mixer(...).

    Attributes:
        num_heads: of the mixer.
        mixer: one of `MIXERS`.
        skip: "inner" or "outer" (see `ParaRNNMixer`).
        feed_forward: makes the layer in the SwiGLU's place, from `dtype` and `name`; None: no such layer, as in Mamba2.
        mixer_options: further arguments of the mixer's class, such as a solver.
        dtype: of the computation; None: that of inputs and parameters.
        cache_length: not None: keep what the mixer remembers between calls.
    """

    num_heads: int
    mixer: str = "gru"
    skip: str = "inner"
    feed_forward: Callable[..., nn.Module] | None = SwiGLU
    mixer_options: Mapping[str, Any] = FrozenDict()
    dtype: DTypeLike | None = None
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        """Applies the block.

        Raises:
            ValueError: see `make_mixer` and the mixers.
        """
        mixer = make_mixer(self.mixer, self.num_heads, self.skip, self.mixer_options, self.dtype, self.cache_length)
        mixed = mixer(nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="mixer_norm")(x))
        if self.skip == "outer":
            x = self.param("skip", nn.initializers.ones, (x.shape[-1],)).astype(x.dtype) * x
        x = x + mixed
        if self.feed_forward is None:
            return x
        mlp = self.feed_forward(dtype=self.dtype, name="mlp")
        return x + mlp(nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="mlp_norm")(x))


class ParaRNNLM(nn.Module):
    """Language model: embedding, blocks, RMSNorm, untied linear head (App. C.1).

    The mixers' Newton residuals are in the collection `diagnostics` where it is mutable (see `newton_residual`), beside
    what the feed-forward layers sow there.

    Attributes:
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of the mixers.
        vocab_size: tokens.
        mixer: one of `MIXERS`: "gru", "lstm" are the paper's, "linear", "mamba2", "attention" the rivals.
        skip: "inner" or "outer" (see `ParaRNNMixer`).
        mixer_options: further arguments of the mixers' class, such as `{"solver": Solver(...)}`.
        feed_forward: makes the layer in the SwiGLU's place, from `dtype` and `name`, such as
            `partial(FeedForward, activation="polynorm")`, or experts; Mamba2 has none.
        dtype: of the computation, such as bfloat16; None: that of the parameters. Logits are float32 at least.
        remat: compute activations again in the backward pass (see `Stack`).
        scan: one program for all layers (see `Stack`).
        cache_length: tokens of a continued sequence (see `decoding`); None: every call is a sequence of its own.
        sharding: of (batch, time, width) between the blocks, and of the logits (see `Stack`).
    """

    width: int
    num_layers: int
    num_heads: int
    vocab_size: int = VOCABULARY
    mixer: str = "gru"
    skip: str = "inner"
    mixer_options: Mapping[str, Any] = FrozenDict()
    feed_forward: Callable[..., nn.Module] = SwiGLU
    dtype: DTypeLike | None = None
    remat: bool = False
    scan: bool = False
    cache_length: int | None = None
    sharding: Sharding | None = None

    @nn.compact
    def __call__(
        self, tokens: Int[AnyArray, "batch time"], last_only: bool = False
    ) -> Float[Array, "batch outputs vocab"]:
        """Logits of the token that follows, at every step or, with `last_only`, after the last one.

        Raises:
            ValueError: see `ParaRNNBlock`.
        """
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="embed")(tokens)
        options = {
            "num_heads": self.num_heads,
            "mixer": self.mixer,
            "skip": self.skip,
            "feed_forward": None if self.mixer == "mamba2" else self.feed_forward,
            "mixer_options": self.mixer_options,
            "dtype": self.dtype,
            "cache_length": self.cache_length,
        }
        stack = Stack(ParaRNNBlock, self.num_layers, options, self.remat, self.scan, self.sharding, name="blocks")
        x = stack(x)
        x = x[:, -1:] if last_only else x
        x = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        logits = Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="head")(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if self.sharding is None else jax.lax.with_sharding_constraint(logits, self.sharding)


class SyntheticModel(nn.Module):
    """The one-layer model of the synthetic tasks: embedding, RMSNorm, mixer, RMSNorm, linear head (Table 6).

    Attributes:
        vocab_size: tokens; the head has as many outputs.
        width: 64 in the paper.
        num_heads: of the mixer, 4 in the paper.
        mixer: one of `MIXERS`.
        bare: the cell alone, without conv, gate and norm (Parity, Keep-nth); the rivals stay what they are.
        max_length: learned positions for this many steps (Keep-nth); None: none.
        skip: "inner" or "outer" (see `ParaRNNMixer`).
        mixer_options: further arguments of the mixer's (or bare cell's) class.
        dtype: of the computation; None: that of the parameters.
    """

    vocab_size: int
    width: int = 64
    num_heads: int = 4
    mixer: str = "gru"
    bare: bool = False
    max_length: int | None = None
    skip: str = "inner"
    mixer_options: Mapping[str, Any] = FrozenDict()
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: Int[AnyArray, "batch time"]) -> Float[Array, "batch time vocab"]:
        """Logits of the answer at every step.

        Raises:
            ValueError: more steps than positions; see `make_mixer`.
        """
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="embed")(tokens)
        if self.max_length is not None:
            if tokens.shape[1] > self.max_length:
                raise ValueError(f"{tokens.shape[1]} steps are more than the {self.max_length} positions")
            positions = self.param("positions", nn.initializers.normal(0.02), (self.max_length, self.width))
            x = x + positions[: tokens.shape[1]].astype(x.dtype)
        x = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="mixer_norm")(x)
        if self.bare and self.mixer in CELLS:
            x = make_cell(self.mixer, self.width, self.num_heads, dtype=self.dtype, **self.mixer_options)(x)
        else:
            mixer = make_mixer(self.mixer, self.num_heads, self.skip, self.mixer_options, self.dtype, None)
            kept = x
            if self.skip == "outer":
                kept = self.param("skip", nn.initializers.ones, (self.width,)).astype(x.dtype) * x
            x = mixer(x) + kept if self.skip == "outer" else mixer(x)
        x = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="norm")(x)
        logits = Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="head")(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class Size(NamedTuple):
    """A model of Tables 3 and 4, and how it was trained.

    Attributes:
        mixer: "gru", "lstm", "mamba2" or "attention".
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of the mixer.
        learning_rate: peak of the cosine with 10% warm-up.
        weight_decay: of AdamW (the card has one number per scale).
        z_loss: its coefficient.
        batch_size: sequences of 2048 tokens.
        steps: of the optimiser.
    """

    mixer: str
    width: int
    num_layers: int
    num_heads: int
    learning_rate: float
    weight_decay: float
    z_loss: float
    batch_size: int
    steps: int


def _sizes() -> dict[str, dict[str, Size]]:
    # width, weight decay, z-loss, sequences, steps; then layers, heads and learning rate of each mixer.
    rows: dict[str, tuple[tuple, dict[str, tuple[int, int, float]]]] = {
        "400M": (
            (1024, 1e-3, 1e-4, 256, 20_000),
            {"gru": (24, 4, 5e-3), "lstm": (24, 4, 3e-3), "mamba2": (48, 32, 5e-3), "attention": (24, 8, 3e-3)},
        ),
        "1B": (
            (2048, 1e-4, 1e-4, 256, 55_000),
            {"gru": (24, 4, 3e-3), "lstm": (24, 4, 3e-3), "mamba2": (48, 64, 5e-3), "attention": (24, 16, 2e-3)},
        ),
        "2.9B": (
            (2560, 1e-4, 1e-4, 512, 55_000),
            {"gru": (32, 2, 2e-3), "lstm": (32, 2, 2e-3), "mamba2": (64, 80, 3e-3), "attention": (32, 32, 3e-3)},
        ),
        "7B": (
            (4096, 1e-4, 5e-6, 2048, 33_000),
            {"gru": (32, 4, 3e-3), "lstm": (32, 4, 3e-3), "mamba2": (64, 128, 3e-3), "attention": (32, 32, 3e-3)},
        ),
    }
    return {
        scale: {
            mixer: Size(mixer, width, layers, heads, rate, decay, z_loss, batch, steps)
            for mixer, (layers, heads, rate) in models.items()
        }
        for scale, ((width, decay, z_loss, batch, steps), models) in rows.items()
    }


SIZES = _sizes()  # SIZES["400M"]["gru"]


def language_model(size: Size, **options: Any) -> ParaRNNLM:
    """The language model of a row of the paper's tables.

    Args:
        size: such as `SIZES["400M"]["gru"]`.
        options: further attributes of `ParaRNNLM`.
    """
    return ParaRNNLM(size.width, size.num_layers, size.num_heads, mixer=size.mixer, **options)


def newton_residual(diagnostics: PyTree[Float[AnyArray, "..."]]) -> Float[Array, ""]:
    """The largest Newton residual of all layers; above 1e-3 the model trained is not the RNN any more.

    Args:
        diagnostics: the collection of that name; what other layers sow there, such as routers, does not count. Without
            cells the residual is 0.

    Use:
        logits, sown = model.apply({"params": params}, tokens, mutable="diagnostics")
        residual = newton_residual(sown.get("diagnostics", {}))
    """
    found = [jnp.max(leaf) for path, leaf in jax.tree.leaves_with_path(diagnostics) if _leaf_name(path) == "residual"]
    return jnp.max(jnp.stack(found)) if found else jnp.zeros(())


def project_recurrent(params: PyTree[Float[AnyArray, "..."]], max_norm: float | int) -> PyTree[Float[Array, "..."]]:
    """Parameters with the recurrent weights (leaves called A and C) clipped to [-max_norm, max_norm] (App. C.1).

    For a diagonal matrix that bounds the spectral norm. It is to follow every optimiser step: clipped in the forward
    pass instead, weights at the bound would have no gradient. The paper takes 0.5 for language, 0.9 for synthetic
    tasks.

    Raises:
        ValueError: max_norm not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")

    def clip(path: tuple, leaf: Array) -> Array:
        return jnp.clip(leaf, -max_norm, max_norm) if _leaf_name(path) in RECURRENT else leaf

    return jax.tree.map_with_path(clip, params)


def weight_decay_mask(params: PyTree) -> PyTree[bool]:
    """True for the leaves that AdamW shall decay: matrices, but no recurrent weights, biases, scales, positions."""
    return jax.tree.map_with_path(lambda path, _: _leaf_name(path) in DECAYED, params)


def _leaf_name(path: tuple) -> str:
    return jax.tree_util.keystr(path[-1:], simple=True)
