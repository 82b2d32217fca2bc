"""Training of PolyCom's language models: populations of small ones that differ in the activation, and the paper's.

A part of `polycom`. All stages of a seed see the same batches in the same order for as many updates. Every stage is one
population: all seeds at the rate of the claims, and some at the other rates of the grid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from experiments.catalogue import require
from experiments.components._polycom_tokens import Tokens
from experiments.harness import Run
from jaxpapers.components.polycom import (
    CONTEXT,
    SIZES,
    Size,
    TransformerBlock,
    TransformerLM,
    effective_rank,
    language_model,
    layer_similarity,
    router_losses,
    weight_decay_mask,
)
from jaxpapers.data.text import sample_text_windows, text_windows
from jaxpapers.data.tokens import TokenWindows, known_tokens
from jaxpapers.nn.language import chunked_language_loss, language_loss
from jaxpapers.train import (
    OnDevice,
    Rules,
    TrainState,
    TrainStep,
    batch_part,
    create_population,
    create_state,
    fsdp,
    jit_once,
    make_optimizer,
    make_schedule,
    make_train_step,
    member_keys,
    read_metrics,
    state_shardings,
    to_host,
    vmap_step,
)

TEST_ROWS = 192  # validation windows that are read together, of small models
LAST = 100  # updates whose mean is the training loss


class Member(NamedTuple):
    """One model of a population.

    Attributes:
      seed: of its parameters and batches.
      rate: peak learning rate.
    """

    seed: int
    rate: float


def members(name: str, config: ConfigDict) -> list[Member]:
    """The models of a stage: its seeds at the first rate, `num_rate_seeds` of them at each of the others."""
    first, *others = config.stages[name].rates
    rows = [Member(seed, first) for seed in range(config.stages[name].num_seeds or config.num_seeds)]
    return rows + [Member(seed, rate) for rate in others for seed in range(config.num_rate_seeds)]


def size_of(name: str, config: ConfigDict, vocab_size: int = 0) -> Size:
    """The model of a stage and its training, as the config has them; with `size`, -1 and () stand for that row's.

    Args:
      name: of the stage.
      config: the experiment's.
      vocab_size: tokens of the text; those of the size, or of `lm.vocab_size`, come before it.
    """
    stage, recipe = config.stages[name], config.lm
    given: dict[str, Any] = {
        "width": recipe.width,
        "num_layers": recipe.num_layers,
        "num_heads": recipe.num_heads,
        "hidden": stage.hidden,
        "vocab_size": recipe.vocab_size,
        "num_experts": stage.num_experts,
        "top_k": stage.top_k,
        "learning_rate": stage.rates[0],
        "warmup": recipe.warmup,
        "batch_size": recipe.batch_size,
        "steps": recipe.updates,
        "decay": tuple(recipe.decay),
    }
    if stage.size:
        row = SIZES[stage.size]._asdict()
        given = {field: row[field] if value in (-1, ()) else value for field, value in given.items()}
    elif given["vocab_size"] == -1:
        given["vocab_size"] = vocab_size
    if not (stage.size and recipe.warmup == -1):
        given["warmup"] = recipe.warmup / given["steps"]  # a size has a share, the config counts updates
    return Size(**given)


def length_of(name: str, config: ConfigDict) -> int:
    """Tokens that a model of the stage reads at once."""
    return CONTEXT if config.stages[name].size and config.lm.length == -1 else config.lm.length


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
        attention_chunk=recipe.attention_chunk or None,
        remat=recipe.remat,
        scan=recipe.scan,
    )
    return model.clone(block=stage.block, kernel_init=model.kernel_init if stage.size else None)


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
        mask=partial(weight_decay_mask, decay=size.decay),
    )


def loss_of(model: TransformerLM, config: ConfigDict) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """`(params, tokens, weights=None) -> (loss, metrics)`: cross-entropy of the next token and the routers' losses.

    The weights are of the sequences, all the same by default.
    """
    router, chunk = config.router, config.lm.loss_chunk

    def loss(params: Any, tokens: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        variables, targets = {"params": params}, tokens[:, 1:]
        states, sown = model.apply(variables, tokens[:, :-1], mutable="diagnostics", method="states")
        head = partial(model.apply, variables, method="logits")
        if weights is not None:
            weights = jnp.broadcast_to(weights[:, None], targets.shape)
        if chunk:
            value, terms = chunked_language_loss(head, states, targets, weights, chunk=chunk)
        else:
            value, terms = language_loss(head(states), targets, weights)
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
    size = size_of(name, config, vocab_size)
    model = model_of(name, size, config)
    loss = loss_of(model, config)
    seeds = jax.random.split(jax.random.key(config.seed), config.num_seeds)[np.array([row.seed for row in rows])]
    init_keys, data_keys, keys = member_keys(seeds, 3)

    def init(key: Array) -> Any:
        return model.init(key, jnp.zeros((1, recipe.length), jnp.int32))["params"]

    def loss_fn(params: Any, extra: Any, tokens: Array, key: Array) -> tuple:
        value, metrics = loss(params, tokens)
        return value, (extra, metrics)

    def train_step(state: TrainState, tokens: Array, key: Array) -> tuple:
        return make_train_step(loss_fn, optimizer_of(size, state.extra["rate"], config))(state, tokens, key)

    def batch_at(step: Array, text: Array) -> Array:
        def draw(key: Array) -> Array:
            return sample_text_windows(jax.random.fold_in(key, step), text, recipe.batch_size, recipe.length + 1)

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
        OnDevice(batch_at, train),
        keys,
        jax.jit(jax.vmap(evaluate, (0, None))),
    )


def train_loss(run: Run, name: str, updates: int) -> np.ndarray:
    """Mean training cross-entropy of the last LAST updates, as far as they were logged."""
    lines = [line for line in read_metrics(run.workdir, f"lm_{name}") if "train/cross_entropy" in line]
    last = [line for line in lines if line["step"] > updates - LAST]
    return np.mean([np.asarray(line["train/cross_entropy"], float) for line in last], axis=0)


def study_small(name: str, corpus: Tokens, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains a stage of small models: `<stage>/<what>`, one number a seed, and `<stage>/rate_<rate>/<what>`.

    `train`: as `train_loss`; `validation`: of `test_windows` windows;
    `rank/up`, `rank/down`: effective rank of the first and the last matrix of a block, mean over the blocks;
    `similarity` of neighbouring blocks' outputs; `parameters`; `coefficients` of the first seed, a row a block; with
    experts `load`, the largest share of the tokens that an expert got (1 / E: uniform).
    """
    recipe = config.lm
    vocab_size = size_of(name, config, corpus.vocab_size).vocab_size
    train, validation = (known_tokens(part, vocab_size) for part in (corpus.train, corpus.validation))
    setup = set_up_population(name, train, vocab_size, config)
    windows = validation_windows(validation, config)
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
    found = {
        "train": train_loss(run, name, recipe.updates),
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


def validation_windows(validation: np.ndarray, config: ConfigDict) -> np.ndarray:
    """(batches, rows, length + 1): the first `test_windows` windows of the validation text, side by side."""
    length = config.lm.length
    windows = text_windows(validation, length + 1, stride=length)[: config.lm.test_windows]
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
      size: the model and its training.
      state: before the first update, on a mesh already where it belongs: no device could hold the whole.
      rules: where the parameters lie on the mesh.
      train_step: its update, of tokens (sequences, length + 1).
      evaluate: `(params, tokens, weights) -> metrics` of `rows` sequences, weights (rows,) of 0 or 1.
      rows: sequences that are in the model at once.
    """

    size: Size
    state: TrainState
    rules: Rules
    train_step: TrainStep
    evaluate: Callable[..., dict[str, Array]]
    rows: int


def rows_of(name: str, config: ConfigDict, mesh: Mesh | None) -> int:
    """Sequences of a large model's microbatch, `lm.microbatch` a device, or the whole batch if that is 0.

    Raises:
      UsageError: a batch that the microbatches, or the devices, do not divide.
    """
    batch, devices = size_of(name, config).batch_size, 1 if mesh is None else mesh.shape["data"]
    require(batch % devices == 0, "lm.batch_size", batch, f"a multiple of the {devices} devices along mesh.data")
    share = batch // devices
    rows = min(share, config.lm.microbatch) or share
    require(share % rows == 0, "lm.microbatch", config.lm.microbatch, f"a divisor of a device's {share} sequences")
    return rows * devices


def set_up_single(
    name: str, config: ConfigDict, mesh: Mesh | None = None, jit: Callable[..., Callable] = jit_once
) -> SingleSetup:
    """State and update of a model of the paper; its experts sort the tokens of each device by themselves.

    An update takes its batch in microbatches and sums their gradients. The router's losses are those of each
    microbatch: they are no means over sequences.

    Raises:
      UsageError: as `rows_of`.
    """
    size, rows = size_of(name, config), rows_of(name, config, mesh)
    model, whole = model_of(name, size, config, mesh), model_of(name, size, config)
    optimizer = optimizer_of(size, size.learning_rate, config)
    loss = loss_of(model, config)

    def init() -> TrainState:
        tokens = jnp.zeros((1, 8), jnp.int32)
        return create_state(whole.init(jax.random.key(config.seed), tokens)["params"], optimizer)

    shapes = jax.eval_shape(init)
    rules = fsdp(shapes.params, mesh) if mesh else ()
    shardings = state_shardings(shapes, mesh, rules) if mesh else None

    def over_devices(array: Array) -> Array:
        if mesh is None:
            return array
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec("data")))

    def loss_fn(params: Any, extra: None, tokens: Array, key: Array) -> tuple:
        value, metrics = loss(params, tokens)
        return value, (extra, metrics)

    train_step = make_train_step(loss_fn, optimizer, microbatches=size.batch_size // rows, shardings=shardings)

    def evaluate(params: Any, tokens: Array, weights: Array) -> dict[str, Array]:
        _, metrics = loss(params, over_devices(tokens), over_devices(weights))
        return {"cross_entropy": metrics["cross_entropy"]}

    placed = {"out_shardings": shardings} if mesh else {}
    return SingleSetup(size, jit(init, **placed)(), rules, train_step, jax.jit(evaluate), rows)


def evaluation_batches(windows: np.ndarray, rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All windows in batches of so many rows, the last filled up with zeros, and their weights, 0 for what fills up."""
    missing = -len(windows) % rows
    filled = np.pad(windows, ((0, missing), (0, 0)))
    weights = (np.arange(len(filled)) < len(windows)).astype(np.float32)
    return list(zip(np.split(filled, len(filled) // rows), np.split(weights, len(filled) // rows), strict=True))


def study_single(name: str, corpus: Tokens, config: ConfigDict, run: Run) -> dict[str, Any]:
    """Trains a model of the paper: `<stage>/train`, `<stage>/validation`, one number each, and `<stage>/parameters`.

    `train`: as `train_loss`; `validation`: of the first `test_windows` windows of the validation text; while it trains,
    of the first microbatch of them.

    Raises:
      CorruptData: token ids that the model does not have.
    """
    recipe, window = config.lm, length_of(name, config) + 1
    setup = set_up_single(name, config, run.mesh)
    size = setup.size
    windows = text_windows(corpus.validation, window, stride=window - 1)[: recipe.test_windows]
    tests = evaluation_batches(known_tokens(windows, size.vocab_size), setup.rows)
    part = (0, 1) if run.mesh is None else batch_part(run.mesh)
    metrics = {f"{name}/parameters": sum(leaf.size for leaf in jax.tree.leaves(setup.state.params))}
    fitted = run.fit(
        f"lm_{name}",
        setup.state,
        setup.train_step,
        TokenWindows(corpus.train, size.batch_size, window, size.vocab_size, config.seed, part),
        size.steps,
        key=jax.random.key(config.seed),
        steps_per_call=recipe.updates_per_call,
        log_every=recipe.updates_per_call,
        evaluate=lambda state: setup.evaluate(state.params, *tests[0]),
        evaluate_every=recipe.evaluate_every,
        rules=setup.rules,
    )
    scores = [float(to_host(setup.evaluate(fitted.state.params, *test))["cross_entropy"]) for test in tests]
    validation = np.average(scores, weights=[weights.sum() for _, weights in tests])
    found = {"train": train_loss(run, name, size.steps), "validation": validation}
    return metrics | {f"{name}/{what}": np.atleast_1d(value) for what, value in found.items()}
