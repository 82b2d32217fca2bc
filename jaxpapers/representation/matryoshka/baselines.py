"""What the claims are measured against: compressed or random features, slimmable networks (Sec. 4.1)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from jaxpapers.nn.initializers import torch_default_bias_init, torch_default_kernel_init
from jaxpapers.nn.losses import cross_entropy
from jaxpapers.nn.resnet import batch_norm, part_of
from jaxpapers.ops.checks import check_labels, check_size
from jaxpapers.typing import AnyArray


class SVDHead(NamedTuple):
    """A linear head of rank k: (z projection) kernel + bias.

    Attributes:
        projection: V_k, to the k-dimensional representation.
        kernel: (U_k S_k)^T.
        bias: that of the full head.
    """

    projection: Float[Array, "dim k"]
    kernel: Float[Array, "k classes"]
    bias: Float[Array, "classes"]


def svd_head(kernel: Float[AnyArray, "dim classes"], bias: Float[AnyArray, "classes"], k: int) -> SVDHead:
    """Truncated singular value decomposition W = kernel^T ~ U_k S_k V_k^T of a trained head (SVD of Table 1).

    Raises:
        ValueError: k outside of 1..min(d, L).
    """
    check_size(k, min(kernel.shape))
    V, S, Ut = jnp.linalg.svd(jnp.asarray(kernel), full_matrices=False)
    return SVDHead(V[:, :k], S[:k, None] * Ut[:k], jnp.asarray(bias))


def svd_projection(database: Float[AnyArray, "items dim"], k: int) -> Float[Array, "dim k"]:
    """The top k right singular vectors of the database's features, not centred: FF + SVD of the retrieval tables.

    The columns are in the order of their singular values: a prefix of the projection is the projection to fewer.

    Raises:
        ValueError: k outside of 1..min(items, d).
    """
    check_size(k, min(database.shape))
    _, vectors = jnp.linalg.eigh(jnp.matmul(database.T, database, precision="highest"))  # d x d, however many items
    return vectors[:, ::-1][:, :k]


def jl_projection(key: PRNGKeyArray, dim: int, k: int) -> Float[Array, "dim k"]:
    """A Gaussian random projection that keeps the expected squared norm (Johnson-Lindenstrauss): FF + JL.

    Raises:
        ValueError: k outside of 1..dim.
    """
    return jax.random.normal(key, (dim, check_size(k, dim))) / jnp.sqrt(k)


def random_features(key: PRNGKeyArray, dim: int, k: int) -> Int[Array, "k"]:
    """Different coordinates, k of them, drawn uniformly: those that Rand. LP sees.

    Raises:
        ValueError: k outside of 1..dim.
    """
    return jax.random.permutation(key, dim)[: check_size(k, dim)]


def linear_probe(
    features: Float[AnyArray, "samples dim"],
    labels: Int[AnyArray, "samples"],
    num_classes: int,
    *,
    num_steps: int = 200,
    rate: float = 0.05,
) -> tuple[Float[Array, "dim classes"], Float[Array, "classes"]]:
    """A linear classifier on given features: softmax regression from zero by full-batch Adam (Rand. LP of Table 1).

    Features are standardised for the fit; constant ones (masked by zeros, say) get no weight.

    Args:
        features: of the training samples.
        labels: their classes.
        num_classes: L.
        num_steps: of Adam.
        rate: of Adam, falling to 0 by a cosine.

    Returns:
        Kernel and bias for the features as they are given.

    Raises:
        ValueError: labels out of range; no samples, steps or rate.
    """
    check_labels(labels, num_classes)
    if features.shape[0] < 1 or num_steps < 1 or not rate > 0:
        raise ValueError(f"expected samples, steps and a rate above 0; got {features.shape[0]}, {num_steps}, {rate}")
    features = jnp.asarray(features)
    mean, deviation = jnp.mean(features, axis=0), jnp.std(features, axis=0)
    scale = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1), 0)
    x = (features - mean) * scale
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def loss(params: tuple[Array, Array]) -> Array:
        return jnp.mean(cross_entropy(x @ params[0] + params[1], labels))

    def update(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = (jnp.zeros((features.shape[1], num_classes), x.dtype), jnp.zeros(num_classes, x.dtype))
    ((kernel, bias), _), _ = lax.scan(update, (start, optimizer.init(start)), length=num_steps)
    kernel = scale[:, None] * kernel
    return kernel, bias - mean @ kernel


class SlimmableMLP(nn.Module):
    """Dense layers with BatchNorm and ReLU between them, a linear one at the end; or the first part of all of it.

    With fraction 1 a plain MLP. A narrowed one (`model.clone(fraction=0.25)`) uses the first part of every layer's
    units, with norms of its own (Yu et al., arXiv 1812.08928), and gives the first part of the features.

    Attributes:
        hidden: units of the hidden layers.
        features: units of the last layer.
        fraction: of all units.
        dtype: of the matmuls; None: that of inputs and parameters. The features are float32 at least.
    """

    hidden: tuple[int, ...]
    features: int
    fraction: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "batch inputs"], train: bool = False) -> Float[Array, "batch features"]:
        """Features.

        Args:
            x: inputs, all of them whatever the fraction.
            train: BatchNorm by the batch's statistics; the running ones are then changed (`mutable="batch_stats"`).

        Raises:
            ValueError: a fraction that is no whole number of units of every layer.
        """
        inputs = x.shape[-1]
        sizes = (*self.hidden, self.features)
        for index, units in enumerate(sizes):
            kernel = self.param(f"kernel_{index}", torch_default_kernel_init, (inputs, units))
            bias = self.param(f"bias_{index}", torch_default_bias_init(inputs), (units,))
            part = part_of(units, self.fraction)
            kernel, bias = kernel[: x.shape[-1], :part], bias[:part]
            x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
            x = x @ kernel + bias
            if index < len(self.hidden):
                x = nn.relu(batch_norm(f"norm_{index}", self.fraction, train, self.dtype)(x))
            inputs = units
        return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))


def init_slimmable(
    model: nn.Module, widths: Sequence[float], key: PRNGKeyArray, x: Float[AnyArray, "batch ..."]
) -> PyTree:
    """Variables of a slimmable network (`SlimmableMLP`, `nn.resnet.ResNet`): its own, and the norms of all its widths.

    Args:
        model: the full network.
        widths: fractions of it.
        key: randomness.
        x: inputs.
    """
    variables: dict[str, dict[str, Any]] = {}
    for width in widths:
        _add_missing(variables, dict(model.clone(fraction=width).init(key, x)))
    return variables


def _add_missing(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Adds the leaves that a tree lacks; those that it has stay."""
    for name, value in other.items():
        if isinstance(value, dict):
            _add_missing(tree.setdefault(name, {}), value)
        else:
            tree.setdefault(name, value)


def slimmable_features(
    model: nn.Module,
    widths: Sequence[float],
    variables: PyTree,
    x: Float[AnyArray, "batch ..."],
    train: bool = False,
) -> tuple[list[Float[Array, "batch _"]], PyTree]:
    """Features at every width, width * d coordinates each, and the running statistics (changed where `train`).

    The loss is the sum over the widths, each classified by the head's first columns: a nested loss in which not the
    same, but a network of its own gives every prefix.

    Args:
        model: the full network.
        widths: fractions of it.
        variables: of `init_slimmable`.
        x: inputs.
        train: see the model.
    """
    params, statistics = variables["params"], variables["batch_stats"]
    found = []
    for width in widths:
        narrow, given = model.clone(fraction=width), {"params": params, "batch_stats": statistics}
        if train:
            z, changed = narrow.apply(given, x, train=True, mutable="batch_stats")
            statistics = changed["batch_stats"]
        else:
            z = narrow.apply(given, x)
        found.append(z)
    return found, statistics
