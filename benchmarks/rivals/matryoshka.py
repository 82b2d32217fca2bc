"""Matryoshka heads on the multilayer perceptron of the claims, and on a ResNet18 for images of 32 pixels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rivals import AGREEMENT, Arrays, Rival, pair
from jaxpapers.nn.resnet import ResNet18, variables_from_torch
from jaxpapers.representation.matryoshka import NestedHead, SlimmableMLP, nested_cross_entropy, params_from_torch
from jaxpapers.train import make_optimizer

POINTS = {
    "perceptron 784-512-512-256": {},
    "ResNet18, 32 x 32": {"resnet": True, "batch": 32, "nesting": (8, 16, 32, 64, 128, 256, 512)},
}
RATE, DECAY, SMOOTHING = 3e-3, 1e-2, 0.1
# In float64 the ResNets agree to 2e-14. In float32 some of the millions of units before a ReLU lie within rounding of
# its kink, fall on different sides, and move the gradients of the layers before by up to 1%.
RESNET_AGREEMENT = 3e-2


def make(
    torch: Any,
    *,
    resnet: bool = False,
    batch: int = 128,
    classes: int = 242,
    nesting: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256),
    inputs: int = 784,
    hidden: tuple[int, ...] = (512, 512),
    side: int = 32,
) -> Rival:
    """The heads have the names of the authors' code, the ResNet torchvision's; the perceptron is mapped here."""
    nn = torch.nn
    torch.manual_seed(0)
    width = nesting[-1]

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            for i, m in enumerate(nesting):
                setattr(self, f"nesting_classifier_{i}", nn.Linear(m, classes))

        def forward(self, z):
            return [getattr(self, f"nesting_classifier_{i}")(z[:, :m]) for i, m in enumerate(nesting)]

    theirs = nn.ModuleDict({"encoder": their_resnet(nn, width) if resnet else their_mlp(nn, inputs, hidden, width)})
    theirs["head"] = Heads()
    ours = ResNet18(width=width // 8, stem="small") if resnet else SlimmableMLP(hidden, width)
    head = NestedHead(classes, nesting)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, side, side, 3) if resnet else (batch, inputs)).astype(np.float32)
    labels = rng.integers(classes, size=batch)
    images, targets = torch.tensor(np.moveaxis(x, -1, 1).copy() if resnet else x), torch.tensor(labels)

    def their_loss():
        logits = theirs["head"](theirs["encoder"](images))
        return sum(nn.functional.cross_entropy(each, targets, label_smoothing=SMOOTHING) for each in logits)

    def our_loss(params, statistics, batch, key):
        variables = {"params": params["encoder"], "batch_stats": statistics}
        z, changed = ours.apply(variables, batch["image"], train=True, mutable="batch_stats")
        logits = head.apply({"params": params["head"]}, z)
        loss = nested_cross_entropy(logits, batch["label"], label_smoothing=SMOOTHING)
        return loss, (changed["batch_stats"], {})

    def convert(arrays: Arrays) -> Any:
        parts: dict[str, dict[str, np.ndarray]] = {"encoder": {}, "head": {}}
        for name, value in arrays.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        encoder = variables_from_torch(parts["encoder"])["params"] if resnet else mlp_from_torch(parts["encoder"])
        return {"encoder": encoder, "head": params_from_torch(parts["head"])}

    shapes = jax.eval_shape(ours.init, jax.random.key(0), x)["batch_stats"]
    return pair(
        torch,
        theirs,
        their_loss,
        torch.optim.AdamW(theirs.parameters(), lr=RATE, weight_decay=DECAY, fused=True),
        convert,
        our_loss,
        make_optimizer("adamw", RATE, weight_decay=DECAY),
        {"image": jnp.asarray(x), "label": jnp.asarray(labels, jnp.int32)},
        extra=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes),  # training does not read them
        agreement=RESNET_AGREEMENT if resnet else AGREEMENT,
    )


def their_mlp(nn: Any, inputs: int, hidden: tuple[int, ...], features: int) -> Any:
    """Linear layers 0, 3, ... of a Sequential, BatchNorm 1, 4, ... and ReLU between them."""
    layers = []
    for units in hidden:
        layers += [nn.Linear(inputs, units), nn.BatchNorm1d(units), nn.ReLU()]
        inputs = units
    return nn.Sequential(*layers, nn.Linear(inputs, features))


def mlp_from_torch(arrays: Arrays) -> dict[str, Any]:
    """Parameters of our `SlimmableMLP`."""
    params: dict[str, Any] = {}
    for name, value in arrays.items():
        layer, _, kind = name.partition(".")
        index, norm = divmod(int(layer), 3)
        if norm:
            params.setdefault(f"norm_{index}", {})["scale" if kind == "weight" else "bias"] = value
        else:
            params[f"{'kernel' if kind == 'weight' else 'bias'}_{index}"] = value.T
    return params


def their_resnet(nn: Any, features: int) -> Any:
    """ResNet18 with torchvision's names, a 3x3 convolution as its stem."""

    def conv(inputs, outputs, window, stride):
        return nn.Conv2d(inputs, outputs, window, stride, padding=window // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.conv2 = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, 1)
            self.bn1, self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
            if stride > 1:
                self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            outputs = inputs = features // 8
            self.conv1, self.bn1, self.relu = conv(3, inputs, 3, 1), nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
            for stage in range(4):
                outputs = features // 8 * 2**stage
                first = Block(inputs, outputs, 2 if stage else 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(first, Block(outputs, outputs, 1)))
                inputs = outputs
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out")

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
                x = stage(x)
            return x.mean((2, 3))

    return ResNet()
