"""ResNets against a numpy network in float64, and torchvision's numbers of parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpapers.nn.resnet import (
    BLUR,
    Conv2d,
    ResNet,
    ResNet18,
    ResNet34,
    ResNet50,
    part_of,
    variables_from_torch,
)
from jaxpapers.train import run_once

X = np.random.default_rng(0).normal(size=(3, 18, 15, 3)).astype(np.float32)


def convolve(x, kernel, stride):
    """Padded by half the window, as PyTorch does; every output position by itself."""
    window = kernel.shape[0]
    half = window // 2
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows, columns = ((size - window) // stride + 1 for size in x.shape[1:3])
    out = np.empty((len(x), rows, columns, kernel.shape[3]))
    for i, j in np.ndindex(rows, columns):
        patch = x[:, i * stride : i * stride + window, j * stride : j * stride + window]
        out[:, i, j] = np.einsum("bhwc,hwcf->bf", patch, kernel)
    return out


def blurred(x):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = x.shape[1:3]
    return sum(BLUR[i, j] * padded[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3))


def pooled(x):
    """The 3x3 maximum with stride 2, padded by -inf."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = ((size - 3) // 2 + 1 for size in x.shape[1:3])
    return np.stack(
        [[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max(axis=(1, 2)) for j in range(columns)] for i in range(rows)]
    ).transpose(2, 0, 1, 3)


class Reference:
    """The network in numpy, by its variables."""

    def __init__(self, model, variables, train):
        self.model, self.train = model, train
        self.params, self.statistics = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
        self.seen = {}

    def norm(self, x, *path):
        scale, running = self.params, self.statistics
        for name in path:
            scale, running = scale[name], running[name]
        mean, var = (x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))) if self.train else (running["mean"], running["var"])
        self.seen[path] = (mean, var, running)
        return (x - mean) / np.sqrt(var + 1e-5) * scale["scale"] + scale["bias"]

    def conv(self, x, kernel, stride):
        if self.model.blur and stride > 1 and kernel.shape[2] >= 16:
            x = blurred(x)
        return convolve(x, kernel, stride)

    def __call__(self, x):
        large = self.model.stem == "imagenet"
        x = self.conv(np.float64(x), self.params["stem"]["kernel"], 2 if large else 1)
        x = np.maximum(self.norm(x, "stem_norm"), 0)
        if large:
            x = pooled(x)
        for stage, blocks in enumerate(self.model.stage_sizes):
            for index in range(blocks):
                name, stride = f"stage{stage}_block{index}", 2 if stage and not index else 1
                block = self.params[name]
                # v1.5: the strided convolution of a bottleneck is the 3x3 one.
                strides = (1, stride, 1) if self.model.bottleneck else (stride, 1)
                branch = x
                for layer, layer_stride in enumerate(strides):
                    branch = self.conv(branch, block[f"conv{layer}"]["kernel"], layer_stride)
                    branch = self.norm(branch, name, f"norm{layer}")
                    branch = np.maximum(branch, 0) if layer < len(strides) - 1 else branch
                if "shortcut" in block:
                    x = self.norm(self.conv(x, block["shortcut"]["kernel"], stride), name, "shortcut_norm")
                x = np.maximum(x + branch, 0)
        return x.mean(axis=(1, 2))


@pytest.fixture(scope="module", params=["basic", "bottleneck"])
def network(request):
    """A small one with all its parts; norms with scales of their own."""
    if request.param == "basic":
        model = ResNet((1, 1), width=4, stem="small")
    else:
        model = ResNet((1, 2), True, width=4, blur=True)  # 16 channels go into the second stage
    variables = run_once(model.init, jax.random.key(0), X)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), variables)
    kernels = jax.tree.map(lambda own, leaf: leaf if leaf.ndim == 4 else own, drawn["params"], variables["params"])
    return model, {"params": kernels, "batch_stats": drawn["batch_stats"]}


@pytest.mark.parametrize("train", [False, True])
def test_features_and_running_statistics(network, train):
    model, variables = network
    reference = Reference(model, variables, train)
    expected = reference(X)
    if train:
        apply = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))
        z, changed = apply(variables, X)
        for path, (mean, var, before) in reference.seen.items():
            after = changed["batch_stats"]
            for name in path:
                after = after[name]
            np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, rtol=1e-3, atol=1e-4)
    else:
        z = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-4)  # float32 through a dozen layers


@pytest.mark.parametrize(
    ("make", "features", "parameters"),
    [(ResNet18, 512, 11_689_512), (ResNet34, 512, 21_797_672), (ResNet50, 2048, 25_557_032)],
)
def test_sizes_are_torchvisions(make, features, parameters):
    model = make()
    x = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert count + 1000 * (features + 1) == parameters  # its classifier included
    assert jax.eval_shape(model.apply, variables, x).shape == (2, features)


def test_kernels_start_as_kaimings():
    kernel = Conv2d(32, 64, 3).init(jax.random.key(0), jnp.ones((1, 4, 4, 32)))["params"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(np.std(kernel), np.sqrt(2 / (9 * 64)), rtol=0.02)  # 18,432 draws
    assert np.abs(kernel).max() > 3 * np.std(kernel)  # normal, not truncated at two deviations


def test_a_computation_in_bfloat16_pools_in_float32():
    model = ResNet((1,), width=4, stem="small", dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, X).dtype == jnp.float32


def torch_names(model):
    """(name in torchvision's state_dict, collection, path here) of all arrays; written out, not derived."""
    found = [("conv1.weight", "params", ("stem", "kernel"))]

    def norm(name, *path):
        for kind, collection, leaf in (
            ("weight", "params", "scale"),
            ("bias", "params", "bias"),
            ("running_mean", "batch_stats", "mean"),
            ("running_var", "batch_stats", "var"),
        ):
            found.append((f"{name}.{kind}", collection, (*path, leaf)))

    norm("bn1", "stem_norm")
    for stage, blocks in enumerate(model.stage_sizes):
        for index in range(blocks):
            name, block = f"layer{stage + 1}.{index}", f"stage{stage}_block{index}"
            first = stage > 0 and index == 0  # the block with a stride of 2: blurred where it has channels enough
            for layer in range(3 if model.bottleneck else 2):
                strided = first and layer == (1 if model.bottleneck else 0)
                end = ".conv.weight" if model.blur and strided and model.width * 2**stage >= 16 else ".weight"
                found.append((f"{name}.conv{layer + 1}{end}", "params", (block, f"conv{layer}", "kernel")))
                norm(f"{name}.bn{layer + 1}", block, f"norm{layer}")
            if first or (index == 0 and model.bottleneck):
                end = ".conv.weight" if model.blur and first else ".weight"
                found.append((f"{name}.downsample.0{end}", "params", (block, "shortcut", "kernel")))
                norm(f"{name}.downsample.1", block, "shortcut_norm")
    return found


@pytest.mark.parametrize("blur", [False, True])
def test_weights_come_from_torchvisions_names(blur):
    model = ResNet((1, 2), True, width=8, blur=blur)
    variables = jax.eval_shape(model.init, jax.random.key(0), X)
    rng, state = np.random.default_rng(0), {}
    expected = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), variables)
    for name, collection, path in torch_names(model):
        leaf = expected[collection]
        for part in path:
            leaf = leaf[part]
        state["module." + name] = np.moveaxis(leaf, (3, 2), (0, 1)) if leaf.ndim == 4 else leaf
        if name.endswith(".conv.weight"):
            state["module." + name.replace("conv.weight", "blur_filter")] = BLUR[None, None]
        if name.endswith("running_var"):
            state["module." + name.replace("running_var", "num_batches_tracked")] = np.array(7)
    assert any("blur_filter" in name for name in state) == blur
    state["module.fc.nesting_classifier_0.weight"] = np.zeros((5, 8), np.float32)
    found = variables_from_torch(state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for name in ("conv1.bias", "layer1.0.bn1.scale", "layer1.0.attention.weight", "conv2.weight"):
        with pytest.raises(ValueError, match=f"'{name}' is no parameter of a ResNet"):
            variables_from_torch({name: np.zeros(3, np.float32)})


@pytest.mark.slow
def test_features_are_torchvisions():
    torch = pytest.importorskip("torch")
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.resnet50(weights=None).eval()
    variables = variables_from_torch({name: value.numpy() for name, value in theirs.state_dict().items()})
    theirs.fc = torch.nn.Identity()
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    found = jax.jit(ResNet50().apply)(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())  # float32, 50 layers


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="stem 'cifar' is unknown"):
        ResNet(stem="cifar").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="a kernel of 2 inputs got 3 channels"):
        Conv2d(2, 4, 3).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"a fraction of 0\.3 of 64 is no whole number"):
        part_of(64, 0.3)
    with pytest.raises(ValueError, match=r"a fraction of 1\.5 of 4"):
        ResNet((1,), width=4, fraction=1.5).init(jax.random.key(0), X)
