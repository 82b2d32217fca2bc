"""A stack of equal blocks, with the two options that decide what a deep model costs: rematerialisation and scan."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Sharding
from jaxtyping import Array, Float, PyTree, Shaped


class Stack(nn.Module):
    """`num_layers` blocks of one class, one after another: x <- block(x, *shared).

    Attributes:
        block: class of the blocks; a block takes x and returns an array of the same shape and dtype.
        num_layers: how many.
        options: arguments of the class, equal in all layers.
        remat: compute the activations inside a block again in the backward pass instead of keeping them: memory for
            one activation a layer, about a third more time.
        scan: one `lax.scan` over the layers instead of num_layers copies in the program: compilation takes as long as
            for one layer. The parameters of all layers then lie in one array each, with a leading axis of layers
            (under `layers` instead of `layers_0`, `layers_1`, ...; see `stack_layers`).
        sharding: where x lies between the blocks; None: the compiler decides, which beside parameters that are split
            over the devices of the batch may gather the batch instead of the parameters.
    """

    block: type[nn.Module]
    num_layers: int
    options: Mapping[str, Any]
    remat: bool = False
    scan: bool = False
    sharding: Sharding | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"], *shared: Shaped[Array, "..."] | None) -> Float[Array, "*shape"]:
        """Applies the blocks.

        Args:
            x: input of the first block.
            shared: further arguments that every block gets as they are, such as a mask.
        """
        # A scan keeps XLA from merging the second computation with the first; elsewhere the barrier must.
        block = nn.remat(self.block, prevent_cse=not self.scan) if self.remat else self.block

        def placed(x: Array) -> Array:
            return x if self.sharding is None else jax.lax.with_sharding_constraint(x, self.sharding)

        x = placed(x)
        if not self.scan:
            for layer in range(self.num_layers):
                x = placed(block(**self.options, name=f"layers_{layer}")(x, *shared))
            return x

        def body(layer: nn.Module, x: Array, *shared: Any) -> tuple[Array, None]:
            return placed(layer(x, *shared)), None

        scanned = nn.scan(
            body,
            variable_axes={"params": 0, "diagnostics": 0, "intermediates": 0},  # what layers sow, one row a layer
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.num_layers,
        )
        return scanned(block(**self.options, name="layers"), x, *shared)[0]


def stack_layers(params: PyTree) -> PyTree:
    """Parameters of a `Stack` with scan=False as those of one with scan=True: leaves with a leading axis of layers.

    Args:
        params: `{"layers_0": ..., "layers_1": ..., ...}`.

    Raises:
        ValueError: other keys than these.
    """
    names = [f"layers_{layer}" for layer in range(len(params))]
    if set(params) != set(names) or not names:
        raise ValueError(f"expected layers_0 to layers_{max(len(params) - 1, 0)}, got {sorted(params)}")
    return {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))}


def unstack_layers(params: PyTree) -> PyTree:
    """The inverse of `stack_layers`."""
    count = len(jax.tree.leaves(params)[0])
    return {f"layers_{layer}": jax.tree.map(lambda leaf, i=layer: leaf[i], params["layers"]) for layer in range(count)}
