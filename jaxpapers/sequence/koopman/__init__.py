"""Koopman representations shaped by information.

X. Cheng et al., "Information Shapes Koopman Representation", ICLR 2026, arXiv 2510.13025.

A latent space in which time is a matrix K. Latent mutual information (InfoNCE) keeps modes coherent, and the von
Neumann entropy S of the normalised latent covariance keeps them many. Minimised: reconstruction + linear
consistency - alpha MI - gamma S.

- `information`: S, effective dimension, InfoNCE, Eq. 7, water-filling
- `operators`: least squares, rollout, spectrum, LQR; the baselines DMD and kernel regression
- `model`: autoencoder and loss
- `variational`: VAE with a linear (or, as a baseline, nonlinear) prior in time and control, and its loss
- `conv`: encoder and decoder of the flow experiments
- `metrics`: the measures of Table 2
"""

from jaxpapers.sequence.koopman.conv import ConvDecoder, ConvEncoder, upsample
from jaxpapers.sequence.koopman.information import (
    conditional_information,
    effective_dimension,
    gaussian_mutual_information,
    info_nce,
    noise_covariance,
    transition_gains,
    von_neumann_entropy,
    water_filling,
)
from jaxpapers.sequence.koopman.metrics import histogram_kl, nrmse, spectral_distribution_error, ssim
from jaxpapers.sequence.koopman.model import MLP, KoopmanAutoencoder, koopman_loss, near_identity
from jaxpapers.sequence.koopman.operators import (
    KernelKoopman,
    dmd,
    fit_kernel_koopman,
    forecast_kernel_koopman,
    fourier_features,
    graph_transition,
    latent_control,
    lqr,
    ridge_operator,
    rollout,
    spectrum,
)
from jaxpapers.sequence.koopman.variational import (
    Gaussian,
    KoopmanVAE,
    LatentVAE,
    bernoulli_log_likelihood,
    forecast,
    gaussian_entropy,
    gaussian_kl,
    gaussian_log_density,
    gaussian_log_likelihood,
    latent_rollout,
    sample_gaussian,
    variational_loss,
)

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "Gaussian",
    "KernelKoopman",
    "KoopmanAutoencoder",
    "KoopmanVAE",
    "LatentVAE",
    "bernoulli_log_likelihood",
    "conditional_information",
    "dmd",
    "effective_dimension",
    "fit_kernel_koopman",
    "forecast",
    "forecast_kernel_koopman",
    "fourier_features",
    "gaussian_entropy",
    "gaussian_kl",
    "gaussian_log_density",
    "gaussian_log_likelihood",
    "gaussian_mutual_information",
    "graph_transition",
    "histogram_kl",
    "info_nce",
    "koopman_loss",
    "latent_control",
    "latent_rollout",
    "lqr",
    "near_identity",
    "noise_covariance",
    "nrmse",
    "ridge_operator",
    "rollout",
    "sample_gaussian",
    "spectral_distribution_error",
    "spectrum",
    "ssim",
    "transition_gains",
    "upsample",
    "variational_loss",
    "von_neumann_entropy",
    "water_filling",
]
