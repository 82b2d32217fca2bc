"""Koopman VAE for control from images (Alg. 1, Eq. 9, VAE version), and the VAE with a nonlinear latent map.

    p(z_n | x_n) = N(mean, variance) of an encoder,  q(z_n | z_{n-1}, a_{n-1}) = N(K z_{n-1} + B a_{n-1}, Sigma)

Both models have the methods `encode`, `transition` and `decode`, so that one loss trains and one `forecast` runs them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Key, PyTree

from jaxpapers.sequence.koopman.information import info_nce, von_neumann_entropy
from jaxpapers.sequence.koopman.model import Weight, near_identity
from jaxpapers.typing import AnyArray


class Gaussian(NamedTuple):
    """A normal distribution with independent dimensions.

    Attributes:
        mean: (..., dim).
        log_variance: (..., dim).
    """

    mean: Float[AnyArray, "*batch dim"]
    log_variance: Float[AnyArray, "*batch dim"]


def sample_gaussian(key: Key[Array, ""], p: Gaussian) -> Float[Array, "*batch dim"]:
    """A reparametrised draw mean + sigma N(0, I)."""
    noise = jax.random.normal(key, p.mean.shape, p.mean.dtype)
    return jnp.asarray(p.mean) + jnp.exp(p.log_variance / 2) * noise


def gaussian_kl(p: Gaussian, q: Gaussian) -> Float[Array, "*batch"]:
    """KL(p || q) = E_p[-log q] - H[p], in nats, summed over dimensions."""
    difference = q.log_variance - p.log_variance
    distance = jnp.square(p.mean - q.mean) * jnp.exp(-q.log_variance)
    # expm1 keeps the small KL of near neighbours, where exp(-d) + d - 1 would cancel.
    return jnp.sum(distance + jnp.expm1(-difference) + difference, axis=-1) / 2


def gaussian_entropy(p: Gaussian) -> Float[Array, "*batch"]:
    """H[p] in nats."""
    return jnp.sum(p.log_variance + np.log(2 * np.pi * np.e), axis=-1) / 2


def gaussian_log_density(p: Gaussian, z: Float[AnyArray, "*batch dim"]) -> Float[Array, "*batch"]:
    """Log p(z) in nats."""
    distance = jnp.square(jnp.asarray(z) - p.mean) * jnp.exp(-p.log_variance)
    return -jnp.sum(distance + p.log_variance + np.log(2 * np.pi), axis=-1) / 2


def gaussian_log_likelihood(
    x: Float[AnyArray, "..."], decoded: Float[AnyArray, "..."], scale: float = 1.0
) -> Float[Array, "..."]:
    """Log N(x; decoded, scale^2) of each entry.

    Raises:
        ValueError: scale <= 0.
    """
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    return -jnp.square((jnp.asarray(x) - decoded) / scale) / 2 - np.log(scale * np.sqrt(2 * np.pi))


def bernoulli_log_likelihood(x: Float[AnyArray, "..."], decoded: Float[AnyArray, "..."]) -> Float[Array, "..."]:
    """Log likelihood of each pixel x in [0, 1] under logits."""
    return jnp.asarray(x) * decoded - jax.nn.softplus(decoded)


class KoopmanVAE(nn.Module):
    """VAE whose prior in time is linear: K, B and a diagonal Sigma are learned (Sec. 5, visual control).

    Attributes:
        encoder: x -> mean and log-variance, 2 latent_dim features.
        decoder: z -> what the likelihood takes.
        latent_dim: d.
        control_dim: width of the actions; 0 for none.
    """

    encoder: nn.Module
    decoder: nn.Module
    latent_dim: int
    control_dim: int = 0

    def setup(self) -> None:
        """Declare K, B and Sigma."""
        self._declare_variance()
        self.K = self.param("K", near_identity, self.latent_dim)
        if self.control_dim:
            self.B = self.param("B", nn.initializers.normal(0.01), (self.latent_dim, self.control_dim))

    def __call__(self, x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
        """Decoded posterior means; `init` goes through here and so meets every part."""
        z = self.encode(x).mean
        if self.is_initializing():
            self.transition(z, jnp.zeros((*z.shape[:-1], self.control_dim), z.dtype) if self.control_dim else None)
        return self.decode(z)

    def encode(self, x: Float[AnyArray, "..."]) -> Gaussian:
        """p(z | x).

        Raises:
            ValueError: an encoder of another width than 2 latent_dim.
        """
        features = self.encoder(x)
        if features.shape[-1] != 2 * self.latent_dim:
            raise ValueError(
                f"the encoder must return 2 latent_dim = {2 * self.latent_dim} features (mean, log-variance), "
                f"got {features.shape[-1]}"
            )
        return Gaussian(*jnp.split(features, 2, axis=-1))

    def decode(self, z: Float[AnyArray, "*batch dim"]) -> Float[Array, "..."]:
        """What the likelihood takes: means or logits of x."""
        return self.decoder(z)

    def transition(
        self, z: Float[AnyArray, "*batch dim"], controls: Float[AnyArray, "*batch control"] | None = None
    ) -> Gaussian:
        """q(z_n | z_{n-1}, a_{n-1}) = N(K z_{n-1} + B a_{n-1}, Sigma).

        Raises:
            ValueError: controls of another width than control_dim.
        """
        self._check_width(controls)
        mean = z @ self.K.T
        if controls is not None:
            mean = mean + controls @ self.B.T
        return Gaussian(mean, jnp.broadcast_to(self.log_variance, mean.shape))

    def _declare_variance(self) -> None:
        if self.latent_dim < 1 or self.control_dim < 0:
            raise ValueError(
                f"needs latent_dim >= 1 and control_dim >= 0, got {self.latent_dim} and {self.control_dim}"
            )
        self.log_variance = self.param("log_variance", nn.initializers.zeros, (self.latent_dim,))

    def _check_width(self, controls: AnyArray | None) -> None:
        given = 0 if controls is None else controls.shape[-1]
        if given != self.control_dim:
            raise ValueError(f"the model has control_dim={self.control_dim}, got controls of width {given}")


class LatentVAE(KoopmanVAE, kw_only=True):
    """The baseline: N(z_{n-1} + f(z_{n-1}, a_{n-1}), Sigma) with a network f in the place of K and B (Table 2).

    Attributes:
        encoder: x -> mean and log-variance, 2 latent_dim features.
        decoder: z -> what the likelihood takes.
        latent_dim: d.
        control_dim: width of the actions; 0 for none.
        dynamics: f, from latents and actions side by side to latent_dim features.
    """

    dynamics: nn.Module

    def setup(self) -> None:
        """Declare Sigma."""
        self._declare_variance()

    def transition(
        self, z: Float[AnyArray, "*batch dim"], controls: Float[AnyArray, "*batch control"] | None = None
    ) -> Gaussian:
        """q(z_n | z_{n-1}, a_{n-1}).

        Raises:
            ValueError: controls of another width than control_dim, or dynamics of another width than latent_dim.
        """
        self._check_width(controls)
        step = self.dynamics(z if controls is None else jnp.concatenate([z, controls], axis=-1))
        if step.shape[-1] != self.latent_dim:
            raise ValueError(f"dynamics must return latent_dim={self.latent_dim} features, got {step.shape[-1]}")
        return Gaussian(z + step, jnp.broadcast_to(self.log_variance, step.shape))


def latent_rollout(
    model: KoopmanVAE,
    params: PyTree,
    z0: Float[AnyArray, "*batch dim"],
    steps: int,
    controls: Float[AnyArray, "*batch time control"] | None = None,
) -> Float[Array, "*batch time dim"]:
    """Latents of steps 1..steps, each the mean of the transition from the one before.

    Args:
        model: `KoopmanVAE` or `LatentVAE`.
        params: its parameters.
        z0: start.
        steps: how many.
        controls: a_0, ..., a_{steps-1}.

    Raises:
        ValueError: steps < 1, or another number of controls.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if controls is not None and controls.shape[-2] != steps:
        raise ValueError(f"needs one control a step, got {controls.shape[-2]} for {steps} steps")

    apply: Any = partial(model.apply, {"params": params})

    def body(z: Array, control: Array | None) -> tuple[Array, Array]:
        with jax.default_matmul_precision("highest"):  # errors of a step are carried into all later ones
            z = apply(z, control, method="transition").mean
        return z, z

    moves = None if controls is None else jnp.moveaxis(jnp.asarray(controls), -2, 0)
    return jnp.moveaxis(lax.scan(body, jnp.asarray(z0), moves, length=steps)[1], 0, -2)


def forecast(
    model: KoopmanVAE,
    params: PyTree,
    x0: Float[AnyArray, "..."],
    steps: int,
    controls: Float[AnyArray, "*batch time control"] | None = None,
) -> Float[Array, "..."]:
    """Decoded steps 1..steps from the posterior mean of x0, in latent space throughout; time follows x0's batch axes.

    Raises:
        ValueError: as `latent_rollout`.
    """
    apply: Any = partial(model.apply, {"params": params})
    z = latent_rollout(model, params, apply(x0, method="encode").mean, steps, controls)
    return apply(z, method="decode")


def variational_loss(
    key: Key[Array, ""],
    x: Float[AnyArray, "batch time *shape"],
    model: KoopmanVAE,
    params: PyTree,
    controls: Float[AnyArray, "batch moves control"] | None = None,
    *,
    alpha: Weight = 0.0,
    beta: Weight = 1.0,
    gamma: Weight = 0.0,
    elbo_weight: Weight = 1.0,
    standard_weight: Weight = 1.0,
    k: int = 3,
    temperature: float = 0.1,
    negatives: str = "batch",
    log_likelihood: Callable[[Array, Array], Array] = gaussian_log_likelihood,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """-E log p(x_n | z^_n) + beta KL_n - alpha InfoNCE - gamma S - ELBO (Eq. 9, Alg. 1, VAE version).

    z_n ~ p(z_n | x_n), z^_n ~ q(z_n | z_{n-1}, a_{n-1}), one draw of each. KL_n = E_p[-log q(z_n | z_{n-1})] -
    H[p(z_n | x_n)], in closed form given z_{n-1}. ELBO = E_p log p(x_n | z_n) - standard_weight KL(p || N(0, I)).
    Log likelihoods are sums over the entries of x, all terms means over batch and time. InfoNCE and S are those of
    the posterior means: in a dimension that carries nothing, the noise of a draw would pass for a mode.

    Args:
        key: of the draws.
        x: windows.
        model: `KoopmanVAE` or `LatentVAE`.
        params: its parameters.
        controls: a_0, ..., a_{time-2}; a_n leads from x_n to x_{n+1}.
        alpha: weight of InfoNCE; may be traced, as all weights.
        beta: weight of the KL divergence in time.
        gamma: weight of the entropy.
        elbo_weight: weight of the standard VAE's bound.
        standard_weight: weight of the KL divergence to N(0, I) in it.
        k: as of `info_nce`.
        temperature: as of `info_nce`.
        negatives: as of `info_nce`.
        log_likelihood: `(x, decoded) -> log p` of each entry.

    Returns:
        The loss and its unweighted terms: forecast and reconstruction (negative log likelihoods), transition_kl,
        standard_kl, entropy and, unless alpha is the number 0, information.

    Raises:
        ValueError: a negative weight, fewer than two times, another number of controls than moves, or as `info_nce`.
    """
    weights = {"alpha": alpha, "beta": beta, "gamma": gamma}
    weights |= {"elbo_weight": elbo_weight, "standard_weight": standard_weight}
    for name, weight in weights.items():
        if not isinstance(weight, jax.core.Tracer) and weight < 0:
            raise ValueError(f"{name} must be at least 0, got {weight}")
    moves = x.shape[1] - 1
    if moves < 1:
        raise ValueError(f"a transition needs at least 2 times, got {x.shape[1]}")
    if controls is not None and controls.shape[1] != moves:
        raise ValueError(f"{x.shape[1]} times have {moves} moves, got {controls.shape[1]} controls")
    x = jnp.asarray(x)
    apply: Any = partial(model.apply, {"params": params})
    posterior_key, prior_key = jax.random.split(key)
    posterior = apply(x, method="encode")
    z = sample_gaussian(posterior_key, posterior)
    prior = apply(z[:, :-1], controls, method="transition")
    predicted = sample_gaussian(prior_key, prior)
    # One call of the decoder for both: it is most of the work.
    decoded = apply(jnp.concatenate([z, predicted], axis=1), method="decode")

    def cost(x: Array, decoded: Array) -> Array:
        return -jnp.sum(log_likelihood(x, decoded)) / (x.shape[0] * x.shape[1])

    terms = {
        "forecast": cost(x[:, 1:], decoded[:, moves + 1 :]),
        "reconstruction": cost(x, decoded[:, : moves + 1]),
        "transition_kl": jnp.mean(gaussian_kl(Gaussian(*(part[:, 1:] for part in posterior)), prior)),
        "standard_kl": jnp.mean(gaussian_kl(posterior, Gaussian(jnp.zeros_like(z), jnp.zeros_like(z)))),
        "entropy": von_neumann_entropy(posterior.mean),
    }
    loss = terms["forecast"] + beta * terms["transition_kl"] - gamma * terms["entropy"]
    loss = loss + elbo_weight * (terms["reconstruction"] + standard_weight * terms["standard_kl"])
    if isinstance(alpha, jax.core.Tracer) or alpha > 0:
        terms["information"] = info_nce(posterior.mean, k, temperature, negatives)
        loss = loss - alpha * terms["information"]
    return loss, terms
