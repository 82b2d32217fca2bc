"""iTransformer on ETTh1's shapes, with 64 variates, and on electricity's shapes."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.rivals import Rival, pair
from jaxpapers.sequence.itransformer import ITransformer, params_from_torch
from jaxpapers.train import make_optimizer

POINTS = {
    "7 variates, width 256 (ETTh1)": {"variates": 7, "width": 256},
    "64 variates, width 128": {"variates": 64, "width": 128},
    # The authors' batch of 16 takes a CPU seconds.
    "321 variates, width 512 (electricity), 2 windows": {"variates": 321, "width": 512, "layers": 3, "batch": 2},
}
COVARIATES, EPSILON, RATE = 4, 1e-5, 1e-4


def make(
    torch: Any,
    variates: int,
    width: int,
    *,
    batch: int = 32,
    steps: int = 96,
    layers: int = 2,
    heads: int = 8,
    dropout: float = 0.1,
) -> Rival:
    """As many steps are forecast as the window has. The authors' convolutions of width 1 are Linear: it is faster."""
    nn = torch.nn
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("query", "key", "value", "out"):
                setattr(self, f"{name}_projection", nn.Linear(width, width))
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            projections = self.query_projection, self.key_projection, self.value_projection
            q, k, v = (projection(x).view(*x.shape[:2], heads, -1) for projection in projections)
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
            weights = self.dropout(torch.softmax(logits, dim=-1))
            return self.out_projection(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()
            self.conv1, self.conv2 = nn.Linear(width, width), nn.Linear(width, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x):
            x = self.norm1(x + self.dropout(self.attention(x)))
            y = self.dropout(nn.functional.gelu(self.conv1(x)))
            return self.norm2(x + self.dropout(self.conv2(y)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc_embedding = nn.ModuleDict({"value_embedding": nn.Linear(steps, width)})
            blocks = nn.ModuleList([Layer() for _ in range(layers)])
            self.encoder = nn.ModuleDict({"attn_layers": blocks, "norm": nn.LayerNorm(width)})
            self.projector = nn.Linear(width, steps)
            self.dropout = nn.Dropout(dropout)

        def forward(self, x, marks):
            mean = x.mean(1, keepdim=True)
            x = x - mean
            deviation = torch.sqrt(x.var(1, keepdim=True, unbiased=False) + EPSILON)
            tokens = torch.cat([x / deviation, marks], dim=2).transpose(1, 2)
            h = self.dropout(self.enc_embedding["value_embedding"](tokens))
            for layer in self.encoder["attn_layers"]:
                h = layer(h)
            y = self.projector(self.encoder["norm"](h)).transpose(1, 2)[:, :, :variates]
            return y * deviation + mean

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, batch, steps, variates)).astype(np.float32)
    marks = rng.uniform(-0.5, 0.5, (batch, steps, COVARIATES)).astype(np.float32)
    theirs = Model()
    tensors = [torch.tensor(each) for each in (x, marks, y)]
    ours = ITransformer(steps, width, width, layers, heads, dropout_rate=dropout)

    def our_loss(params, extra, batch, key):
        x, marks, y = batch
        rngs = None if key is None else {"dropout": key}
        found = ours.apply({"params": params}, x, marks, deterministic=key is None, rngs=rngs)
        return jnp.mean(jnp.square(found - y)), (extra, {})

    return pair(
        torch,
        theirs,
        lambda: nn.functional.mse_loss(theirs(*tensors[:2]), tensors[2]),
        torch.optim.Adam(theirs.parameters(), lr=RATE, fused=True),
        params_from_torch,
        our_loss,
        make_optimizer("adam", RATE),
        tuple(map(jnp.asarray, (x, marks, y))),
    )
