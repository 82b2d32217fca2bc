"""PolyCom: activations of language models that are learned low-order polynomials composed with a nonlinearity.

Z. Zhuo, Y. Wang, Y. Zeng, X. Li, X. Zhou, J. Ma, "Polynomial Composition Activations: Unleashing the Dynamics of Large
Language Models", ICLR 2025, arXiv 2411.03884.

The nonlinearity of a feed-forward block becomes sum_i a_i rho(x)^i (type I) or sum_i a_i rho(x^i) (type II), of order
3, with four learned numbers a layer and no gate. PolyReLU takes rho = ReLU in type I, PolyNorm the RMS normalisation
over the width in type II. At equal parameters both reach a lower loss than ReLU, GELU and SwiGLU, in dense models and
in mixtures of experts. A PolyReLU network multiplies exactly: its rate of approximation in Sobolev spaces is optimal.

Symbols: x pre-activations, a_0..a_r coefficients (ascending), r order, N(z) = z / sqrt(mean(z^2) + eps), n width.

Where to read what:

- `activations`: PolyNorm and PolyReLU with backward passes that keep x alone, the general form, the ablation's (Sec. 2)
- `feed_forward`: the block with every activation, equal parameters, the authors' weights
- `moe`: experts with one shared PolyNorm, router losses, the block-sparse layout; routing itself is `nn.moe`
- `model`: the dense language model and the one with experts, their sizes and initialisation
- `theory`: exact squares and products, local Taylor networks, ReLU's sawtooth (Sec. 3); how similar layers are
- `jaxpapers.ops.similarity`: `effective_rank`, of the paper's analysis

    model = ParaRNNLM(..., feed_forward=partial(FeedForward, activation="polynorm", hidden=4 * width))
    model = language_model(SIZES["1B"], "polynorm", dtype=jnp.bfloat16, scan=True, remat=True)
    y = poly_norm(x, coeffs)                                       # coeffs (a_0, a_1, a_2, a_3)
    y = poly_norm(x_shard, coeffs, axis_name="model")              # in shard_map, the width split
"""

from jaxpapers.components.polycom.activations import (
    RHOS,
    PolyCom,
    PolyNorm,
    PolyReLU,
    PolyReLUNorm,
    coeffs_from_reference,
    coeffs_to_reference,
    init_coeffs,
    poly_norm,
    poly_relu,
    polycom,
    rms_normalise,
)
from jaxpapers.components.polycom.feed_forward import (
    ACTIVATIONS,
    GATED,
    FeedForward,
    matched_hidden,
    params_from_torch,
    small_init,
)
from jaxpapers.components.polycom.model import (
    CONTEXT,
    DECAYS,
    SIZES,
    Size,
    TransformerBlock,
    TransformerLM,
    language_model,
    truncated_init,
    weight_decay_mask,
)
from jaxpapers.components.polycom.moe import (
    MoEFeedForward,
    RouterLosses,
    blocks_from_rows,
    router_losses,
    rows_from_blocks,
)
from jaxpapers.components.polycom.theory import (
    exact_power,
    exact_product,
    exact_square,
    layer_similarity,
    local_taylor_network,
    sawtooth_square,
)
from jaxpapers.ops.similarity import effective_rank

__all__ = [
    "ACTIVATIONS",
    "CONTEXT",
    "DECAYS",
    "GATED",
    "RHOS",
    "SIZES",
    "FeedForward",
    "MoEFeedForward",
    "PolyCom",
    "PolyNorm",
    "PolyReLU",
    "PolyReLUNorm",
    "RouterLosses",
    "Size",
    "TransformerBlock",
    "TransformerLM",
    "blocks_from_rows",
    "coeffs_from_reference",
    "coeffs_to_reference",
    "effective_rank",
    "exact_power",
    "exact_product",
    "exact_square",
    "init_coeffs",
    "language_model",
    "layer_similarity",
    "local_taylor_network",
    "matched_hidden",
    "params_from_torch",
    "poly_norm",
    "poly_relu",
    "polycom",
    "rms_normalise",
    "router_losses",
    "rows_from_blocks",
    "sawtooth_square",
    "small_init",
    "truncated_init",
    "weight_decay_mask",
]
