"""AdaFortiTran on slots of 24 subcarriers, and on the paper's of 120."""

from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.rivals import Rival, pair
from jaxpapers.perception.adafortitran import AdaFortiTran, estimation_loss, params_from_torch
from jaxpapers.train import make_optimizer

POINTS = {
    "24 subcarriers, 3 layers": {"subcarriers": 24, "layers": 3},
    "120 subcarriers, 6 layers": {"subcarriers": 120, "layers": 6},
}
SYMBOLS, SPACING, COLUMNS, PATCH, RATE = 14, 3, 2, (3, 2), 1e-3


def make(
    torch: Any,
    subcarriers: int,
    layers: int,
    *,
    batch: int = 16,
    width: int = 32,
    heads: int = 4,
    dropout: float = 0.1,
    positions: int = 512,
) -> Rival:
    """Both sides have real and imaginary parts in one batch: faster than one after the other, as the authors do it."""
    nn = torch.nn
    torch.manual_seed(0)
    size, pilots = (subcarriers, SYMBOLS), (subcarriers // SPACING, COLUMNS)
    entries = PATCH[0] * PATCH[1]
    tokens = size[0] * size[1] // entries
    adapter = (7, 42, 2 * tokens)

    def with_relus(*layers):
        return nn.Sequential(*[part for layer in layers for part in (nn.ReLU(), layer)][1:])

    def enhancer():
        convolutions = (nn.Conv2d(*channels, 3, padding=1) for channels in pairwise((1, 8, 32, 8, 1)))
        return nn.ModuleDict({"conv_block": with_relus(*convolutions)})

    def encoder():
        return with_relus(*(nn.Linear(*sizes) for sizes in pairwise((1, *adapter))))

    class Transformer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear_1, self.linear_2 = nn.Linear(2 * entries, width), nn.Linear(width, entries)
            table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, positions, width), std=0.02))
            self.positional_encoding = nn.ParameterDict({"position_embeddings": table})
            layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True)
            self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

        def forward(self, x):
            x = self.linear_1(x)
            x = x + self.positional_encoding["position_embeddings"][:, : x.shape[1]]
            return self.linear_2(self.transformer(x))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pilot_upsampler = nn.Linear(pilots[0] * pilots[1], size[0] * size[1])
            self.initial_enhancer, self.final_refiner = enhancer(), enhancer()
            self.channel_adapter = nn.ModuleDict({f"{name}_encoder": encoder() for name in ("snr", "ds", "dop")})
            self.transformer_encoder = Transformer()
            self.unfold = nn.Unfold(PATCH, stride=PATCH)
            self.fold = nn.Fold(size, PATCH, stride=PATCH)

        def forward(self, ls, conditions):
            coarse = self.pilot_upsampler(torch.cat([ls.real, ls.imag]).flatten(1)).view(-1, 1, *size)
            clean = self.initial_enhancer["conv_block"](coarse)
            columns = zip(self.channel_adapter.values(), conditions.split(1, dim=1), strict=True)
            code = torch.cat([encode(column).view(-1, tokens, 2) for encode, column in columns], dim=2)
            x = torch.cat([self.unfold(clean).transpose(1, 2), code.repeat(2, 1, 1)], dim=2)
            residual = self.fold(self.transformer_encoder(x).transpose(1, 2))
            real, imaginary = self.final_refiner["conv_block"](clean + residual)[:, 0].chunk(2)
            return torch.complex(real, imaginary)

    rng = np.random.default_rng(0)
    ls, h = (rng.normal(size=(batch, *shape, 2)).astype(np.float32) @ (1, 1j) for shape in (pilots, size))
    ls, h = ls.astype(np.complex64), h.astype(np.complex64)
    conditions = rng.uniform(size=(batch, 3)).astype(np.float32) * np.float32([25, 300, 1000])
    theirs = Model()
    tensors = [torch.tensor(each) for each in (ls, conditions, h)]
    real = torch.view_as_real
    ours = AdaFortiTran(
        size,
        pilots,
        PATCH,
        width,
        heads,
        layers,
        positions,
        dropout,
        adapter_sizes=adapter,
    )

    def our_loss(params, extra, batch, key):
        ls, conditions, h = batch
        rngs = None if key is None else {"dropout": key}
        estimate = ours.apply({"params": params}, ls, conditions, deterministic=key is None, rngs=rngs)
        return estimation_loss(h, estimate), (extra, {})

    return pair(
        torch,
        theirs,
        lambda: nn.functional.mse_loss(real(theirs(*tensors[:2])), real(tensors[2])),
        torch.optim.Adam(theirs.parameters(), lr=RATE, fused=True),
        params_from_torch,
        our_loss,
        make_optimizer("adam", RATE),
        tuple(map(jnp.asarray, (ls, conditions, h))),
    )
