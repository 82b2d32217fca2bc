"""The feed-forward block with any of the paper's activations, at equal parameters (Sec. 4).

FFN(x) = act(x W_up) W_down without biases; SwiGLU has a third matrix: (silu(x W_gate) * (x W_up)) W_down.
"""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxpapers.components.polycom.activations import (
    PolyCom,
    PolyNorm,
    PolyReLU,
    PolyReLUNorm,
    coeffs_from_reference,
)
from jaxpapers.nn.dense import Dense
from jaxpapers.nn.encoder import gelu
from jaxpapers.typing import AnyArray, Initializer

GATED = ("swiglu",)
FIXED: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "gelu": gelu,
}
LEARNED: dict[str, Callable[..., nn.Module]] = {
    "polynorm": PolyNorm,
    "polyrelu": PolyReLU,
    "polyprelu": partial(PolyCom, "prelu"),
    "polygelu": partial(PolyCom, "gelu"),
    "polysilu": partial(PolyCom, "silu"),
    "polyrelunorm": PolyReLUNorm,
}
NORMALISED = ("polynorm", "polyrelunorm")  # over the whole width
ACTIVATIONS = (*LEARNED, *GATED, *FIXED)


def matched_hidden(hidden: int, multiple: int = 1) -> int:
    """Units of a gated block with the parameters of an ungated one of `hidden` units: two thirds (8256 -> 5504).

    Args:
        hidden: units of the ungated block.
        multiple: of which the result has to be, such as 128.

    Raises:
        ValueError: two thirds of `hidden` are not such a multiple.
    """
    if hidden < 1 or multiple < 1 or 2 * hidden % (3 * multiple):
        raise ValueError(
            f"no gated block matches {hidden} units in multiples of {multiple}: two thirds of the units, "
            f"{2 * hidden / 3:g}, must be a multiple of it"
        )
    return 2 * hidden // 3


def small_init(width: int) -> Initializer:
    """N(0, 2 / (5 width)), the paper's initialisation of the dense model: standard deviation 0.014 at width 2048."""
    return nn.initializers.normal((2 / (5 * width)) ** 0.5)


def check_activation(activation: str) -> None:
    """Refuses an unknown activation.

    Raises:
        ValueError: it is none of `ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown, expected one of {ACTIVATIONS}")


class FeedForward(nn.Module):
    """act(up(x)), or silu(gate(x)) * up(x), and then down(...).

    Made by `partial(FeedForward, activation="polynorm", hidden=4 * width)` it is the `feed_forward` of a block that
    calls it with `dtype` and `name`.

    Attributes:
        hidden: units; at equal parameters a gated block has `matched_hidden` of an ungated one.
        activation: one of `ACTIVATIONS`.
        order: of the learned ones.
        kernel_init: of up and gate; None: `small_init` of the width.
        out_init: of down; None: as `kernel_init`.
        dtype: of the computation; None: that of inputs and parameters.
        axis_name: inside `jax.shard_map`, the mesh axis over which the units are split; `hidden` is then the number of
            this device's. Norms are those of all units, and so is the sum that comes out. `init` there with one key
            draws the same numbers on every device: fold the axis index into the key.
    """

    hidden: int
    activation: str = "polynorm"
    order: int = 3
    kernel_init: Initializer | None = None
    out_init: Initializer | None = None
    dtype: DTypeLike | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Applies the block.

        Raises:
            ValueError: an unknown activation; an order below 1.
        """
        check_activation(self.activation)
        kernel_init = self.kernel_init or small_init(x.shape[-1])

        def dense(features: int, init: Initializer, name: str) -> nn.Dense:
            return Dense(features, use_bias=False, kernel_init=init, dtype=self.dtype, name=name)

        y = dense(self.hidden, kernel_init, "up")(x)
        if self.activation in GATED:
            y = nn.silu(dense(self.hidden, kernel_init, "gate")(x)) * y
        elif self.activation in LEARNED:
            split = {"axis_name": self.axis_name} if self.activation in NORMALISED else {}
            y = LEARNED[self.activation](order=self.order, name="activation", **split)(y)
        else:
            y = FIXED[self.activation](y)
        y = dense(x.shape[-1], self.out_init or kernel_init, "down")(y)
        return y if self.axis_name is None else lax.psum(y, self.axis_name)


def params_from_torch(
    state_dict: Mapping[str, Float[AnyArray, "..."]],
) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
    """Parameters of a `FeedForward` from the authors' dense model: one layer's `mlp`.

    The authors publish whole models, PolyReLU_1B and PolyNorm_1B. What their files call the other tensors, and how
    they order the channels of queries and keys, could not be seen here: there is no converter of a whole model.

    Args:
        state_dict: `dense_h_to_4h.weight` (units, width), `dense_4h_to_h.weight` (width, units) and, of the learned
            activations, `activation_func.weight` and `activation_func.bias`. With twice the units in the first,
            its first half is the gate's.

    Raises:
        ValueError: two matrices that do not belong to one block.
    """
    up, down = (np.asarray(state_dict[f"dense_{name}.weight"]) for name in ("h_to_4h", "4h_to_h"))
    params = {"down": {"kernel": down.T}}
    hidden = down.shape[1]
    if up.shape == (hidden, len(down)):
        params |= {"up": {"kernel": up.T}}
    elif up.shape == (2 * hidden, len(down)):
        params |= {"gate": {"kernel": up[:hidden].T}, "up": {"kernel": up[hidden:].T}}
    else:
        raise ValueError(f"dense_h_to_4h.weight {up.shape} does not fit dense_4h_to_h.weight {down.shape}")
    if "activation_func.weight" in state_dict:
        coeffs = coeffs_from_reference(state_dict["activation_func.weight"], state_dict["activation_func.bias"])
        params |= {"activation": {"coeffs": coeffs}}
    return params
