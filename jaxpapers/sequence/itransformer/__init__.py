"""iTransformer: a Transformer whose tokens are variates, for multivariate forecasting.

Y. Liu, T. Hu, H. Zhang, H. Wu, S. Wang, L. Ma, M. Long, "iTransformer: Inverted Transformers Are Effective for Time
Series Forecasting", ICLR 2024, arXiv 2310.06625.

The usual token is one time step, N numbers measured at one instant. Here it is one variate: its whole window of T
steps, embedded by one linear map. Attention then finds which variates belong together, the feed-forward layers and
LayerNorm work on the representation of a series, and a linear map reads the S steps to come from it. No decoder, no
positions, no mask; and no parameter knows N, so that a model forecasts variates that it has never seen.

Symbols: x (B, T, N) window, y (B, S, N) forecast, M calendar covariates ("marks"), D = d_model, h (B, N + M, D) tokens.

Where to read what:

- `model`: instance normalisation, the block and its ablations (Table 3), `ITransformer` (Sec. 3), what it attends to
  and its representations (Sec. 4.3), random subsets of variates, the authors' checkpoints
- `baselines`: the Transformer of time tokens with each of the attentions (Table 2), DLinear, RLinear, PatchTST
- `jaxpapers.nn.attention`: full, flash, flow, ProbSparse and LSH attention
- `jaxpapers.ops.similarity`: how much representations change from block to block, `linear_cka` (Sec. 4.3)

    model = ITransformer(pred_len=96, d_model=256, d_ff=256)
    params = model.init(key, x, marks)["params"]
    y = model.apply({"params": params}, x, marks, deterministic=False, rngs={"dropout": key})
    maps = analyse(model, params, x, marks).attention

All models have this call. `PatchTST`, and `VanillaTransformer` with `distil`, contain BatchNorm: their variables are
`params` and `batch_stats`, and in training `apply` needs `mutable="batch_stats"`.
"""

from jaxpapers.ops.similarity import linear_cka
from jaxpapers.sequence.itransformer.baselines import DLinear, PatchTST, RLinear, VanillaTransformer, moving_average
from jaxpapers.sequence.itransformer.model import (
    ATTENTIONS,
    COMPONENTS,
    Analysis,
    Block,
    InvertedEncoder,
    ITransformer,
    Stats,
    analyse,
    instance_denorm,
    instance_norm,
    params_from_torch,
    random_variate_subset,
)

__all__ = [
    "ATTENTIONS",
    "COMPONENTS",
    "Analysis",
    "Block",
    "DLinear",
    "ITransformer",
    "InvertedEncoder",
    "PatchTST",
    "RLinear",
    "Stats",
    "VanillaTransformer",
    "analyse",
    "instance_denorm",
    "instance_norm",
    "linear_cka",
    "moving_average",
    "params_from_torch",
    "random_variate_subset",
]
