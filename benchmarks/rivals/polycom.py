"""A language model with PolyNorm; the authors compute it again in the backward pass, here it is not: that is faster."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.rivals import Arrays, Rival, pair
from jaxpapers.components.polycom import TransformerLM, params_from_torch, weight_decay_mask
from jaxpapers.nn.language import language_loss
from jaxpapers.train import make_optimizer

POINTS = {"4 layers, width 256": {}}
RATE, BETAS, DECAY, CLIP_NORM, EPSILON, ROTARY_BASE = 3e-3, (0.9, 0.95), 0.1, 1.0, 1e-6, 10_000.0


def make(
    torch: Any,
    *,
    batch: int = 8,
    context: int = 256,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    hidden: int = 1024,
    vocabulary: int = 65,
) -> Rival:
    """Queries, keys and values are one matrix there, and attention is PyTorch's own kernel."""
    nn = torch.nn
    torch.manual_seed(0)
    half = width // heads // 2
    angles = torch.arange(context)[:, None] * ROTARY_BASE ** (-torch.arange(half) / half)
    cosine, sine = (torch.cat([f(angles)] * 2, dim=1) for f in (torch.cos, torch.sin))

    def rotary(x):
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    class PolyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(3) / 3), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return their_polynorm(torch, x, self.weight, self.bias)

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense_h_to_4h = nn.Linear(width, hidden, bias=False)
            self.activation_func = PolyNorm()
            self.dense_4h_to_h = nn.Linear(hidden, width, bias=False)

        def forward(self, x):
            return self.dense_4h_to_h(self.activation_func(self.dense_h_to_4h(x)))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
            self.query_key_value = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width, bias=False)
            self.mlp = MLP()

        def forward(self, x):
            projected = self.query_key_value(self.attention_norm(x)).view(*x.shape[:2], 3, heads, -1)
            q, k, v = projected.permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
            x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
            return x + self.mlp(self.mlp_norm(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.layers = nn.Sequential(*(Layer() for _ in range(layers)))
            self.norm, self.head = nn.RMSNorm(width, 1e-5), nn.Linear(width, vocabulary, bias=False)
            for matrix in self.parameters():
                if matrix.dim() > 1:
                    nn.init.normal_(matrix, std=(2 / (5 * width)) ** 0.5)

        def forward(self, tokens):
            return self.head(self.norm(self.layers(self.embed(tokens))))

    def convert(arrays: Arrays) -> Any:
        params: dict[str, Any] = {
            "embed": {"embedding": arrays["embed.weight"]},
            "norm": {"scale": arrays["norm.weight"]},
            "head": {"kernel": arrays["head.weight"].T},
        }
        for layer in range(layers):
            start = f"layers.{layer}."
            own = {name.removeprefix(start): value for name, value in arrays.items() if name.startswith(start)}
            q, k, v = own["query_key_value.weight"].reshape(3, heads, -1, width).transpose(0, 3, 1, 2)
            out = own["out.weight"].T.reshape(heads, -1, width)
            kernels = {"query": q, "key": k, "value": v, "out": out}
            params.setdefault("blocks", {})[f"layers_{layer}"] = {
                "attention": {name: {"kernel": kernel} for name, kernel in kernels.items()},
                "attention_norm": {"scale": own["attention_norm.weight"]},
                "mlp_norm": {"scale": own["mlp_norm.weight"]},
                "mlp": params_from_torch(
                    {name.removeprefix("mlp."): value for name, value in own.items() if name.startswith("mlp.")}
                ),
            }
        return params

    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=(batch, context + 1))
    inputs, targets = torch.tensor(tokens[:, :-1]), torch.tensor(tokens[:, 1:]).flatten()
    theirs, ours = Model(), TransformerLM(width, layers, heads, hidden, vocabulary)
    spared = [value for name, value in theirs.named_parameters() if "norm" in name]
    decayed = [value for name, value in theirs.named_parameters() if "norm" not in name]

    def our_loss(params, extra, tokens, key):
        logits = ours.apply({"params": params}, tokens[:, :-1])
        return language_loss(logits, tokens[:, 1:])[0], (extra, {})

    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": spared, "weight_decay": 0.0}]
    options = {"b1": BETAS[0], "b2": BETAS[1], "weight_decay": DECAY, "mask": weight_decay_mask}
    return pair(
        torch,
        theirs,
        lambda: nn.functional.cross_entropy(theirs(inputs).flatten(0, 1), targets),
        torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True),
        convert,
        our_loss,
        make_optimizer("adamw", RATE, clip_norm=CLIP_NORM, **options),
        jnp.asarray(tokens, jnp.int32),
        clip_norm=CLIP_NORM,
    )


def their_polynorm(torch: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The authors' PolyNorm; the weights are those of x^3, x^2 and x."""

    def normalise(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)

    return weight[0] * normalise(x**3) + weight[1] * normalise(x**2) + weight[2] * normalise(x) + bias


def their_polyrelu(torch: Any, x: Any, weight: Any, bias: Any) -> Any:
    """The authors' PolyReLU; the weights are those of the cube, the square and ReLU itself."""
    x = torch.relu(x)
    return weight[0] * x**3 + weight[1] * x**2 + weight[2] * x + bias
