"""Koopman autoencoder with a learned or a least-squares operator, and its loss (Eq. 9, Alg. 2)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jaxpapers.nn.initializers import torch_dense
from jaxpapers.sequence.koopman.information import info_nce, von_neumann_entropy
from jaxpapers.typing import AnyArray

Weight = float | int | Float[Array, ""]


class MLP(nn.Module):
    """Dense layers with exact GELU between them, PyTorch's initialisers.

    Attributes:
        features: widths, the output's last.
    """

    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Float[AnyArray, "*batch inputs"]) -> Float[Array, "*batch outputs"]:
        """Applies the layers."""
        for index, width in enumerate(self.features):
            if index:
                x = nn.gelu(x, approximate=False)
            x = torch_dense(width, x.shape[-1])(x)
        return jnp.asarray(x)


def near_identity(key: Key[Array, ""], dim: int, scale: float = 0.95, noise: float = 0.01) -> Float[Array, "dim dim"]:
    """Start of a learned K: scale I + N(0, noise^2)."""
    return scale * jnp.eye(dim) + noise * jax.random.normal(key, (dim, dim))


class KoopmanAutoencoder(nn.Module):
    """Encoder f, decoder g and a latent matrix K (Sec. 3); operator="least_squares" has no K of its own.

    Attributes:
        encoder: x -> z.
        decoder: z -> x.
        latent_dim: d.
        operator: "learned" or "least_squares".
    """

    encoder: nn.Module
    decoder: nn.Module
    latent_dim: int
    operator: str = "learned"

    def setup(self) -> None:
        """Declare K."""
        if self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {self.latent_dim}")
        if self.operator not in ("learned", "least_squares"):
            raise ValueError(f"operator must be 'learned' or 'least_squares', got {self.operator!r}")
        if self.operator == "learned":
            self.K = self.param("K", near_identity, self.latent_dim)

    def __call__(self, x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Reconstruction g(f(x))."""
        return self.decode(self.encode(x))

    def encode(self, x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Latents z = f(x).

        Raises:
            ValueError: an encoder of another width than latent_dim.
        """
        z = self.encoder(x)
        if z.shape[-1] != self.latent_dim:
            raise ValueError(f"the encoder must return latent_dim={self.latent_dim} features, got {z.shape[-1]}")
        return z

    def decode(self, z: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """States x = g(z)."""
        return self.decoder(z)


def koopman_loss(
    x: Float[AnyArray, "batch time *shape"],
    z: Float[AnyArray, "batch time dim"],
    K: Float[AnyArray, "dim dim"],
    decode: Callable[[Array], Array],
    *,
    alpha: Weight = 0.0,
    beta: Weight = 1.0,
    gamma: Weight = 0.0,
    k: int = 3,
    temperature: float = 0.1,
    negatives: str = "batch",
    reconstruction_weight: Weight = 0.1,
    forecast_weight: Weight = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean losses: reconstruction + decoded forecast + beta consistency - alpha InfoNCE - gamma S (Eq. 9).

    The entropy's sign is the paper's (the authors' code has the opposite one). A least-squares K belongs here
    under `lax.stop_gradient`, as the authors have it. A traced gamma serves a population of several gammas.

    Returns:
        The loss and its unweighted terms: reconstruction, forecast, consistency, entropy and, unless alpha is the
        number 0, information.

    Raises:
        ValueError: a negative weight, or as `info_nce`.
    """
    weights = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "reconstruction_weight": reconstruction_weight,
        "forecast_weight": forecast_weight,
    }
    for name, weight in weights.items():
        if not isinstance(weight, jax.core.Tracer) and weight < 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    x, z = jnp.asarray(x), jnp.asarray(z)
    predicted = z[:, :-1] @ jnp.asarray(K).T
    terms = {
        "reconstruction": jnp.mean(jnp.square(decode(z) - x)),
        "forecast": jnp.mean(jnp.square(decode(predicted) - x[:, 1:])),
        "consistency": jnp.mean(jnp.square(z[:, 1:] - predicted)),
        "entropy": von_neumann_entropy(z),
    }
    loss = reconstruction_weight * terms["reconstruction"] + forecast_weight * terms["forecast"]
    loss = loss + beta * terms["consistency"] - gamma * terms["entropy"]
    if isinstance(alpha, jax.core.Tracer) or alpha > 0:
        terms["information"] = info_nce(z, k, temperature, negatives)
        loss = loss - alpha * terms["information"]
    return loss, terms
