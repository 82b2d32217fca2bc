"""Koopman representations shaped by information.

X. Cheng et al., "Information Shapes Koopman Representation", ICLR 2026, arXiv 2510.13025.

A latent space in which time is a matrix K. Latent mutual information (InfoNCE) keeps modes coherent, and the von
Neumann entropy S of the normalised latent covariance keeps them many. Minimised: reconstruction + linear
consistency - alpha MI - gamma S.

- `information`: S, effective dimension, InfoNCE, Eq. 7, water-filling
- `operators`: least squares, rollout, spectrum, LQR; the baselines DMD and kernel regression
- `model`: autoencoder and loss
- `conv`: encoder and decoder of the flow experiments
- `metrics`: the measures of Table 2
"""

from jaxpapers.sequence.koopman.conv import ConvDecoder, ConvEncoder, upsample
from jaxpapers.sequence.koopman.information import (
    effective_dimension,
    gaussian_mutual_information,
    info_nce,
    noise_covariance,
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
    latent_control,
    lqr,
    ridge_operator,
    rollout,
    spectrum,
)

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "KernelKoopman",
    "KoopmanAutoencoder",
    "dmd",
    "effective_dimension",
    "fit_kernel_koopman",
    "forecast_kernel_koopman",
    "fourier_features",
    "gaussian_mutual_information",
    "histogram_kl",
    "info_nce",
    "koopman_loss",
    "latent_control",
    "lqr",
    "near_identity",
    "noise_covariance",
    "nrmse",
    "ridge_operator",
    "rollout",
    "spectral_distribution_error",
    "spectrum",
    "ssim",
    "upsample",
    "von_neumann_entropy",
    "water_filling",
]
