"""Almost-linear RNNs: symbolic codes of dynamical systems.

M. Brenner, C. J. Hemmer, Z. Monfared, D. Durstewitz, "Almost-Linear RNNs Yield Highly Interpretable Symbolic
Codes in Dynamical Systems Reconstruction", NeurIPS 2024, arXiv 2410.14240.

A generative RNN is trained on a time series until its free run has the attractor of the system behind the
data. Only P of its M units are ReLUs, the rest is linear, so the state space falls into at most 2^P regions
with one affine map each. Few suffice (Lorenz-63: P = 2, Roessler: P = 1): fixed points and cycles are closed
forms, and the sequence of regions visited is a symbolic code of the dynamics. And given that sequence the
whole orbit is affine: states, gradients and Newton's method are scans.

Symbols: z_t state (M), x_t observation (N, the first N units), z~_t the state after teacher forcing,
z_t = A z_{t-1} + W phi(z_{t-1}) + h with A = diag(a), phi the identity but for max(z, 0) on the last P units,
d the bits (signs) of these, D = diag(1, .., 1, d), W_D = A + W D the matrix of a region, L first guess of the
hidden units, tau forcing interval, alpha forcing strength.

Where to read what:

- `model`: parameters, step, regions, free run, observation models (identity, categorical)
- `training`: teacher forcing in all its forms, loss, regularisers, noise; the recipe in words
- `kernels`: the same as scans: sequential, affine under given symbols, Newton on the symbols; backward pass
- `symbolic`: symbols of an orbit, transitions, graph, words, entropies (host)
- `periodic`: fixed points and cycles, exhaustive and by SCYFI (host)
- `module`: a Flax wrapper

The measures (D_stsp, D_H, prediction error, Lyapunov spectrum) are in `jaxpapers.ops.dsr_metrics`. Baselines of
the paper's tables come from the same code: P = 0 is the linear model, P = M the PLRNN.
"""

from jaxpapers.sequence.alrnn.kernels import (
    Forcing,
    OrbitInfo,
    PWLMap,
    forced_orbit,
    linearise,
    prefix_products,
)
from jaxpapers.sequence.alrnn.model import (
    ALRNNParams,
    DecoderParams,
    activation,
    activation_slopes,
    check_num_pwl,
    class_log_likelihood,
    class_log_probabilities,
    free_run,
    generate,
    init_decoder,
    init_params,
    init_state,
    jacobian,
    negative_slopes,
    observe,
    params_from_torch,
    region_bits,
    region_matrix,
    step,
)
from jaxpapers.sequence.alrnn.module import ALRNN
from jaxpapers.sequence.alrnn.periodic import Cycle, FixedPoints, cycles, fixed_points, scyfi
from jaxpapers.sequence.alrnn.symbolic import (
    SymbolicCode,
    admissibility_graph,
    label_accuracy,
    symbolic_code,
    topological_entropy,
    transition_counts,
    transition_probabilities,
    visit_connectome,
    word_entropy,
    words,
)
from jaxpapers.sequence.alrnn.training import (
    add_noise,
    alternative_regulariser,
    count_nonlinear,
    forced_problem,
    forcing_loss,
    generate_with_resets,
    guess_regulariser,
    latent_regulariser,
    predictability_time,
    slope_penalty,
    teacher_forced,
)

__all__ = [
    "ALRNN",
    "ALRNNParams",
    "Cycle",
    "DecoderParams",
    "FixedPoints",
    "Forcing",
    "OrbitInfo",
    "PWLMap",
    "SymbolicCode",
    "activation",
    "activation_slopes",
    "add_noise",
    "admissibility_graph",
    "alternative_regulariser",
    "check_num_pwl",
    "class_log_likelihood",
    "class_log_probabilities",
    "count_nonlinear",
    "cycles",
    "fixed_points",
    "forced_orbit",
    "forced_problem",
    "forcing_loss",
    "free_run",
    "generate",
    "generate_with_resets",
    "guess_regulariser",
    "init_decoder",
    "init_params",
    "init_state",
    "jacobian",
    "label_accuracy",
    "latent_regulariser",
    "linearise",
    "negative_slopes",
    "observe",
    "params_from_torch",
    "predictability_time",
    "prefix_products",
    "region_bits",
    "region_matrix",
    "scyfi",
    "slope_penalty",
    "step",
    "symbolic_code",
    "teacher_forced",
    "topological_entropy",
    "transition_counts",
    "transition_probabilities",
    "visit_connectome",
    "word_entropy",
    "words",
]
