"""The mixture-of-experts block of the paper's second model (OLMoE-1B-7B): 64 experts, 8 a token, one shared PolyNorm.

No token is dropped (see `nn.moe`). PolyNorm runs over one token's hidden vector in one expert, so every row of the
grouped product is normalised by itself. Rows that pad an expert's, or belong to masked tokens, are zeros: PolyNorm
would turn them into a_0, so they are masked on the way out.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from jaxpapers.components.polycom.feed_forward import (
    FIXED,
    GATED,
    LEARNED,
    check_activation,
    small_init,
)
from jaxpapers.nn.dense import Dense
from jaxpapers.nn.moe import apply_experts, grouped_dot, route
from jaxpapers.typing import AnyArray, Initializer


class MoEFeedForward(nn.Module):
    """A router and E feed-forward blocks, of which every token takes top_k; one activation for all of them.

    Sows `load_balance`, `router_z` and `load` into the collection `diagnostics` where it is mutable (`router_losses`).

    Attributes:
        hidden: units of an expert; of a gated one `matched_hidden` at equal parameters.
        num_experts: E.
        top_k: experts a token.
        activation: as of `FeedForward`.
        order: of the learned activations.
        kernel_init: of up, gate and router; None: `small_init` of the width.
        out_init: of down; None: as `kernel_init`.
        dtype: of the computation; None: that of inputs and parameters. The router is in float32 at least.
        block: rows of a block (see `grouped_dot`): 1 for accelerators, some dozens on a CPU.
        mesh: None, or where the batch is split over the axis `data`: each device then sorts its own tokens, and has
            the weights of all experts of a layer while it computes that layer.
    """

    hidden: int
    num_experts: int
    top_k: int
    activation: str = "polynorm"
    order: int = 3
    kernel_init: Initializer | None = None
    out_init: Initializer | None = None
    dtype: DTypeLike | None = None
    block: int = 1
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"], mask: Bool[AnyArray, "batch time"] | None = None
    ) -> Float[Array, "batch time width"]:
        """Applies the block.

        Args:
            x: tokens.
            mask: False for padding, which is not routed; its output is 0.

        Raises:
            ValueError: an unknown activation; top_k outside of 1..num_experts.
        """
        check_activation(self.activation)
        width = x.shape[-1]
        kernel_init = self.kernel_init or small_init(width)
        exact = jnp.promote_types(x.dtype, jnp.float32)
        router = Dense(self.num_experts, use_bias=False, kernel_init=kernel_init, dtype=exact, name="router")
        routing = route(router(x.astype(exact)), self.top_k, mask)
        if not self.is_initializing():
            for name, value in (
                ("load_balance", routing.load_balance),
                ("router_z", routing.z_loss),
                ("load", routing.load),
            ):
                self.sow("diagnostics", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))
        matrices = {
            name: self.param(name, init, (self.num_experts, *shape)).astype(self.dtype or x.dtype)
            for name, shape, init in (
                ("up", (width, self.hidden), kernel_init),
                *((("gate", (width, self.hidden), kernel_init),) if self.activation in GATED else ()),
                ("down", (self.hidden, width), self.out_init or kernel_init),
            )
        }
        act, act_params = self._shared_activation()

        def local(
            matrices: PyTree, act_params: PyTree, x: Array, experts: Array, weights: Array, mask: Array | None
        ) -> Array:
            def run(rows: Array, sizes: Array) -> Array:
                hidden = grouped_dot(rows, matrices["up"], sizes, self.block)
                if "gate" in matrices:
                    hidden = nn.silu(grouped_dot(rows, matrices["gate"], sizes, self.block)) * hidden
                else:
                    hidden = act(act_params, hidden)
                return grouped_dot(hidden, matrices["down"], sizes, self.block)

            flat_x, flat_experts, flat_weights = (part.reshape(-1, part.shape[-1]) for part in (x, experts, weights))
            flat_mask = None if mask is None else mask.reshape(-1)
            flat = apply_experts(flat_x, flat_experts, flat_weights, self.num_experts, run, flat_mask, self.block)
            return flat.reshape(x.shape)

        over_devices: Callable[..., Array] = local
        if self.mesh is not None:
            specs = (P(), P(), *[P("data")] * 3, None if mask is None else P("data"))
            over_devices = jax.shard_map(local, mesh=self.mesh, in_specs=specs, out_specs=P("data"))
        inputs = x.astype(self.dtype or x.dtype)
        return over_devices(matrices, act_params, inputs, routing.experts, routing.weights, mask)

    def _shared_activation(self) -> tuple[Callable[[PyTree, Array], Array], PyTree]:
        """The activation as a function of its parameters, which belong to this block, not to an expert."""
        if self.activation not in LEARNED:
            return lambda _, hidden: FIXED[self.activation](hidden), {}
        layer = LEARNED[self.activation](order=self.order, parent=None)
        params = self.param("activation", lambda key: layer.init(key, jnp.zeros((1, self.hidden)))["params"])
        return lambda params, hidden: jnp.asarray(layer.apply({"params": params}, hidden)), params


class RouterLosses(NamedTuple):
    """Means over the layers of what `route` returns, without their coefficients.

    Attributes:
        load_balance: 0.01 times it is added to the loss of OLMoE.
        z_loss: 0.001 times it.
    """

    load_balance: Float[Array, ""]
    z_loss: Float[Array, ""]


def router_losses(diagnostics: PyTree[Float[AnyArray, "..."]]) -> RouterLosses:
    """The routers' losses of a model, from the collection `diagnostics`; 0 for a model without experts.

    Use:
        logits, sown = model.apply({"params": params}, tokens, mutable="diagnostics")
        losses = router_losses(sown.get("diagnostics", {}))
    """
    found: dict[str, list[Array]] = {"load_balance": [], "router_z": []}
    for path, leaf in jax.tree.leaves_with_path(diagnostics):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name in found:
            found[name].append(jnp.mean(leaf))
    means = [jnp.mean(jnp.stack(values)) if values else jnp.zeros(()) for values in found.values()]
    return RouterLosses(*means)


def rows_from_blocks(blocks: Float[AnyArray, "blocks side side"], hidden: int) -> Float[Array, "rows hidden"]:
    """Hidden vectors from the layout of block-sparse products (MegaBlocks), which the authors' PolyNorm undoes.

    Args:
        blocks: square ones of a matrix (rows, hidden), row by row of blocks.
        hidden: columns of the matrix.

    Raises:
        ValueError: blocks that do not fill rows of so many columns.
    """
    count, side = blocks.shape[:2]
    if hidden % side or count % (hidden // side):
        raise ValueError(f"{count} blocks of side {side} do not fill a matrix of {hidden} columns")
    tiled = jnp.asarray(blocks).reshape(-1, hidden // side, side, side)
    return jnp.swapaxes(tiled, 1, 2).reshape(-1, hidden)


def blocks_from_rows(rows: Float[AnyArray, "rows hidden"], side: int) -> Float[Array, "blocks side side"]:
    """The inverse of `rows_from_blocks`.

    Raises:
        ValueError: a side that does not divide rows and columns.
    """
    if side < 1 or rows.shape[0] % side or rows.shape[1] % side:
        raise ValueError(f"blocks of side {side} do not fill a matrix of shape {rows.shape}")
    tiled = jnp.asarray(rows).reshape(-1, side, rows.shape[1] // side, side)
    return jnp.swapaxes(tiled, 1, 2).reshape(-1, side, side)
