"""The AL-RNN as a Flax module, for those who train with `init`/`apply`."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxpapers.sequence.alrnn.model import generate, init_params
from jaxpapers.sequence.alrnn.training import teacher_forced
from jaxpapers.typing import AnyArray


class ALRNN(nn.Module):
    """Almost-linear RNN (Eqs. 4, 5): N readouts, M units in all, ReLU on the last P.

    Attributes:
        latent_dim: M.
        observed_dim: N.
        num_pwl: P, 0..M-N; 0 is a linear RNN, M the PLRNN.
        slope: start value of trainable slopes for the P units; None for ReLU units.
        param_dtype: dtype of the parameters.
    """

    latent_dim: int
    observed_dim: int
    num_pwl: int
    slope: float | int | None = None
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Declare the parameters: one `ALRNNParams` under the name "alrnn"."""
        init = partial(init_params, slope=self.slope, dtype=self.param_dtype)
        self.alrnn = self.param("alrnn", init, self.latent_dim, self.observed_dim)

    def __call__(
        self,
        xs: Float[AnyArray, "*batch window observed"],
        tau: int | Int[Array, ""],
        alpha: float | Float[Array, ""] = 1.0,
        method: str = "sequential",
        **options: Any,
    ) -> Float[Array, "*batch time observed"]:
        """Teacher-forced predictions of xs[..., 1:, :]; options and errors are those of `teacher_forced`.

        Through `apply`, give `method` by position: flax takes that keyword for itself.
        """
        predictions, _, _ = teacher_forced(self.alrnn, xs, tau, alpha, num_pwl=self.num_pwl, method=method, **options)
        return predictions

    def generate(
        self, x0: Float[AnyArray, "*batch observed"], steps: int
    ) -> tuple[Float[Array, "*batch time observed"], Float[Array, "*batch time latent"]]:
        """Free run from an observation: `apply(variables, x0, steps, method="generate")` (see `generate`)."""
        return generate(self.alrnn, x0, steps, self.num_pwl)
