"""The language models: dense (1.3B) and mixture of experts (1B active of 7B), which differ in the block's second half.

Pre-norm blocks with RMSNorm, rotary positions, no biases, an untied head.
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxpapers.components.polycom.feed_forward import GATED, FeedForward, matched_hidden, small_init
from jaxpapers.components.polycom.moe import MoEFeedForward
from jaxpapers.nn.dense import Dense
from jaxpapers.nn.stack import Stack
from jaxpapers.nn.transformer import NORM_EPSILON, CausalSelfAttention
from jaxpapers.typing import AnyArray, Initializer

truncated_init = nn.initializers.truncated_normal(0.02, lower=-3.0, upper=3.0)  # OLMoE's, of every matrix
COEFFICIENTS = ("coeffs", "slope")


class TransformerBlock(nn.Module):
    """x <- x + attention(RMSNorm(x)); x <- x + FFN(RMSNorm(x)).

    Attributes:
        num_heads: of the attention.
        feed_forward: makes the second half from `dtype` and `name`.
        qk_norm: as of `CausalSelfAttention`.
        kernel_init: of query, key and value.
        out_init: of the attention's output projection.
        dtype: of the computation; None: that of inputs and parameters.
        attention_chunk: queries at once (see `causal_attention`).
    """

    num_heads: int
    feed_forward: Callable[..., nn.Module]
    qk_norm: bool
    kernel_init: Initializer
    out_init: Initializer
    dtype: DTypeLike | None = None
    attention_chunk: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch time width"]:
        """Applies the block; a mask goes to the second half."""
        attention = CausalSelfAttention(
            self.num_heads,
            dtype=self.dtype,
            qk_norm=self.qk_norm,
            chunk=self.attention_chunk,
            kernel_init=self.kernel_init,
            out_init=self.out_init,
            name="attention",
        )
        x = x + attention(nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="attention_norm")(x))
        y = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype, name="mlp_norm")(x)
        mlp = self.feed_forward(dtype=self.dtype, name="mlp")
        return x + (mlp(y) if mask is None else mlp(y, mask))


class TransformerLM(nn.Module):
    """Language model: embedding, blocks, RMSNorm, untied linear head.

    `logits(states(tokens))` is the model; with `chunked_language_loss` between them the logits are never whole:

        variables = {"params": params}
        states = model.apply(variables, tokens[:, :-1], method="states")
        head = partial(model.apply, variables, method="logits")
        loss, terms = chunked_language_loss(head, states, tokens[:, 1:], chunk=512)

    Attributes:
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of the attention.
        hidden: units of an ungated feed-forward block (of an expert); a gated one gets `matched_hidden` of it.
        vocab_size: tokens.
        activation: one of `ACTIVATIONS`.
        order: of the learned ones.
        num_experts: 0: dense; otherwise every block is a `MoEFeedForward` of so many.
        top_k: experts a token.
        qk_norm: RMSNorm of queries and keys.
        kernel_init: of all matrices but output projections; None: `small_init`, N(0, 2 / (5 width)).
        out_init: of output projections; None: `kernel_init`'s, with `small_init` divided by sqrt(2 num_layers).
        dtype: of the computation, such as bfloat16; None: that of the parameters. Logits are float32 at least.
        block: rows of a block of experts (see `grouped_dot`).
        mesh: None, or where the batch is split over the axis `data` (see `MoEFeedForward` for the experts).
        attention_chunk: queries at once (see `causal_attention`).
        remat: compute activations again in the backward pass (see `Stack`).
        scan: one program for all layers (see `Stack`).
    """

    width: int
    num_layers: int
    num_heads: int
    hidden: int
    vocab_size: int
    activation: str = "polynorm"
    order: int = 3
    num_experts: int = 0
    top_k: int = 0
    qk_norm: bool = False
    kernel_init: Initializer | None = None
    out_init: Initializer | None = None
    dtype: DTypeLike | None = None
    block: int = 1
    mesh: Mesh | None = None
    attention_chunk: int | None = None
    remat: bool = False
    scan: bool = False

    def setup(self) -> None:
        """Makes the layers.

        Raises:
            ValueError: units that have no gated match.
        """
        kernel_init = self.kernel_init or small_init(self.width)
        out_init = self.out_init or self.kernel_init or _scaled(kernel_init, 1 / math.sqrt(2 * self.num_layers))
        make: Callable[..., nn.Module] = FeedForward
        if self.num_experts:
            make = partial(MoEFeedForward, num_experts=self.num_experts, top_k=self.top_k, block=self.block)
            make = partial(make, mesh=self.mesh)
        feed_forward = partial(
            make,
            hidden=matched_hidden(self.hidden) if self.activation in GATED else self.hidden,
            activation=self.activation,
            order=self.order,
            kernel_init=kernel_init,
            out_init=out_init,
        )
        options = {
            "num_heads": self.num_heads,
            "feed_forward": feed_forward,
            "qk_norm": self.qk_norm,
            "kernel_init": kernel_init,
            "out_init": out_init,
            "dtype": self.dtype,
            "attention_chunk": self.attention_chunk,
        }
        self.embed = nn.Embed(self.vocab_size, self.width, embedding_init=kernel_init, dtype=self.dtype)
        placed = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec("data"))
        self.blocks = Stack(TransformerBlock, self.num_layers, options, self.remat, self.scan, placed)
        self.norm = nn.RMSNorm(NORM_EPSILON, dtype=self.dtype)
        self.head = Dense(self.vocab_size, use_bias=False, kernel_init=kernel_init, dtype=self.dtype)

    def __call__(
        self, tokens: Int[AnyArray, "batch time"], mask: Bool[AnyArray, "batch time"] | None = None
    ) -> Float[Array, "batch time vocab"]:
        """Logits of the token that follows, at every step.

        Args:
            tokens: inputs.
            mask: False for padding behind a sequence's end: it is not routed to experts. A dense model has no need of
                it: attention is causal.

        Raises:
            ValueError: see `CausalSelfAttention`, `FeedForward` and `MoEFeedForward`; units that have no gated match.
        """
        return self.logits(self.states(tokens, mask))

    def states(
        self, tokens: Int[AnyArray, "batch time"], mask: Bool[AnyArray, "batch time"] | None = None
    ) -> Float[Array, "batch time width"]:
        """What the head sees at every step: the last block's output, normalised.

        Args:
            tokens: inputs.
            mask: as of the whole model.

        Raises:
            ValueError: as the whole model.
        """
        shared = (jnp.asarray(mask),) if mask is not None and self.num_experts else ()
        return self.norm(self.blocks(self.embed(tokens), *shared))

    def logits(self, states: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """The head: logits of states, in float32 at least."""
        logits = self.head(states)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def _scaled(init: Initializer, factor: float) -> Initializer:
    return lambda *args, **options: factor * init(*args, **options)


class Size(NamedTuple):
    """A model of the paper and how it was trained.

    Attributes:
        width: of the residual stream.
        num_layers: blocks.
        num_heads: of the attention.
        hidden: units of an ungated block (of an expert).
        vocab_size: tokens of its tokenizer (LLaMA's; GPT-NeoX's, padded).
        num_experts: 0: dense.
        top_k: experts a token.
        learning_rate: peak of the cosine to a tenth.
        warmup: share of the updates.
        batch_size: sequences of 4096 tokens.
        steps: of the optimiser.
        decay: kinds of parameters that AdamW decays (see `weight_decay_mask`).
    """

    width: int
    num_layers: int
    num_heads: int
    hidden: int
    vocab_size: int
    num_experts: int
    top_k: int
    learning_rate: float
    warmup: float
    batch_size: int
    steps: int
    decay: tuple[str, ...]


CONTEXT = 4096
DECAYS = ("matrices", "embeddings", "norms", "coefficients")
SIZES = {
    # 100 billion tokens as in the authors' script (the paper: 250), 0.62 of them warm-up.
    "1B": Size(2048, 24, 16, 8256, 32_000, 0, 0, 3e-4, 0.0062, 64, 381_470, ("matrices", "embeddings", "coefficients")),
    # 200 billion, 10.5 of them warm-up. The paper has the cosine end at a tenth, which is followed; in the authors'
    # configuration it would end at 5e12 tokens, so that after 200 billion the rate is still next to its peak.
    "1B-7B": Size(2048, 16, 16, 1536, 50_304, 64, 8, 4e-4, 0.0524, 1024, 47_684, DECAYS),
}


def language_model(
    size: Size,
    activation: str = "polynorm",
    *,
    order: int = 3,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    attention_chunk: int | None = None,
    remat: bool = False,
    scan: bool = False,
) -> TransformerLM:
    """A model of the paper, with OLMoE's initialisation and norms where it has experts.

    Args:
        size: such as `SIZES["1B"]`.
        activation: one of `ACTIVATIONS`.
        order: as of `TransformerLM`, like what follows.
        dtype: of the computation.
        mesh: where the batch lies.
        attention_chunk: queries at once.
        remat: compute activations again in the backward pass.
        scan: one program for all layers.
    """
    init = truncated_init if size.num_experts else None
    return TransformerLM(
        *size[:5],
        activation=activation,
        order=order,
        num_experts=size.num_experts,
        top_k=size.top_k,
        qk_norm=bool(size.num_experts),
        kernel_init=init,
        dtype=dtype,
        mesh=mesh,
        attention_chunk=attention_chunk,
        remat=remat,
        scan=scan,
    )


def weight_decay_mask(params: PyTree, decay: Collection[str] = SIZES["1B"].decay) -> PyTree[bool]:
    """True for the leaves that AdamW shall decay.

    The dense model's code (Megatron) decays matrices and the embedding, but no vector; OLMoE's decays norms as well.
    Here the activations' coefficients are decayed unless they are left out. The authors' code, in the snapshot of April
    2025, decays them in neither model: in Megatron they are vectors, OLMoE's list of exceptions has them.

    Args:
        params: of a model here.
        decay: some of `DECAYS`.

    Raises:
        ValueError: another kind.
    """
    if unknown := set(decay) - set(DECAYS):
        raise ValueError(f"nothing to decay is called {sorted(unknown)}, expected some of {DECAYS}")

    def decays(path: tuple, _: object) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        kinds = {"scale": "norms", "embedding": "embeddings"} | dict.fromkeys(COEFFICIENTS, "coefficients")
        return kinds.get(name, "matrices") in decay

    return jax.tree.map_with_path(decays, params)
