"""Matryoshka representations: one embedding, all of whose prefixes are representations.

A. Kusupati et al., "Matryoshka Representation Learning", NeurIPS 2022, arXiv 2205.13147.

One encoder F gives z = F(x) of width d. For every size m of a short list M (8, 16, ..., d) the usual loss is applied to
the prefix z[:m] with a head of its own (MRL) or the prefix of one head (MRL-E), and the losses are summed (Eq. 1):

    min over F, W of  mean_i sum_{m in M} c_m CE(W^(m) z_i[:m] + b^(m), y_i)

At inference one pass gives every size: truncate, normalise, use. On top: a cascade of the heads, and retrieval that
short-lists by a small prefix and re-ranks by a large one.

- `prefixes`: lists of sizes, truncation, interpolation between sizes
- `heads`: MRL, MRL-E and FF-k heads, the losses (classification, contrastive, masked language), the authors' weights
- `adaptive`: adaptive classification, its thresholds, oracle
- `retrieval`: re-ranking, funnel, cost
- `jaxpapers.ops.search`: exact search (also over a mesh), its measures; nearest class mean
- `baselines`: SVD, Johnson-Lindenstrauss, random features with a linear probe, slimmable networks

    head = NestedHead(num_classes, nesting=(8, 16, 32, 64))
    loss = nested_cross_entropy(head.apply(params, encoder(x)), labels, label_smoothing=0.1)
    listed = exact_search(queries, database, 200, dim=16)
    found = rerank(listed, queries, database, 64)
"""

from jaxpapers.nn.losses import cross_entropy
from jaxpapers.ops.search import (
    RetrievalMetrics,
    exact_search,
    nearest_class_mean,
    retrieval_metrics,
    sharded_search,
)
from jaxpapers.representation.matryoshka.adaptive import (
    CascadeResult,
    HeadAnswers,
    cascade,
    expected_size,
    head_answers,
    learn_thresholds,
    majority_vote,
    mirrored_probabilities,
    oracle_accuracy,
    threshold_grid,
)
from jaxpapers.representation.matryoshka.baselines import (
    SlimmableMLP,
    SVDHead,
    init_slimmable,
    jl_projection,
    linear_probe,
    random_features,
    slimmable_features,
    svd_head,
    svd_projection,
)
from jaxpapers.representation.matryoshka.heads import (
    FixedFeatureHead,
    NestedHead,
    head_parameters,
    margin_score,
    nested_contrastive,
    nested_cross_entropy,
    nested_mlm_logits,
    nested_mlm_loss,
    params_from_torch,
    prefix_logits,
)
from jaxpapers.representation.matryoshka.prefixes import (
    check_nesting,
    interpolated,
    keep_first,
    log_spaced_sizes,
    sizes_between,
    truncate,
    uniform_sizes,
)
from jaxpapers.representation.matryoshka.retrieval import check_funnel, funnel, funnel_mflops, rerank, search_mflops

__all__ = [
    "CascadeResult",
    "FixedFeatureHead",
    "HeadAnswers",
    "NestedHead",
    "RetrievalMetrics",
    "SVDHead",
    "SlimmableMLP",
    "cascade",
    "check_funnel",
    "check_nesting",
    "cross_entropy",
    "exact_search",
    "expected_size",
    "funnel",
    "funnel_mflops",
    "head_answers",
    "head_parameters",
    "init_slimmable",
    "interpolated",
    "jl_projection",
    "keep_first",
    "learn_thresholds",
    "linear_probe",
    "log_spaced_sizes",
    "majority_vote",
    "margin_score",
    "mirrored_probabilities",
    "nearest_class_mean",
    "nested_contrastive",
    "nested_cross_entropy",
    "nested_mlm_logits",
    "nested_mlm_loss",
    "oracle_accuracy",
    "params_from_torch",
    "prefix_logits",
    "random_features",
    "rerank",
    "retrieval_metrics",
    "search_mflops",
    "sharded_search",
    "sizes_between",
    "slimmable_features",
    "svd_head",
    "svd_projection",
    "threshold_grid",
    "truncate",
    "uniform_sizes",
]
