"""A function of one step evaluated on tiles of its channels: what lets `fused` take any f.

A Pallas kernel works on tiles, a step of a recurrence is written for all channels. Its jaxpr is evaluated here with a
tile in the place of the channels (the last axis of every array), and with loops in Python in the place of all axes
before it. A value of shape (*lead, n) is an object array of shape lead whose entries are tiles; a value that is the
same for all channels and positions may have fewer axes, and a tile or a number as its entry.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type copy copy_p cos cosh
    digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma log log1p logistic lt max
    min mul ne neg nextafter not or pow reduce_precision rem round rsqrt select_n sign sin sinh sqrt square
    stop_gradient sub tan tanh xor
"""
ELEMENTWISE = frozenset(_NAMES.split())


def filled(shape: tuple[int, ...], tile: Any) -> np.ndarray:
    """A value of shape (*shape, n) with one tile everywhere."""
    value = np.empty(shape, object)
    for index in np.ndindex(shape):
        value[index] = tile
    return value


def on_tiles(closed: Any, channels: int, values: Sequence[np.ndarray], partial_sums: bool) -> list[np.ndarray]:
    """A jaxpr over channels, on tiles of them.

    Args:
        closed: the jaxpr; its constants are scalars.
        channels: their number in the jaxpr, not in the tiles.
        values: of its arguments.
        partial_sums: let a sum over channels be, one number a channel, to be summed by the caller: the cotangents of
            scalars are such sums, and nothing but linear maps with the same factor for all channels follows them.
    """
    jaxpr = closed.jaxpr
    environment: dict[Any, np.ndarray] = {}

    def read(atom: Any) -> np.ndarray:
        if isinstance(atom, core.Literal):
            aval: Any = atom.aval
            return filled((), jnp.asarray(atom.val, aval.dtype))
        return environment[atom]

    for variable, const in zip(jaxpr.constvars, closed.consts, strict=True):
        if np.ndim(const):
            raise ValueError(f"f makes an array of shape {np.shape(const)}, which is not the same for all channels")
        environment[variable] = filled((), jnp.asarray(const))
    environment.update(zip(jaxpr.invars, values, strict=True))
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        outputs = _equation(equation, operands, channels, partial_sums)
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(equation: Any, operands: list[np.ndarray], channels: int, partial_sums: bool) -> list[np.ndarray]:
    name, params = equation.primitive.name, equation.params
    if name in ELEMENTWISE:
        return [_elementwise(equation.primitive, params, operands)]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params and name not in ("scan", "while", "cond", "pallas_call"):
            inner = params[key]
            inner = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            return on_tiles(inner, channels, operands, partial_sums)
    shapes = [atom.aval.shape for atom in equation.invars]
    if name in STRUCTURAL:
        uniform = all(shape == () for shape in shapes)
        if name == "broadcast_in_dim" and uniform:
            return operands
        if all(not shape or shape[-1] == channels for shape in shapes):
            full = [np.broadcast_to(o, s[:-1]) for o, s in zip(operands, shapes, strict=True)]
            out = STRUCTURAL[name](full, shapes[0], params, partial_sums)
            if out is not None:
                return out
    raise ValueError(
        f"f is not channelwise, or uses what the fused kernel does not know: {name} of shapes {shapes} with "
        f"{channels} channels as the last axis; another method takes it"
    )


def _elementwise(primitive: Any, params: dict, operands: list[np.ndarray]) -> np.ndarray:
    shape = np.broadcast_shapes(*(o.shape for o in operands))
    operands = [np.broadcast_to(o, shape) for o in operands]
    out = np.empty(shape, object)
    for index in np.ndindex(shape):
        tiles: list[Any] = [o[index] for o in operands]
        tile_shape = np.broadcast_shapes(*(np.shape(t) for t in tiles))
        tiles = [t if np.shape(t) == tile_shape else jnp.broadcast_to(t, tile_shape) for t in tiles]
        out[index] = primitive.bind(*tiles, **params)
    return out


# Each takes (values, shape of the first, params, partial_sums), and returns None where it would touch the channels.


def _broadcast_in_dim(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    target, dimensions = params["shape"], params["broadcast_dimensions"]
    if dimensions[-1] != len(target) - 1 or target[-1] != shape[-1]:
        return None
    lead = [1] * (len(target) - 1)
    for size, dimension in zip(shape[:-1], dimensions[:-1], strict=True):
        lead[dimension] = size
    return [np.broadcast_to(values[0].reshape(lead), target[:-1])]


def _reshape(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    target = params["new_sizes"]
    if params.get("dimensions") is not None or not target or target[-1] != shape[-1]:
        return None
    return [values[0].reshape(target[:-1])]


def _squeeze(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    lead = len(shape) - 1
    return None if lead in params["dimensions"] else [np.squeeze(values[0], tuple(params["dimensions"]))]


def _expand_dims(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    dimensions = params["dimensions"]
    return None if len(shape) in dimensions else [np.expand_dims(values[0], tuple(dimensions))]


def _slice(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    strides = params["strides"] or (1,) * len(shape)
    cuts = [slice(*cut) for cut in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
    return [values[0][(..., *cuts[:-1])]] if cuts[-1] == slice(0, shape[-1], 1) else None


def _concatenate(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    axis = params["dimension"]
    return None if axis == len(shape) - 1 else [np.concatenate(values, axis)]


def _split(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    axis = params["axis"]
    return None if axis == len(shape) - 1 else np.split(values[0], np.cumsum(params["sizes"])[:-1], axis)


def _stack(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    axis = params["axis"]
    return None if axis == len(shape) else [np.stack(values, axis)]


def _unstack(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    axis = params["axis"]
    if axis == len(shape) - 1:
        return None
    moved = np.moveaxis(values[0], axis, 0)
    return [moved[i, ...] for i in range(shape[axis])]


def _transpose(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    order = params["permutation"]
    return None if order[-1] != len(shape) - 1 else [values[0].transpose(order[:-1])]


def _rev(values: list, shape: tuple, params: dict, _: bool) -> list | None:
    axes = params["dimensions"]
    return None if len(shape) - 1 in axes else [np.flip(values[0], axes)]


def _pad(values: list, shape: tuple[int, ...], params: dict, _: bool) -> list | None:
    config = params["padding_config"]
    if config[-1] != (0, 0, 0) or any(min(entry) < 0 for entry in config):
        return None
    sizes = [low + high + size + max(size - 1, 0) * gap for (low, high, gap), size in zip(config, shape, strict=True)]
    out = filled(tuple(map(int, sizes[:-1])), values[1][()])
    cuts = [
        slice(low, low + (size - 1) * (gap + 1) + 1, gap + 1)
        for (low, _, gap), size in zip(config[:-1], shape[:-1], strict=True)
    ]
    out[tuple(cuts)] = values[0] if cuts else values[0][()]
    return [out]


def _reduced(combine: Callable) -> Callable:
    def reduce(values: list, shape: tuple, params: dict, partial_sums: bool) -> list | None:
        axes = tuple(axis for axis in params["axes"] if axis < len(shape) - 1)
        if len(axes) < len(params["axes"]) and not (partial_sums and combine is jnp.add):
            return None
        kept = np.moveaxis(values[0], axes, range(len(axes)))
        flat = kept.reshape(-1, *kept.shape[len(axes) :])
        out = np.empty(flat.shape[1:], object)
        for index in np.ndindex(out.shape):
            out[index] = functools.reduce(combine, [flat[(i, *index)] for i in range(flat.shape[0])])
        return [out]

    return reduce


STRUCTURAL: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast_in_dim,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "slice": _slice,
    "concatenate": _concatenate,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "transpose": _transpose,
    "rev": _rev,
    "pad": _pad,
    "reduce_sum": _reduced(jnp.add),
    "reduce_max": _reduced(jnp.maximum),
    "reduce_min": _reduced(jnp.minimum),
    "reduce_prod": _reduced(jnp.multiply),
}
