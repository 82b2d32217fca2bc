"""ResNets as torchvision has them: He et al. (arXiv 1512.03385), the strided convolution of a bottleneck the 3x3 one.

Kernels are normal with variance 2 / fan_out, BatchNorm has momentum 0.9 (PyTorch's 0.1) and epsilon 1e-5. The result
are the pooled features; a classifier is the caller's. On a mesh, `jit` takes the statistics of a BatchNorm over the
whole batch, wherever its rows lie.

    encoder = ResNet50()
    variables = encoder.init(key, images)                              # params and batch_stats
    z, changed = encoder.apply(variables, images, train=True, mutable="batch_stats")
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from jaxpapers.nn.norms import torch_batch_norm
from jaxpapers.typing import AnyArray

STEMS = ("imagenet", "small")
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
BLUR = np.outer((1, 2, 1), (1, 2, 1)) / 16
BLUR_FROM = 16  # input channels


class Conv2d(nn.Module):
    """A convolution without bias, padded by half its window (PyTorch's padding: the same on all sides).

    Attributes:
        inputs: channels of the input of the full network.
        features: channels of the output of the full network.
        window: odd, height and width of the kernel.
        stride: of both axes.
        blur: a strided convolution of 16 channels or more sees its input through a 3x3 binomial filter (Zhang, arXiv
            1904.11486).
        fraction: of the output channels that are computed; of the kernel's inputs the first are used, as many as x has.
        dtype: of the computation; None: that of inputs and parameters.
    """

    inputs: int
    features: int
    window: int
    stride: int = 1
    blur: bool = False
    fraction: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "batch height width channels"]
    ) -> Float[Array, "batch height2 width2 features"]:
        """Applies the convolution.

        Raises:
            ValueError: more channels than the kernel has inputs; a fraction that is no whole number of channels.
        """
        channels, outputs = x.shape[-1], part_of(self.features, self.fraction)
        if channels > self.inputs:
            raise ValueError(f"a kernel of {self.inputs} inputs got {channels} channels")
        kernel = self.param("kernel", kaiming_fan_out, (self.window, self.window, self.inputs, self.features))
        x, kernel = map(jnp.asarray, promote_dtype(x, kernel[:, :, :channels, :outputs], dtype=self.dtype))
        if self.blur and self.stride > 1 and self.inputs >= BLUR_FROM:
            filters = jnp.broadcast_to(jnp.asarray(BLUR, x.dtype)[:, :, None, None], (3, 3, 1, channels))
            x = _convolve(x, filters, 1, groups=channels)
        return _convolve(x, kernel, self.stride)


def _convolve(x: Array, kernel: Array, stride: int, groups: int = 1) -> Array:
    half = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((half, half), (half, half)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def part_of(size: int, fraction: float) -> int:
    """The share of a size, where that is a whole number of at least 1.

    Raises:
        ValueError: it is not.
    """
    part = round(fraction * size)
    if not 1 <= part <= size or abs(part - fraction * size) > 1e-6:
        raise ValueError(f"a fraction of {fraction} of {size} is no whole number between 1 and {size}")
    return part


def batch_norm(name: str, fraction: float, train: bool, dtype: DTypeLike | None = None) -> nn.BatchNorm:
    """BatchNorm with PyTorch's constants; a narrowed network (fraction < 1) has norms of its own beside the full one's.

    Args:
        name: of the full network's norm.
        fraction: of the network.
        train: statistics of the batch instead of the running ones.
        dtype: of the computation.
    """
    own = name if fraction == 1 else f"{name}_{100 * fraction:g}"
    return torch_batch_norm(not train, dtype=dtype, name=own)


class ResidualBlock(nn.Module):
    """relu(x' + branch(x)).

    The branch: two 3x3 convolutions, or (bottleneck) 1x1, 3x3, 1x1 with four times the channels at the end. x' is x,
    or, where the shapes differ, a strided 1x1 convolution of it with a norm.

    Attributes:
        inputs: channels that come in, of the full network.
        width: channels of the 3x3 convolutions.
        stride: of the first 3x3 convolution.
        bottleneck: the three-layer branch.
        blur, fraction, dtype: see `ResNet`.
    """

    inputs: int
    width: int
    stride: int = 1
    bottleneck: bool = False
    blur: bool = False
    fraction: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch height2 width2 features"]:
        """Applies the block."""
        options: dict[str, Any] = {"blur": self.blur, "fraction": self.fraction, "dtype": self.dtype}
        norm = partial(batch_norm, fraction=self.fraction, train=train, dtype=self.dtype)
        outputs = self.width * (4 if self.bottleneck else 1)
        layers: tuple[tuple[int, int, int], ...]
        if self.bottleneck:
            layers = ((self.width, 1, 1), (self.width, 3, self.stride), (outputs, 1, 1))
        else:
            layers = ((self.width, 3, self.stride), (self.width, 3, 1))
        branch, inputs = x, self.inputs
        for index, (features, window, stride) in enumerate(layers):
            branch = nn.relu(branch) if index else branch
            branch = Conv2d(inputs, features, window, stride, name=f"conv{index}", **options)(branch)
            branch = norm(f"norm{index}")(branch)
            inputs = features
        if self.inputs != outputs or self.stride != 1:
            x = Conv2d(self.inputs, outputs, 1, self.stride, name="shortcut", **options)(x)
            x = norm("shortcut_norm")(x)
        return nn.relu(x + branch)


class ResNet(nn.Module):
    """Images to pooled features: a stem, stages of residual blocks, the mean over the plane.

    Attributes:
        stage_sizes: blocks of every stage; a stage has twice the channels of the one before, at half the resolution.
        bottleneck: blocks of three layers.
        width: channels of the first stage's 3x3 convolutions.
        stem: "imagenet": 7x7 with stride 2 and a 3x3 maximum with stride 2; "small": 3x3, for images of 32 pixels.
        blur: see `Conv2d`.
        fraction: of all channels, the first: a network within the network (slimmable, Yu et al., arXiv 1812.08928).
        dtype: of the computation; None: that of inputs and parameters. The features are float32 at least.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    stem: str = "imagenet"
    blur: bool = False
    fraction: float = 1.0
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch features"]:
        """Features of images.

        Args:
            x: images.
            train: BatchNorm by the batch's statistics; the running ones are then changed (`mutable="batch_stats"`).

        Raises:
            ValueError: an unknown stem; a fraction that is no whole number of channels.
        """
        if self.stem not in STEMS:
            raise ValueError(f"stem {self.stem!r} is unknown, expected one of {STEMS}")
        options: dict[str, Any] = {"fraction": self.fraction, "dtype": self.dtype}
        window, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        h = Conv2d(x.shape[-1], self.width, window, stride, self.blur, name="stem", **options)(x)
        h = nn.relu(batch_norm("stem_norm", self.fraction, train, self.dtype)(h))
        if self.stem == "imagenet":
            h = nn.max_pool(h, (3, 3), (2, 2), ((1, 1), (1, 1)))
        inputs = self.width
        for stage, blocks in enumerate(self.stage_sizes):
            for index in range(blocks):
                block = ResidualBlock(
                    inputs,
                    width := self.width * 2**stage,
                    2 if stage and not index else 1,
                    self.bottleneck,
                    self.blur,
                    name=f"stage{stage}_block{index}",
                    **options,
                )
                h = block(h, train)
                inputs = width * (4 if self.bottleneck else 1)
        return jnp.mean(h, axis=(1, 2), dtype=jnp.promote_types(h.dtype, jnp.float32))


TORCH_BATCH_NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def variables_from_torch(state_dict: Mapping[str, Shaped[np.ndarray, "..."]]) -> PyTree:
    """Variables of a `ResNet` from torchvision's, or from one that was derived from it (the weights of RAIVNLab/MRL).

    Read are `conv1`, `bn1`, `layer<s>.<b>.conv<i>`, `.bn<i>` and `.downsample.<0, 1>`, below `module.` or not; blurred
    convolutions have their weights in `<name>.conv.weight`, beside a `blur_filter`, which is `Conv2d`'s own. The
    classifier `fc` is the caller's.

    Raises:
        ValueError: a name that is none of these.
    """
    variables: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for name, value in state_dict.items():
        path = name.removeprefix("module.")
        if path.startswith("fc.") or path.endswith((".num_batches_tracked", ".blur_filter")):
            continue
        layer, _, kind = path.rpartition(".")
        place = _place(layer.removesuffix(".conv"))
        own = place[-1]
        norm = "norm" in own
        if not own or kind not in (TORCH_BATCH_NORM if norm else ("weight",)):
            raise ValueError(f"{name!r} is no parameter of a ResNet without its classifier")
        group, leaf = TORCH_BATCH_NORM[kind] if norm else ("params", "kernel")
        inner = variables[group]
        for part in place:
            inner = inner.setdefault(part, {})
        inner[leaf] = jnp.asarray(value if norm else np.transpose(value, (2, 3, 1, 0)))
    return variables


def _place(layer: str) -> tuple[str, ...]:
    """Names of a layer of torchvision's here; an empty one where it is unknown."""
    if layer in ("conv1", "bn1"):
        return ("stem" if layer == "conv1" else "stem_norm",)
    found = re.fullmatch(r"layer([1-9])\.(\d+)\.(?:(conv|bn)([1-9])|downsample\.([01]))", layer)
    if not found:
        return ("",)
    stage, block, kind, index, shortcut = found.groups()
    if shortcut is not None:
        own = ("shortcut", "shortcut_norm")[int(shortcut)]
    else:
        own = f"{'conv' if kind == 'conv' else 'norm'}{int(index) - 1}"
    return f"stage{int(stage) - 1}_block{block}", own


ResNet18: Callable[..., ResNet] = partial(ResNet, (2, 2, 2, 2))
ResNet34: Callable[..., ResNet] = partial(ResNet, (3, 4, 6, 3))
ResNet50: Callable[..., ResNet] = partial(ResNet, (3, 4, 6, 3), True)
