"""Heads on every prefix, and their losses (Eq. 1, Sec. 3, App. C)."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxpapers.nn.initializers import torch_default_bias_init, torch_default_kernel_init, torch_dense
from jaxpapers.nn.language import language_loss
from jaxpapers.nn.losses import cross_entropy, info_nce
from jaxpapers.ops.checks import check_labels, check_size
from jaxpapers.representation.matryoshka.prefixes import check_nesting
from jaxpapers.typing import AnyArray


def prefix_logits(
    z: Float[AnyArray, "*batch dim"],
    kernel: Float[AnyArray, "dim classes"],
    nesting: Sequence[int],
    bias: Float[AnyArray, "classes"] | None = None,
) -> Float[Array, "sizes *batch classes"]:
    """Logits of all prefixes by one matrix (MRL-E): z[:m] W[:, :m]^T + b for every m.

    One matmul a block between neighbouring sizes, summed up: together they cost what the full layer does, not the sum
    of all sizes. The sums are float32 at least.

    Args:
        z: embeddings.
        kernel: W^T.
        nesting: sizes, the last one dim.
        bias: b, shared.

    Raises:
        ValueError: a nesting that does not rise to dim.
    """
    sizes = check_nesting(nesting, kernel.shape[0])
    exact = jnp.promote_types(jnp.result_type(z, kernel), jnp.float32)
    blocks = [slice(*ends) for ends in pairwise((0, *sizes))]
    partial_logits = jnp.stack([jnp.matmul(z[..., b], kernel[b], preferred_element_type=exact) for b in blocks])
    logits = jnp.cumsum(partial_logits, axis=0)
    return logits if bias is None else logits + bias


class NestedHead(nn.Module):
    """A linear classifier on every prefix z[:m].

    MRL: a layer of its own for each m, initialised as torch.nn.Linear(m, classes). MRL-E (`tied`): the prefixes of one
    layer, initialised as torch.nn.Linear(d, classes), their bias shared.

    Attributes:
        num_classes: L.
        nesting: M, rising, the last one the width d of the features.
        tied: MRL-E.
        use_bias: the authors' code has biases, Eq. 1 has none.
        dtype: of the matmuls; None: that of features and parameters. Tied logits are float32 at least.
    """

    num_classes: int
    nesting: tuple[int, ...]
    tied: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, z: Float[AnyArray, "*batch dim"]) -> Float[Array, "sizes *batch classes"]:
        """Logits of every head.

        Raises:
            ValueError: a nesting that does not rise to the width of z.
        """
        width = z.shape[-1]
        sizes = check_nesting(self.nesting, width)
        if not self.tied:
            options = {"use_bias": self.use_bias, "dtype": self.dtype}
            heads = [torch_dense(self.num_classes, m, name=f"head_{i}", **options) for i, m in enumerate(sizes)]
            return jnp.stack([head(z[..., :m]) for head, m in zip(heads, sizes, strict=True)])
        kernel = self.param("kernel", torch_default_kernel_init, (width, self.num_classes))
        bias = self.param("bias", torch_default_bias_init(width), (self.num_classes,)) if self.use_bias else None
        if self.dtype is not None:
            z, kernel = z.astype(self.dtype), kernel.astype(self.dtype)
        return prefix_logits(z, kernel, sizes, bias)


class FixedFeatureHead(nn.Module):
    """FF-k, the baseline: a linear classifier that sees the first k features of an encoder of full width.

    Attributes:
        num_classes: L.
        dim: k.
        dtype: of the computation; None: that of features and parameters.
    """

    num_classes: int
    dim: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, z: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch classes"]:
        """Logits.

        Raises:
            ValueError: k outside of 1..d.
        """
        check_size(self.dim, z.shape[-1])
        return torch_dense(self.num_classes, self.dim, dtype=self.dtype, name="head")(z[..., : self.dim])


def params_from_torch(
    state_dict: Mapping[str, Float[np.ndarray, "..."]], tied: bool = False
) -> dict[str, dict[str, Float[Array, "..."]]] | dict[str, Float[Array, "..."]]:
    """Parameters of the heads of `RAIVNLab/MRL`.

    Args:
        state_dict: of its MRL layer (`nesting_classifier_<i>.weight` and `.bias`), for `NestedHead`, or of its
            fixed-feature layer (`weight`, `bias`), for `FixedFeatureHead`.
        tied: the layer is MRL-E, whose one classifier is number 0.

    Raises:
        ValueError: names other than these.
    """
    arrays = {name: jnp.asarray(value) for name, value in state_dict.items()}
    layers: dict[str, dict[str, Array]] = {}
    for name, array in arrays.items():
        layer, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            raise ValueError(f"expected weights and biases, got {name!r}")
        entry = ("kernel", array.T) if kind == "weight" else ("bias", array)
        layers.setdefault(layer, {}).update([entry])
    if set(layers) == {""}:
        return {"head": layers[""]}
    expected = [f"nesting_classifier_{index}" for index in range(1 if tied else len(layers))]
    if set(layers) != set(expected) or any("kernel" not in layer for layer in layers.values()):
        raise ValueError(f"expected {expected}, got {sorted(layers)}")
    return layers[expected[0]] if tied else {f"head_{i}": layers[name] for i, name in enumerate(expected)}


def head_parameters(nesting: Sequence[int], num_classes: int, tied: bool = False, use_bias: bool = True) -> int:
    """Number of parameters: sum over m of (m + 1) L, or (d + 1) L for MRL-E.

    Raises:
        ValueError: a nesting that does not rise.
    """
    sizes = check_nesting(nesting, nesting[-1] if len(nesting) else 0)
    return sum(m + use_bias for m in (sizes[-1:] if tied else sizes)) * num_classes


def check_importance(
    importance: Float[AnyArray, "weights"] | Sequence[float | int] | None, count: int
) -> Float[Array, "sizes"]:
    """The weights c_m; all 1 where there are none.

    Raises:
        ValueError: not one weight a size, or (where they are no traced values) a negative one.
    """
    if importance is None:
        return jnp.ones(count)
    weights = jnp.asarray(importance)
    if not jnp.issubdtype(weights.dtype, jnp.floating):  # a list of whole numbers
        weights = weights.astype(jnp.result_type(float))
    if weights.shape != (count,):
        raise ValueError(f"importance must have a weight for each of the {count} sizes, got shape {weights.shape}")
    if not isinstance(weights, jax.core.Tracer) and not (np.asarray(weights) >= 0).all():
        raise ValueError(f"importance must be at least 0, got {np.asarray(weights).tolist()}")
    return weights


def nested_cross_entropy(
    logits: Float[AnyArray, "sizes batch classes"],
    labels: Int[AnyArray, "batch"],
    importance: Float[AnyArray, "weights"] | Sequence[float | int] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Eq. 1: the sum over m (not the mean: G heads have G times the gradient) of c_m times the mean cross-entropy.

    Args:
        logits: of every head.
        labels: of the batch.
        importance: c_m; None: all 1.
        label_smoothing: see `nn.losses.cross_entropy`.

    Raises:
        ValueError: an importance of another length or below 0; labels out of range; smoothing outside of [0, 1].
    """
    weights = check_importance(importance, logits.shape[0])
    losses = [jnp.mean(cross_entropy(head, labels, label_smoothing)) for head in logits]
    return jnp.dot(weights.astype(losses[0].dtype), jnp.stack(losses))


def nested_contrastive(
    u: Float[AnyArray, "batch dim"],
    v: Float[AnyArray, "batch dim"],
    nesting: Sequence[int],
    temperature: float | Float[AnyArray, ""],
    importance: Float[AnyArray, "weights"] | Sequence[float | int] | None = None,
    normalize: bool = True,
) -> Float[Array, ""]:
    """Sum over m of c_m times the symmetric InfoNCE of the pairs (u_i, v_i), each prefix normalised by itself (Sec. 3).

    See `nn.losses.info_nce`. The similarities of a size, batch x batch, are dropped and computed again in the backward
    pass.

    Args:
        u: embeddings of one side (images, say).
        v: embeddings of the other, row by row their partners.
        nesting: sizes, the last one dim.
        temperature: divides the cosines; one for all sizes.
        importance: c_m; None: all 1.
        normalize: False: scalar products of the prefixes as they are, for a baseline without cosines.

    Raises:
        ValueError: a nesting that does not rise to dim; an importance of another length or below 0; a temperature
            that is not above 0.
    """
    sizes = check_nesting(nesting, u.shape[-1])
    weights = check_importance(importance, len(sizes))

    @partial(jax.checkpoint, static_argnums=2)
    def loss_at(u: Array, v: Array, m: int) -> Array:
        return info_nce(u[:, :m], v[:, :m], temperature, normalize)

    losses = jnp.stack([loss_at(jnp.asarray(u), jnp.asarray(v), m) for m in sizes])
    return jnp.dot(weights.astype(losses.dtype), losses)


def nested_mlm_logits(
    h: Float[AnyArray, "*batch dim"],
    embedding: Float[AnyArray, "vocab dim"],
    nesting: Sequence[int],
    bias: Float[AnyArray, "vocab"] | None = None,
) -> Float[Array, "sizes *batch vocab"]:
    """Logits of tokens by the prefixes of the input embedding, to which a language model's output is tied: MRL-E.

    Raises:
        ValueError: a nesting that does not rise to dim.
    """
    return prefix_logits(h, jnp.asarray(embedding).T, nesting, bias)


def nested_mlm_loss(
    h: Float[AnyArray, "*batch dim"],
    embedding: Float[AnyArray, "vocab dim"],
    targets: Int[AnyArray, "*batch"],
    nesting: Sequence[int],
    bias: Float[AnyArray, "vocab"] | None = None,
    importance: Float[AnyArray, "weights"] | Sequence[float | int] | None = None,
    weights: Float[AnyArray, "*batch"] | None = None,
) -> Float[Array, ""]:
    """Eq. 1 for masked tokens, without ever holding the logits of more than one size.

    The logits of a size are computed for its loss, dropped, and computed again in the backward pass: more FLOPs than
    `nested_mlm_logits`, one G-th of the memory, which is what a large vocabulary lacks.

    Args:
        h: last hidden states.
        embedding: input embedding.
        targets: the tokens.
        nesting: sizes, the last one dim.
        bias: of the output.
        importance: c_m; None: all 1.
        weights: of the positions, 0 where nothing was masked; None: all count the same.

    Raises:
        ValueError: a nesting that does not rise to dim; an importance of another length or below 0; targets out of
            range.
    """
    sizes = check_nesting(nesting, h.shape[-1])
    check_labels(targets, embedding.shape[0])
    c = check_importance(importance, len(sizes))

    @partial(jax.checkpoint, static_argnums=2)
    def loss_at(h: Array, embedding: Array, m: int) -> Array:
        exact = jnp.promote_types(jnp.result_type(h, embedding), jnp.float32)
        logits = jnp.matmul(h[..., :m], embedding[:, :m].T, preferred_element_type=exact)
        return language_loss(logits if bias is None else logits + bias, targets, weights, z_loss=0)[0]

    losses = jnp.stack([loss_at(jnp.asarray(h), jnp.asarray(embedding), m) for m in sizes])
    return jnp.dot(c.astype(losses.dtype), losses)


def margin_score(logits: Float[AnyArray, "*batch classes"]) -> Float[Array, "*batch"]:
    """1 - (p1 - p2) of the two likeliest classes: the doubt of a head."""
    first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(jnp.asarray(logits), axis=-1), 2)[0], -1, 0)
    return 1 - (first - second)
