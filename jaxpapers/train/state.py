"""What a training run carries from step to step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, PyTree


class TrainState(struct.PyTreeNode):
    """The whole state of a run; a pytree, so that it can be jitted, donated, vmapped and checkpointed.

    A population (several models that train together under `vmap`) is the same state with a leading `models`
    axis on every leaf of `params`, `opt_state` and `extra`; `step` stays one scalar.

    Attributes:
      step: updates done so far, int32 scalar.
      params: what the optimizer moves.
      opt_state: the optimizer's own state.
      extra: everything else that belongs to the model and may change from step to step: batch statistics,
        EMA or target networks, dual variables, per-model hyper-parameters of a population.
    """

    step: Any  # not Int[Array, ""]: jax also builds this tree of axes, shardings and shape structs
    params: PyTree
    opt_state: PyTree
    extra: PyTree = None


def jit_once(function: Callable[..., PyTree], **options: Any) -> Callable[..., PyTree]:
    """`jax.jit` with little optimisation: for what runs once or twice, and whose time is its compilation."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=quick, **options)


def eagerly(function: Callable[..., PyTree], **_: Any) -> Callable[..., PyTree]:
    """In the place of `jax.jit`: operation by operation, each compiled once a shape for all models of a process.

    Good for what is drawn once by many models of equal shapes, with Flax's `lazy_init`, which computes parameters only.
    """
    return function


def abstractly(function: Callable[..., PyTree], **_: Any) -> Callable[..., PyTree]:
    """In the place of `jax.jit`, for plans: shapes and dtypes of the result, with nothing compiled or computed."""
    return partial(jax.eval_shape, function)


def run_once(function: Callable[..., PyTree], *args: Any) -> PyTree:
    """`function(*args)` by `jit_once`: for initialisations."""
    return jit_once(function)(*args)


def create_state(params: PyTree, optimizer: optax.GradientTransformation, extra: PyTree = None) -> TrainState:
    """The state of one model before its first update."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), extra)


def create_population(
    init: Callable[..., PyTree],
    optimizer: optax.GradientTransformation,
    keys: Array,
    extra: PyTree = None,
    jit: Callable[..., Callable] = jax.jit,
) -> TrainState:
    """The state of several models before their first update.

    Args:
      init: `key -> params` of one model.
      optimizer: shared by all models.
      keys: typed PRNG keys of shape (models,). Equal keys give equal initial parameters, so that rivals can
        start from the same seed.
      extra: None, or a pytree whose leaves have the leading axis `models`.
      jit: how the state is computed: `jax.jit`; `jit_once`, quicker on a CPU, which rounds differently; `eagerly`;
        `abstractly`.

    Raises:
      ValueError: a leaf of `extra` has another leading axis.
    """
    for leaf in jax.tree.leaves(extra):
        if leaf.shape[:1] != keys.shape:
            raise ValueError(
                f"extra has a leaf of shape {leaf.shape}; expected ({keys.shape[0]}, ...), one row a model"
            )

    def create(keys: Array, extra: PyTree) -> TrainState:
        params = jax.vmap(init)(keys)
        return TrainState(jnp.zeros((), jnp.int32), params, jax.vmap(optimizer.init)(params), extra)

    return jit(create)(keys, extra)  # jitted: op by op, an initialisation compiles dozens of small programs


def member_keys(keys: Array, count: int) -> Array:
    """Independent keys of each model of a population: one for its start, one for its data, ...

    Args:
      keys: typed PRNG keys of shape (models,). Models with equal keys get equal ones.
      count: how many each needs.

    Returns:
      (count, models), to be unpacked: `init_keys, data_keys, step_keys = member_keys(keys, 3)`.
    """
    return jnp.moveaxis(jax.vmap(partial(jax.random.split, num=count))(keys), 1, 0)


def member(tree: PyTree, index: Any) -> PyTree:
    """Row `index` of every leaf: one model of a population's params, opt_state or extra."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
