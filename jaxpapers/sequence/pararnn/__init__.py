"""ParaRNN: nonlinear RNNs whose training is parallel over the sequence, up to language models of 7B parameters.

F. Danieli, P. Rodriguez, M. Sarabia, X. Suau, L. Zappella, "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs
for Large Language Models", ICLR 2026, arXiv 2510.21450.

All states of h_l = f(h_{l-1}, x_l) are the unknown of one nonlinear system. Newton's method solves it; each of its
steps is a linear recurrence, which a parallel scan solves in O(log L) steps. Three steps reach machine precision if
the cell is made for it: a GRU and an LSTM with diagonal state matrices, clipped in size, have Jacobians that are
diagonal, or 2 x 2 blocks per channel. The backward pass is one reversed linear scan.

Symbols: h_l state, c_l the LSTM's cell, x_l input, g = B x + b pre-activations of the gates (z, r, c or f, o, u),
A = diag(a) state matrices, C peepholes, J = dh_l/dh_{l-1}.

Where to read what:

- `jaxpapers.ops.newton`: the solver and its derivatives (Sec. 2, Alg. 1)
- `cells`: ParaGRU and ParaLSTM, one step and its Jacobian in closed form, initialisation, a sequence (Sec. 3)
- `mixers`: both as layers, the mixer around them, and the rivals: linear RNN, Mamba2, attention (App. C.1)
- `model`: block, language model and its sizes, the small models of synthetic tasks, loss, projection (Tables 3-6)
- `decoding`: generation, the prompt in parallel and then token by token (Sec. 4.2)

    model = language_model(SIZES["400M"]["gru"], dtype=jnp.bfloat16, scan=True, remat=True)
    params = model.init(key, tokens)["params"]
    logits, sown = model.apply({"params": params}, tokens[:, :-1], mutable="diagnostics")
    loss, terms = language_loss(logits, tokens[:, 1:], z_loss=1e-4)
    params = project_recurrent(params, 0.5)                      # after every optimiser step
    new = generate(key, model, params, tokens[:, :16], 100)
"""

from jaxpapers.nn.language import LossTerms, language_loss
from jaxpapers.sequence.pararnn.cells import (
    NONLINEARITIES,
    GRUParams,
    LSTMParams,
    Solver,
    gru_cell,
    gru_jacobian,
    init_gru,
    init_lstm,
    lstm_cell,
    lstm_jacobian,
    lstm_jacobian_reference,
    params_from_torch,
    preactivations,
    solve,
)
from jaxpapers.sequence.pararnn.decoding import decode_step, decoder, extend, generate, init_state, prefill
from jaxpapers.sequence.pararnn.mixers import (
    AttentionMixer,
    CausalConv,
    LinearRNN,
    Mamba2Mixer,
    ParaGRU,
    ParaLSTM,
    ParaRNNMixer,
    state_space_dual,
)
from jaxpapers.sequence.pararnn.model import (
    MIXERS,
    SIZES,
    VOCABULARY,
    ParaRNNBlock,
    ParaRNNLM,
    Size,
    SyntheticModel,
    language_model,
    newton_residual,
    project_recurrent,
    weight_decay_mask,
)

__all__ = [
    "MIXERS",
    "NONLINEARITIES",
    "SIZES",
    "VOCABULARY",
    "AttentionMixer",
    "CausalConv",
    "GRUParams",
    "LSTMParams",
    "LinearRNN",
    "LossTerms",
    "Mamba2Mixer",
    "ParaGRU",
    "ParaLSTM",
    "ParaRNNBlock",
    "ParaRNNLM",
    "ParaRNNMixer",
    "Size",
    "Solver",
    "SyntheticModel",
    "decode_step",
    "decoder",
    "extend",
    "generate",
    "gru_cell",
    "gru_jacobian",
    "init_gru",
    "init_lstm",
    "init_state",
    "language_loss",
    "language_model",
    "lstm_cell",
    "lstm_jacobian",
    "lstm_jacobian_reference",
    "newton_residual",
    "params_from_torch",
    "preactivations",
    "prefill",
    "project_recurrent",
    "solve",
    "state_space_dual",
    "weight_decay_mask",
]
