"""Training of PolyCom's language models: populations of small ones that differ in the activation, and the paper's.

A part of `polycom`. All stages of a seed see the same batches in the same order for as many updates. Every stage is one
population: all seeds at the rate of the claims, and some at the other rates of the grid.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from experiments.harness import Run
from jaxpapers.components.polycom import (
    CONTEXT,
    SIZES,
    Size,
    TransformerBlock,
    TransformerLM,
    effective_rank,
    language_loss,
    language_model,
    layer_similarity,
    router_losses,
    weight_decay_mask,
)
from jaxpapers.data.text import Corpus, load_text, sample_text_windows, split_text, text_windows, tokenise
from jaxpapers.train import (
    OnDevice,
    TrainState,
    TrainStep,
    create_population,
    create_state,
    fsdp,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    read_metrics,
    to_host,
    vmap_step,
)

OWN_SOURCE = "own_source"  # this file: a text that needs no download, for `smoke`
TEST_ROWS = 192  # validation windows that are read together


class Member(NamedTuple):
    """One model of a population.

    Attributes:
      seed: of its parameters and batches.
      rate: peak learning rate.
    """

    seed: int
    rate: float


def members(name: str, config: ConfigDict) -> list[Member]:
    """The models of a stage: all seeds at its first rate, `num_rate_seeds` of them at each of the others."""
    first, *others = config.stages[name].rates
    rows = [Member(seed, first) for seed in range(config.num_seeds)]
    return rows + [Member(seed, rate) for rate in others for seed in range(config.num_rate_seeds)]


def size_of(name: str, vocab_size: int, config: ConfigDict) -> Size:
    """The model of a stage: a row of the paper's sizes, or the small one of the config."""
    stage, recipe = config.stages[name], config.lm
    if stage.size:
        return SIZES[stage.size]
    return Size(
        recipe.width,
        recipe.num_layers,
        recipe.num_heads,
        stage.hidden,
        vocab_size,
        stage.num_experts,
        stage.top_k,
        stage.rates[0],
        recipe.warmup / recipe.updates,
        recipe.batch_size,
        recipe.updates,
        recipe.decay_all,
    )


def length_of(name: str, config: ConfigDict) -> int:
    """Tokens that a model of the stage reads at once."""
    return CONTEXT if config.stages[name].size else config.lm.length


def model_of(name: str, size: Size, config: ConfigDict, mesh: Mesh | None = None) -> TransformerLM:
    """The network of a stage; with experts, a small one has the norms of queries and keys but the dense model's start.

    OLMoE's 0.02 is made for a width of 2048.
    """
    stage, recipe = config.stages[name], config.lm
    model = language_model(
        size,
        stage.activation,
        order=stage.order,
        dtype=jnp.dtype(recipe.dtype),
        mesh=mesh,
        remat=recipe.remat,
        scan=recipe.scan,
    )
    return model if stage.size else model.clone(kernel_init=None, block=stage.block)


def optimizer_of(size: Size, rate: float | Array, config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with warm-up and a cosine to a tenth; gradients are clipped. The rate may be a number of each model."""
    recipe = config.lm
    shape = make_schedule(
        "cosine_decay_schedule", 1.0, recipe.last_rate, size.steps, warmup_steps=round(size.warmup * size.steps)
    )
    return make_optimizer(
        config.optimizer,
        lambda step: rate * shape(step),
        clip_norm=recipe.clip_norm,
        b1=recipe.betas[0],
        b2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        mask=lambda params: weight_decay_mask(params, size.decay_all, recipe.decay_coefficients),
    )


def loss_of(model: TransformerLM, config: ConfigDict) -> Callable[[Any, Array], tuple[Array, dict[str, Array]]]:
    """`(params, tokens) -> (loss, metrics)`: cross-entropy of the next token and the routers' losses."""
    router = config.router

    def loss(params: Any, tokens: Array) -> tuple[Array, dict[str, Array]]:
        logits, sown = model.apply({"params": params}, tokens[:, :-1], mutable="diagnostics")
        value, terms = language_loss(logits, tokens[:, 1:], z_loss=0.0)
        losses = router_losses(sown.get("diagnostics", {}))
        value = value + router.load_balance * losses.load_balance + router.z_loss * losses.z_loss
        metrics = {"cross_entropy": terms.cross_entropy}
        if model.num_experts:
            metrics |= losses._asdict()
        return value, metrics

    return loss


class Population(NamedTuple):
    """What trains the models of a stage together.

    Attributes:
      model: the network.
      state: before the first update, a row a member.
      train_step: of the population.
      batches: windows of the training text; members of one seed see the same, and so do all stages.
      keys: one a member.
      evaluate: `(params, tokens) -> {name: a number a member}`, of windows (rows, length + 1).
    """

    model: TransformerLM
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array
    evaluate: Callable[[Any, Any], dict[str, Array]]


def set_up_population(
    name: str, train: Any, vocab_size: int, config: ConfigDict, jit: Callable[..., Callable] = jit_once
) -> Population:
    """Model, states, update and batches of a stage of small models."""
    recipe, rows = config.lm, members(name, config)
    size = size_of(name, vocab_size, config)
    model = model_of(name, size, config)
    loss = loss_of(model, config)
    seeds = jax.random.split(jax.random.key(config.seed), config.num_seeds)[np.array([row.seed for row in rows])]
    init_keys, data_keys, keys = jnp.moveaxis(jax.vmap(lambda seed: jax.random.split(seed, 3))(seeds), 1, 0)
    train = jnp.asarray(train)

    def init(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, recipe.length), jnp.int32))["params"]

    def loss_fn(params: Any, extra: Any, tokens: Array, key: Array) -> tuple:
        value, metrics = loss(params, tokens)
        return value, (extra, metrics)

    def train_step(state: TrainState, tokens: Array, key: Array) -> tuple:
        return make_train_step(loss_fn, optimizer_of(size, state.extra["rate"], config))(state, tokens, key)

    def batch(step: Array) -> Array:
        def draw(key: Array) -> Array:
            return sample_text_windows(jax.random.fold_in(key, step), train, recipe.batch_size, recipe.length + 1)

        return jax.vmap(draw)(data_keys)

    def evaluate(params: Any, tokens: Array) -> dict[str, Array]:
        return loss(params, tokens)[1]

    return Population(
        model,
        create_population(
            init,
            optimizer_of(size, 1.0, config),
            init_keys,
            {"rate": np.array([row.rate for row in rows], np.float32)},
            jit,
        ),
        vmap_step(train_step),
        OnDevice(batch),
        keys,
        jax.jit(jax.vmap(evaluate, (0, None))),
    )


def study_small(name: str, corpus: Corpus, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains a stage of small models: `<stage>/<what>`, one number a seed, and `<stage>/rate_<rate>/<what>`.

    `train`: mean cross-entropy of the last `updates_per_call` updates; `validation`: of `test_windows` windows;
    `rank/up`, `rank/down`: effective rank of the first and the last matrix of a block, mean over the blocks;
    `similarity` of neighbouring blocks' outputs; `parameters`; `coefficients` of the first seed, a row a block; with
    experts `load`, the largest share of the tokens that an expert got (1 / E: uniform).
    """
    recipe = config.lm
    setup = set_up_population(name, np.asarray(corpus.train, np.int32), corpus.vocab_size, config)
    windows = validation_windows(corpus, config)
    fitted = run.fit(
        f"lm_{name}",
        setup.state,
        setup.train_step,
        setup.batches,
        recipe.updates,
        key=setup.keys,
        steps_per_call=recipe.updates_per_call,
        log_every=recipe.updates_per_call,
        evaluate=lambda state: setup.evaluate(state.params, windows[0]),
        evaluate_every=recipe.evaluate_every,
    )
    params = fitted.state.params
    logged = [line for line in read_metrics(run.workdir, f"lm_{name}") if "train/cross_entropy" in line]
    found = {
        "train": np.asarray(logged[-1]["train/cross_entropy"], float),
        "validation": np.mean([to_host(setup.evaluate(params, rows))["cross_entropy"] for rows in windows], axis=0),
        **to_host(jit_once(partial(analyse, model=setup.model))(params, windows[0])),
    }
    rows = members(name, config)
    metrics: dict[str, Any] = {}
    for rate in config.stages[name].rates:
        chosen = np.array([index for index, row in enumerate(rows) if row.rate == rate])
        prefix = name if rate == config.stages[name].rates[0] else f"{name}/rate_{rate:g}"
        metrics |= {f"{prefix}/{what}": np.asarray(values)[chosen] for what, values in found.items()}
    metrics[f"{name}/parameters"] = sum(leaf[0].size for leaf in jax.tree.leaves(params))
    if coeffs := [block["mlp"]["activation"]["coeffs"][0] for block in _blocks(params) if "activation" in block["mlp"]]:
        metrics[f"{name}/coefficients"] = np.stack(coeffs)
    return metrics


def validation_windows(corpus: Corpus, config: ConfigDict) -> np.ndarray:
    """(batches, rows, length + 1): the first `test_windows` windows of the validation text, side by side."""
    length = config.lm.length
    windows = text_windows(np.asarray(corpus.validation, np.int32), length + 1, stride=length)[: config.lm.test_windows]
    rows = min(TEST_ROWS, len(windows))
    return windows[: len(windows) // rows * rows].reshape(-1, rows, length + 1)


def _blocks(params: Any) -> list[Any]:
    return [params["blocks"][f"layers_{index}"] for index in range(len(params["blocks"]))]


def analyse(params: Any, windows: Array, model: TransformerLM) -> dict[str, Array]:
    """Effective ranks, similarity of neighbouring blocks on some windows, largest load of an expert: a row a member."""

    def rank(params: Any, name: str) -> Array:
        leaves = [block["mlp"][name] for block in _blocks(params)]
        matrices = jnp.stack([leaf if model.num_experts else leaf["kernel"] for leaf in leaves])
        return jnp.mean(jax.vmap(effective_rank)(matrices.reshape(-1, *matrices.shape[-2:])))

    def look(params: Any) -> dict[str, Array]:
        _, seen = model.apply(
            {"params": params},
            windows[:, :-1],
            capture_intermediates=lambda module, _: isinstance(module, TransformerBlock),
            mutable=["intermediates", "diagnostics"],
        )
        found = {f"rank/{name}": rank(params, name) for name in ("up", "down")}
        states = [seen["intermediates"]["blocks"][f"layers_{i}"]["__call__"][0] for i in range(model.num_layers)]
        if model.num_layers > 1:
            found["similarity"] = jnp.mean(jnp.diagonal(layer_similarity(jnp.stack(states)), 1))
        if model.num_experts:
            loads = [block["mlp"]["load"] for block in seen["diagnostics"]["blocks"].values()]
            found["load"] = jnp.max(jnp.stack(loads))
        return found

    return jax.vmap(look)(params)


class SingleSetup(NamedTuple):
    """What trains one large model.

    Attributes:
      state: before the first update.
      train_step: its update, of tokens (sequences, length + 1).
      evaluate: `(params, tokens) -> metrics`.
    """

    state: TrainState
    train_step: TrainStep
    evaluate: Callable[[Any, Any], dict[str, Array]]


def set_up_single(
    name: str, config: ConfigDict, mesh: Mesh | None = None, jit: Callable[..., Callable] = jit_once
) -> SingleSetup:
    """State and update of a model of the paper; its experts sort the tokens of each device by themselves."""
    size = size_of(name, 0, config)
    model, whole = model_of(name, size, config, mesh), model_of(name, size, config)
    optimizer = optimizer_of(size, size.learning_rate, config)
    loss = loss_of(model, config)

    def init() -> TrainState:
        tokens = jnp.zeros((1, 8), jnp.int32)
        return create_state(whole.init(jax.random.key(config.seed), tokens)["params"], optimizer)

    def loss_fn(params: Any, extra: Any, tokens: Array, key: Array) -> tuple:
        value, metrics = loss(params, tokens)
        return value, (extra, metrics)

    def evaluate(params: Any, tokens: Array) -> dict[str, Array]:
        return loss(params, tokens)[1]

    return SingleSetup(jit(init)(), make_train_step(loss_fn, optimizer), jax.jit(evaluate))


def study_single(name: str, corpus: Corpus, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains a model of the paper: `<stage>/validation`, one number, and `<stage>/parameters`."""
    size, length = size_of(name, corpus.vocab_size, config), length_of(name, config)
    setup = set_up_single(name, config, run.mesh)
    train, valid = (np.asarray(part, np.int32) for part in (corpus.train, corpus.validation))
    rows = 1 if run.mesh is None else run.mesh.shape["data"]
    windows = text_windows(valid, length + 1, stride=length)[:rows]
    key = jax.random.key(config.seed)
    metrics = {f"{name}/parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))}
    fitted = run.fit(
        f"lm_{name}",
        setup.state,
        setup.train_step,
        OnDevice(lambda step: sample_text_windows(jax.random.fold_in(key, step), train, size.batch_size, length + 1)),
        size.steps,
        key=key,
        evaluate=lambda state: setup.evaluate(state.params, windows),
        evaluate_every=config.lm.evaluate_every,
        rules=() if run.mesh is None else fsdp(setup.state.params, run.mesh),
    )
    scores = to_host(setup.evaluate(fitted.state.params, windows))
    return metrics | {f"{name}/validation": scores["cross_entropy"]}


def load_corpus(config: ConfigDict) -> Corpus:
    """The text of the config.

    Raises:
      DataNotFound: its file is missing and cannot be downloaded.
    """
    if config.lm.text == OWN_SOURCE:
        return tokenise(split_text(Path(__file__).read_text(encoding="utf8")), config.lm.encoding)
    return load_text(config.lm.text, config.lm.encoding)
