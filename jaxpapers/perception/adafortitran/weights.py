"""The authors' weights."""

import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util
from jaxtyping import Float, PyTree

from jaxpapers.perception.adafortitran.model import CONDITIONS
from jaxpapers.typing import AnyArray

TORCH_MODULES = (  # of AdaFortiTran, FortiTran, the linear estimator and CE-ViT -> here
    (r"pilot_upsampler", r"upsampler"),
    (r"initial_enhancer\.conv_block\.(\d+)", r"enhancer/convolutions/conv{half}"),
    (r"final_refiner\.conv_block\.(\d+)", r"refiner/convolutions/conv{half}"),
    (r"channel_adapter\.(?P<condition>snr|ds|dop)_encoder\.(\d+)", r"adapter/{condition}{half}"),
    (r"tokenizer\.(?P<condition>snr|ds|dop)_encoder\.linear", r"adapter/{condition}0"),
    (r"(?:transformer_)?encoder\.linear_1", r"encoder/embed"),
    (r"(?:transformer_)?encoder\.linear_2", r"encoder/unembed"),
    (r"linear", r"linear"),
)
TORCH_POSITIONS = ("transformer_encoder.positional_encoding.position_embeddings", "encoder.pos_encoding")
TORCH_LAYER = re.compile(r"(?:transformer_encoder\.transformer\.layers\.(\d+)|encoder\.transformer)\.(.+)")
TORCH_PARTS = {
    "self_attn.out_proj": "attention/out",
    "linear1": "mlp/up",
    "linear2": "mlp/down",
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
}


def params_from_torch(state_dict: Mapping[str, Float[AnyArray, "..."]]) -> PyTree:
    """Parameters of the authors' (Ada)FortiTran, linear estimator or CE-ViT for the modules here.

    Args:
        state_dict: PyTorch's, as arrays.

    Raises:
        ValueError: a name that none of these models has.
    """
    params: dict[str, AnyArray] = {}
    layers: dict[str, dict[int, AnyArray]] = {}
    for name, value in state_dict.items():
        value = np.asarray(value)
        if name in TORCH_POSITIONS:
            params["encoder/positions"] = value[0]
        elif layer := TORCH_LAYER.fullmatch(name):
            for path, part in _layer_from_torch(layer[2], value).items():
                layers.setdefault(f"encoder/layers/{path}", {})[int(layer[1] or 0)] = part
        else:
            module, _, leaf = name.rpartition(".")
            params[f"{_path_from_torch(module)}/{_leaf(leaf, value)}"] = _kernel(leaf, value)
    for path, rows in layers.items():
        params[path] = np.stack([rows[index] for index in range(len(rows))])
    return traverse_util.unflatten_dict(params, sep="/")


def _path_from_torch(module: str) -> str:
    for pattern, path in TORCH_MODULES:
        if match := re.fullmatch(pattern, module):
            numbers = [int(group) for group in match.groups() if group and group.isdigit()]
            groups = match.groupdict()
            condition = dict(zip(("snr", "ds", "dop"), CONDITIONS, strict=True)).get(groups.get("condition", ""))
            return path.format(half=numbers[0] // 2 if numbers else 0, condition=condition)
    raise ValueError(f"no parameter of these models is called {module}.*")


def _leaf(leaf: str, value: Float[AnyArray, "..."]) -> str:
    if leaf not in ("weight", "bias"):
        raise ValueError(f"no parameter of these models is called *.{leaf}")
    return "bias" if leaf == "bias" else "kernel" if value.ndim > 1 else "scale"


def _kernel(leaf: str, value: Float[AnyArray, "..."]) -> AnyArray:
    """(out, in, *window) -> (*window, in, out)."""
    return np.moveaxis(np.asarray(value), (1, 0), (-2, -1)) if leaf == "weight" and value.ndim > 1 else value


def _layer_from_torch(name: str, value: Float[AnyArray, "..."]) -> dict[str, AnyArray]:
    """An entry of torch.nn.TransformerEncoderLayer; queries, keys and values lie in one matrix there."""
    if name.startswith("self_attn.in_proj_"):
        leaf = name.removeprefix("self_attn.in_proj_")
        parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
        return {f"attention/{part}/{_leaf(leaf, rows)}": _kernel(leaf, rows) for part, rows in parts}
    module, _, leaf = name.rpartition(".")
    if module not in TORCH_PARTS:
        raise ValueError(f"no parameter of these models is called {name}")
    return {f"{TORCH_PARTS[module]}/{_leaf(leaf, value)}": _kernel(leaf, value)}
