"""AdaFortiTran: channel estimation in OFDM by a transformer that knows the channel's statistics.

B. Guler, H. Jafarkhani, "AdaFortiTran: An Adaptive Transformer Model for Robust OFDM Channel Estimation", IEEE ICC
2025, arXiv 2505.09076.

A receiver knows the channel of a slot, a grid of K subcarriers and T symbols, at r x c pilots alone, with noise, and
wants all of it. One linear map takes the pilots to the grid, a small CNN cleans it (what lies near), its patches are
the tokens of a transformer encoder (what lies far), the CNN's output is added, and a second CNN refines the sum. The
adaptive model appends to every patch a code of three numbers that the receiver knows: SNR, delay spread, Doppler shift.
The real and the imaginary part go through the same real network F and are one batch of twice the size here. So the two
parts may be exchanged, but a phase that all pilots share is not passed on to the estimate.

Symbols: ls (r, c) the least-squares estimates at the pilots; h (K, T) the channel; F (K, K) and J (T, T) its
covariances over subcarriers and symbols, R = F (x) J that of the grid in row-major order; s2 the variance of the noise
in ls.

- `model`: `FortiTran`, `AdaFortiTran` and their parts. Training minimises `estimation_loss`, the mean over real and
  imaginary entries: half of the `complex_mse` that is reported, in dB of the mean (`to_db`)
- `convolution`: the convolutions, on a CPU by a route that is quick there. Attention and dropout are those of
  `nn.attention` and `nn.dropout`
- `rivals`: `CEViT` (Liu et al., GLOBECOM 2023), `SisRafNet` (arXiv 2401.05436), `LinearEstimator`
- `linear`: `bilinear_interpolate`, `lmmse_matrix` (matched where F, J, s2 are the slot's own, pooled where they are
  means over conditions), `fit_sample_covariances`, `linear_error` and `lmmse_bound`. Given its conditions a channel is
  very nearly Gaussian: no estimator does better than the bound on channels that it has not seen
- `weights`: `params_from_torch`, the authors' weights
"""

from jaxpapers.perception.adafortitran.linear import (
    apply_linear,
    bilinear_interpolate,
    bilinear_matrix,
    fit_sample_covariances,
    linear_error,
    linear_weights,
    lmmse_bound,
    lmmse_filter,
    lmmse_matrix,
)
from jaxpapers.perception.adafortitran.model import (
    AdaFortiTran,
    ChannelAdapter,
    ConvEnhancer,
    FortiTran,
    PatchEncoder,
    complex_mse,
    estimation_loss,
    to_db,
)
from jaxpapers.perception.adafortitran.rivals import CEViT, LinearEstimator, SisRafNet
from jaxpapers.perception.adafortitran.weights import params_from_torch

__all__ = [
    "AdaFortiTran",
    "CEViT",
    "ChannelAdapter",
    "ConvEnhancer",
    "FortiTran",
    "LinearEstimator",
    "PatchEncoder",
    "SisRafNet",
    "apply_linear",
    "bilinear_interpolate",
    "bilinear_matrix",
    "complex_mse",
    "estimation_loss",
    "fit_sample_covariances",
    "linear_error",
    "linear_weights",
    "lmmse_bound",
    "lmmse_filter",
    "lmmse_matrix",
    "params_from_torch",
    "to_db",
]
