"""Training of ParaRNN's models and their rivals: the synthetic tasks (Table 6) and the language model (Table 5).

A part of `pararnn`. All mixers of a task, or of a corpus, see the same batches in the same order for as many updates.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.harness import Run
from experiments.sequence._pararnn_solver import CELLS
from jaxpapers.components.polycom import FeedForward
from jaxpapers.data import tasks
from jaxpapers.data.text import Corpus, load_text, sample_text_windows, text_windows
from jaxpapers.nn.transformer import swiglu_width
from jaxpapers.sequence.pararnn import (
    SIZES,
    ParaRNNLM,
    Solver,
    SyntheticModel,
    language_loss,
    language_model,
    newton_residual,
    project_recurrent,
    weight_decay_mask,
)
from jaxpapers.train import (
    OnDevice,
    Rules,
    TrainState,
    TrainStep,
    create_population,
    create_state,
    fsdp,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    member_keys,
    state_shardings,
    to_host,
    vmap_step,
)

GENERATORS: dict[str, Callable[..., tasks.TaskBatch]] = {
    "parity": tasks.parity,
    "k_hop_1": partial(tasks.k_hop, hops=1),
    "k_hop_2": partial(tasks.k_hop, hops=2),
    "mqar": tasks.mqar,
    "keep_nth": tasks.keep_nth,
}
TEST_ROWS = 1_000  # test sequences that are answered together
NEWTON = Solver(method="chunked", max_iterations=3)  # the paper's, to see what it leaves after training
# Without the clip three iterations need not be enough (App. C.1), and what is trained must be the RNN.
UNCLIPPED = Solver(max_iterations=16, tolerance=1e-5, fallback="sequential")


class TaskSetup(NamedTuple):
    """What trains a population of one mixer on one task.

    Attributes:
      model: the network.
      state: before the first update, one row a seed.
      train_step: of the population.
      batches: fresh sequences of every step; seeds have their own, mixers the same.
      keys: one a seed.
      score: `params -> {"accuracy", "last"}` on fixed test sequences, over all asked positions and over the last one;
        states one by one.
    """

    model: nn.Module
    state: TrainState
    train_step: TrainStep
    batches: OnDevice
    keys: Array
    score: Callable[[Any], dict[str, Array]]


def optimizer_of(config: ConfigDict, recipe: ConfigDict) -> optax.GradientTransformation:
    """AdamW with a cosine to 0, decay of matrices alone, and the projection of a and c after every update."""
    schedule = make_schedule(
        "cosine_decay_schedule", recipe.rate, 0.0, recipe.updates, warmup_steps=int(recipe.warmup * recipe.updates)
    )
    optimizer = make_optimizer(
        config.optimizer,
        schedule,
        b1=recipe.betas[0],
        b2=recipe.betas[1],
        weight_decay=recipe.weight_decay,
        mask=weight_decay_mask,
    )
    if not recipe.max_norm:
        return optimizer

    def project(updates: Any, params: Any) -> Any:
        projected = project_recurrent(optax.apply_updates(params, updates), recipe.max_norm)
        return jax.tree.map(jnp.subtract, projected, params)

    return optax.chain(optimizer, optax.stateless(project))


def one_by_one(model: ParaRNNLM | SyntheticModel) -> ParaRNNLM | SyntheticModel:
    """The model with its recurrences computed step by step: what it is, not what three iterations make of it."""
    return model.clone(mixer_options={"solver": Solver("sequential")}) if model.mixer in CELLS else model


def set_up_task(name: str, mixer: str, config: ConfigDict, jit: Callable[..., Callable] = jit_once) -> TaskSetup:
    """Model, loss, batches and score of a mixer on a task."""
    recipe = config.tasks[name]
    options = {} if name == "parity" else {"vocab": recipe.vocab}
    draw = partial(GENERATORS[name], batch=recipe.batch_size, length=recipe.length, **options)
    model = SyntheticModel(
        recipe.vocab,
        config.width,
        config.num_heads,
        mixer,
        bare=recipe.bare,
        max_length=recipe.length if recipe.positions or (mixer == "attention" and recipe.bare) else None,
        mixer_options={"solver": UNCLIPPED} if mixer in CELLS and not recipe.max_norm else {},
    )
    exact = one_by_one(model)
    optimizer = optimizer_of(config, recipe)
    seeds = jax.random.split(jax.random.key(config.seed), recipe.num_seeds)
    init_keys, data_keys, keys = member_keys(seeds, 3)

    def init(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, recipe.length), jnp.int32))["params"]

    def loss_fn(params: Any, extra: Any, batch: tasks.TaskBatch, key: Array) -> tuple:
        logits, sown = model.apply({"params": params}, batch.tokens, mutable="diagnostics")
        loss, terms = language_loss(logits, batch.labels, batch.mask.astype(logits.dtype))
        residual = newton_residual(sown.get("diagnostics", {}))
        return loss, (extra, {"accuracy": terms.accuracy, "newton_residual": residual})

    def counts(params: Any, key: Array) -> Array:
        """Right answers and questions, at all positions and at the last."""
        test = GENERATORS[name](key, min(TEST_ROWS, recipe.test_samples), recipe.length, **options)
        right = jnp.argmax(exact.apply({"params": params}, test.tokens), axis=-1) == test.labels
        last = test.mask & (jnp.arange(recipe.length) == recipe.length - 1)
        return jnp.stack([jnp.sum(part) for part in (right & test.mask, test.mask, right & last, last)])

    def score(params: Any, key: Array) -> dict[str, Array]:
        keys = jax.random.split(key, -(-recipe.test_samples // TEST_ROWS))
        found = jnp.sum(jax.lax.map(partial(counts, params), keys), axis=0)
        return {"accuracy": found[0] / found[1], "last": found[2] / jnp.maximum(found[3], 1)}

    return TaskSetup(
        model,
        create_population(init, optimizer, init_keys, jit=jit),
        vmap_step(make_train_step(loss_fn, optimizer)),
        OnDevice(lambda step: jax.vmap(lambda key: draw(jax.random.fold_in(key, step)))(data_keys)),
        keys,
        jax.jit(lambda params: jax.vmap(score, (0, None))(params, jax.random.key(config.seed + 1))),
    )


def study_tasks(config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains every mixer on every task: `tasks/<task>/<mixer>/accuracy` and `/last`, one number a seed."""
    metrics = {}
    for name in config.tasks:
        recipe = config.tasks[name]
        for mixer in recipe.mixers:
            setup = set_up_task(name, mixer, config)
            fitted = run.fit(
                f"{name}_{mixer}",
                setup.state,
                setup.train_step,
                setup.batches,
                recipe.updates,
                key=setup.keys,
                steps_per_call=config.updates_per_call,
                log_every=10 * config.updates_per_call,
            )
            scores = to_host(setup.score(fitted.state.params))
            metrics |= {f"tasks/{name}/{mixer}/{what}": value for what, value in scores.items()}
    return metrics


class LanguageSetup(NamedTuple):
    """What trains one language model.

    Attributes:
      model: the network.
      state: before the first update, on a mesh already where it belongs: no device could hold the whole.
      rules: where the parameters lie on the mesh.
      train_step: its update, of a batch (sequences, length + 1) of tokens.
      evaluate: `(params, tokens) -> {"cross_entropy", "residual"}`: of states computed one by one, and what three
        Newton iterations leave.
    """

    model: ParaRNNLM
    state: TrainState
    rules: Rules
    train_step: TrainStep
    evaluate: Callable[[Any, Any], dict[str, Array]]


ROW = {  # field of `lm` -> field of a `Size`
    "rate": "learning_rate",
    "weight_decay": "weight_decay",
    "z_loss": "z_loss",
    "batch_size": "batch_size",
    "updates": "steps",
}


def lm_recipe(mixer: str, config: ConfigDict) -> ConfigDict:
    """`config.lm`, with the figures of the mixer's row of Tables 3 and 4 where it has -1."""
    if not config.lm.size:
        return config.lm
    row = SIZES[config.lm.size][mixer]
    left_open = {field: getattr(row, name) for field, name in ROW.items() if config.lm[field] == -1}
    return ConfigDict({**config.lm, **left_open})


def over_devices(mesh: Mesh) -> NamedSharding:
    """Where tokens (batch, time), and what is computed of each, lie on a mesh."""
    return NamedSharding(mesh, PartitionSpec("data", "seq"))


def lm_model(mixer: str, vocab_size: int, config: ConfigDict, mesh: Mesh | None = None) -> ParaRNNLM:
    """A row of the paper's tables, or the small model of the config; recurrences are split as the mesh says."""
    recipe = config.lm
    # A kernel runs through time on one device: a sequence that is split is solved in chunks.
    split = mesh is not None and mesh.shape["seq"] > 1
    method = "chunked" if split and recipe.method == "fused" else recipe.method
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "remat": recipe.remat,
        "scan": recipe.scan,
        "dtype": jnp.dtype(recipe.dtype),
        "mixer_options": {"solver": Solver(method=method, mesh=mesh)} if mixer in CELLS else {},
        "sharding": None if mesh is None else over_devices(mesh),
    }
    size = SIZES[recipe.size][mixer] if recipe.size else None
    if recipe.activation != "swiglu":
        # Two matrices of 3/2 the units of a SwiGLU's three.
        hidden = 3 * swiglu_width(size.width if size else recipe.width) // 2
        init = nn.initializers.lecun_normal()  # as a SwiGLU's: the activation alone differs
        layer = partial(FeedForward, activation=recipe.activation, hidden=hidden, kernel_init=init)
        options["feed_forward"] = layer
    if size:
        return language_model(size, **options)
    if mixer == "mamba2":
        options["mixer_options"] = {"head_dim": recipe.width * 2 // recipe.num_heads, "state_size": 16}
    return ParaRNNLM(recipe.width, recipe.num_layers, recipe.num_heads, mixer=mixer, **options)


def set_up_lm(
    mixer: str,
    vocab_size: int,
    config: ConfigDict,
    mesh: Mesh | None = None,
    jit: Callable[..., Callable] = jit_once,
) -> LanguageSetup:
    """Model, loss and score of a mixer on text."""
    recipe = lm_recipe(mixer, config)
    model = lm_model(mixer, vocab_size, config, mesh)
    optimizer = optimizer_of(config, recipe)

    def placed(tokens: Array) -> Array:
        return tokens if mesh is None else jax.lax.with_sharding_constraint(tokens, over_devices(mesh))

    def loss_fn(params: Any, extra: Any, batch: Array, key: Array) -> tuple:
        tokens, targets = placed(batch[:, :-1]), placed(batch[:, 1:])
        logits, sown = model.apply({"params": params}, tokens, mutable="diagnostics")
        loss, terms = language_loss(logits, targets, z_loss=recipe.z_loss)
        residual = newton_residual(sown.get("diagnostics", {}))
        return loss, (extra, {"cross_entropy": terms.cross_entropy, "newton_residual": residual})

    def init() -> TrainState:
        tokens = jnp.zeros((1, recipe.length), jnp.int32)
        whole = lm_model(mixer, vocab_size, config)  # one short sequence has nothing to split
        params = whole.init(jax.random.key(config.seed), tokens)["params"]
        return create_state(params, optimizer)

    scored = model.clone(sharding=None)  # so many windows as there are, not as many as devices divide
    parallel = scored.clone(mixer_options={"solver": NEWTON}) if mixer in CELLS else scored
    exact = one_by_one(scored)

    def evaluate(params: Any, tokens: Array) -> dict[str, Array]:
        logits = exact.apply({"params": params}, tokens[:, :-1])
        _, terms = language_loss(logits, tokens[:, 1:])
        _, sown = parallel.apply({"params": params}, tokens[:, :-1], mutable="diagnostics")
        return {
            "cross_entropy": terms.cross_entropy,
            "residual": newton_residual(sown.get("diagnostics", {})),
        }

    shapes = jax.eval_shape(init)
    rules = fsdp(shapes.params, mesh) if mesh else ()
    options = {"out_shardings": state_shardings(shapes, mesh, rules)} if mesh else {}
    return LanguageSetup(model, jit(init, **options)(), rules, make_train_step(loss_fn, optimizer), jax.jit(evaluate))


def study_language(corpus: Corpus, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains every mixer on the text: `lm/<mixer>/perplexity` of the validation text, `/residual`, `/parameters`.

    The perplexity is that of all the validation text that fills batches of `test_windows`, the curves' of the first.
    """
    train, valid = (np.asarray(part, np.int32) for part in (corpus.train, corpus.validation))
    key, size = jax.random.key(config.seed), config.lm.length + 1
    windows = text_windows(valid, size, stride=config.lm.length)
    rows = min(config.lm.test_windows, len(windows))
    batches = windows[: len(windows) // rows * rows].reshape(-1, rows, size)
    metrics: dict[str, Any] = {}
    for mixer in config.lm.mixers:
        recipe = lm_recipe(mixer, config)
        setup = set_up_lm(mixer, corpus.vocab_size, config, run.mesh)
        metrics[f"lm/{mixer}/parameters"] = sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))

        def evaluate(state: TrainState, setup: LanguageSetup = setup) -> dict[str, Array]:
            return setup.evaluate(state.params, batches[0])

        def batch_at(step: Array, text: Array, batch_size: int = recipe.batch_size) -> Array:
            return sample_text_windows(jax.random.fold_in(key, step), text, batch_size, size)

        fitted = run.fit(
            f"lm_{mixer}",
            setup.state,
            setup.train_step,
            OnDevice(batch_at, train),
            recipe.updates,
            key=jax.random.key(config.seed),
            steps_per_call=recipe.updates_per_call,
            log_every=recipe.updates_per_call,
            evaluate=evaluate,
            evaluate_every=recipe.evaluate_every,
            rules=setup.rules,
        )
        scores = [to_host(setup.evaluate(fitted.state.params, batch)) for batch in batches]
        metrics[f"lm/{mixer}/perplexity"] = np.exp(np.mean([score["cross_entropy"] for score in scores]))
        metrics[f"lm/{mixer}/residual"] = np.max([score["residual"] for score in scores])
    return metrics


def load_corpus(config: ConfigDict) -> Corpus:
    """The text of the config.

    Raises:
      DataNotFound: its file is missing and cannot be downloaded.
    """
    return load_text(config.lm.text, config.lm.encoding)
