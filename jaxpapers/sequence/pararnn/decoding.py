"""Generation: the prompt in parallel, then token by token from a state of constant size (Sec. 4.2).

    model, params = decoder(model, params, cache_length)
    logits, state = prefill(model, params, prompt)
    logits, state = decode_step(model, params, state, token)

The state is the model's `cache` collection: for a ParaRNN three inputs of the convolution and the cell's state per
layer, for Mamba2 likewise; for a Transformer the keys and values of `cache_length` tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from jaxpapers.nn.stack import unstack_layers
from jaxpapers.sequence.pararnn.model import ParaRNNLM
from jaxpapers.typing import AnyArray

Params = dict[str, PyTree[Shaped[AnyArray, "..."]]]
State = PyTree[Shaped[AnyArray, "..."]]


def decoder(model: ParaRNNLM, params: Params, cache_length: int) -> tuple[ParaRNNLM, Params]:
    """The model and its parameters as the functions below need them.

    Args:
        model: a language model, as it was trained.
        params: its parameters.
        cache_length: most tokens of a sequence, prompt included; only attention keeps something for each.

    Raises:
        ValueError: cache_length below 1.
    """
    if cache_length < 1:
        raise ValueError(f"cache_length must be at least 1, got {cache_length}")
    if model.scan:  # a scan over layers does not carry the collection `cache`
        params = {**params, "blocks": unstack_layers(params["blocks"])}
    return model.clone(cache_length=cache_length, scan=False, remat=False), params


def init_state(model: ParaRNNLM, params: Params, batch_size: int) -> State:
    """The state of an empty past.

    Raises:
        ValueError: a model that does not come from `decoder`.
    """
    if model.cache_length is None:
        raise ValueError("the model keeps no state: cache_length is None, expected a model from `decoder`")

    def after_one(params: Params) -> State:
        tokens = jnp.zeros((batch_size, 1), jnp.int32)
        return model.apply({"params": params}, tokens, mutable="cache")[1]["cache"]

    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(after_one, params))


def extend(
    model: ParaRNNLM, params: Params, state: State, tokens: Int[AnyArray, "batch time"]
) -> tuple[Float[Array, "batch vocab"], State]:
    """Reads tokens, all of them in parallel, after those that made the state.

    Returns:
        Logits of the token that follows the last one, and the new state. Attention gives NaN where the sequence has
        outgrown the cache.

    Raises:
        ValueError: no tokens.
    """
    if tokens.shape[1] < 1:
        raise ValueError(f"expected at least one token, got shape {tokens.shape}")
    logits, changed = model.apply({"params": params, "cache": state}, tokens, True, mutable="cache")
    return logits[:, -1], changed["cache"]


def prefill(
    model: ParaRNNLM, params: Params, tokens: Int[AnyArray, "batch time"]
) -> tuple[Float[Array, "batch vocab"], State]:
    """`extend` from the empty past.

    Raises:
        ValueError: a model that does not come from `decoder`; no tokens.
    """
    return extend(model, params, init_state(model, params, tokens.shape[0]), tokens)


def decode_step(
    model: ParaRNNLM, params: Params, state: State, token: Int[AnyArray, "batch"]
) -> tuple[Float[Array, "batch vocab"], State]:
    """One token more: logits of the one that follows, and the new state."""
    return extend(model, params, state, token[:, None])


def generate(
    key: PRNGKeyArray,
    model: ParaRNNLM,
    params: Params,
    prompt: Int[AnyArray, "batch time"],
    num_tokens: int,
    temperature: float | int = 1.0,
) -> Int[Array, "batch new"]:
    """Samples tokens that continue a prompt.

    Args:
        key: randomness.
        model: a language model, as it was trained.
        params: its parameters.
        prompt: tokens to start from.
        num_tokens: how many to draw.
        temperature: logits are divided by it; 0: always the likeliest token.

    Raises:
        ValueError: num_tokens below 1, temperature below 0, an empty prompt.
    """
    if num_tokens < 1 or not temperature >= 0:
        raise ValueError(f"expected num_tokens >= 1 and temperature >= 0, got {num_tokens} and {temperature}")
    model, params = decoder(model, params, prompt.shape[1] + num_tokens)

    def draw(key: PRNGKeyArray, logits: Array) -> Array:
        if temperature == 0:
            return jnp.argmax(logits, axis=-1)
        return jax.random.categorical(key, logits / temperature)

    def body(carry: tuple[Array, State], key: PRNGKeyArray) -> tuple[tuple[Array, State], Array]:
        logits, state = carry
        token = draw(key, logits)
        return decode_step(model, params, state, token), token

    return lax.scan(body, prefill(model, params, prompt), jax.random.split(key, num_tokens))[1].T
