"""AL-RNN: training updates against PyTorch, k seeds under vmap against k runs, Newton against the sequential scan.

Three questions, each answered by ratios of one run:

1. How long does one training update take (teacher forcing, gradient, RAdam; M = 20, P = 2, T = 200, batch 16, the
   Lorenz-63 recipe), against the same algorithm as a user of PyTorch writes it: an nn.Module, a Python loop over
   time, torch.optim.RAdam? Both are given the same weights and windows, and must agree on loss and gradient
   before anything is timed.
2. How much cheaper are k models in one vmapped update than k updates (T = 64)?
3. How long do the sequential scan and Newton take for dense forcing (alpha = 0.2, T = 1024)? The sequential one wins
   on a CPU; Newton is for accelerators.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.timing import (
    environment,
    environment_line,
    paired_times,
    print_table,
    ratio_table,
    ratios,
    write_json,
)
from jaxpapers.data.dynamics import simulate_lorenz63, standardise
from jaxpapers.data.windows import sample_windows
from jaxpapers.sequence.alrnn import ALRNNParams, forcing_loss, init_params, teacher_forced

LATENT, OBSERVED, PWL, TAU, BATCH, RATE = 20, 3, 2, 16, 16, 1e-3


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks alrnn", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="samples of each rival")
    parser.add_argument("--models", type=int, default=12, help="models that train together in question 2")
    # More threads only wait for each other over matrices this small, and all the more where cores are busy.
    parser.add_argument("--torch-threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    torch = import_torch()
    torch.set_num_threads(args.torch_threads)

    series, _, _ = standardise(simulate_lorenz63(jax.random.key(0), 20_000))
    print(environment_line())
    results = {
        "update": compare_with_torch(torch, series, args.rounds),
        "seeds": compare_vmap(series, args.models, args.rounds),
        "methods": compare_methods(series, args.rounds),
    }
    if args.json:
        write_json(args.json, {"environment": environment() | {"torch": torch.__version__}, "seconds": results})
    return 0


def import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise SystemExit("error: the rival is PyTorch: pip install 'jaxpapers[bench]'") from None
    return torch


def make_update(optimizer: optax.GradientTransformation) -> Callable:
    """(params, optimizer state, windows) -> the same after one update, and the loss."""

    def update(params, state, windows):
        loss, gradient = jax.value_and_grad(forcing_loss)(params, windows, TAU, num_pwl=PWL)
        step, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, step), state, loss

    return update


class Training:
    """A model in training as a callable without arguments: each call makes one update, in place of the last."""

    def __init__(self, update: Callable, params: ALRNNParams, state: Any, windows: jax.Array):
        self.update = jax.jit(update, donate_argnums=(0, 1))
        # Donation frees the arrays given: keep the caller's.
        self.params, self.state = jax.tree.map(jnp.copy, (params, state))
        self.windows = windows

    def __call__(self) -> tuple[ALRNNParams, jax.Array]:
        """One update."""
        self.params, self.state, loss = self.update(self.params, self.state, self.windows)
        return self.params, loss


def torch_training(torch: Any, params: ALRNNParams, windows: np.ndarray) -> tuple[Callable, Callable, Any]:
    """The rival: (training update, loss, module)."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in params._asdict().items():
                if value is not None:
                    setattr(self, name, torch.nn.Parameter(torch.tensor(np.array(value))))

        def step(self, z):
            active = torch.cat([z[:, :-PWL], torch.relu(z[:, -PWL:])], dim=1)
            return self.a * z + active @ self.W.T + self.h

        def forward(self, x):
            z = torch.cat([x[:, 0], x[:, 0] @ self.L.T], dim=1)
            predictions = []
            for t in range(1, x.shape[1]):
                z = self.step(z)
                predictions.append(z[:, :OBSERVED])
                if t % TAU == 0:
                    z = torch.cat([x[:, t], z[:, OBSERVED:]], dim=1)
            return torch.stack(predictions, dim=1)

    model = Model()
    data = torch.tensor(windows)
    optimizer = torch.optim.RAdam(model.parameters(), lr=RATE)

    def loss():
        return torch.nn.functional.mse_loss(model(data), data[:, 1:])

    def update():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return update, loss, model


def check_agreement(torch: Any, params: ALRNNParams, windows: jax.Array, rival: tuple) -> None:
    """Refuse to time two programs that compute different things.

    Raises:
        SystemExit: if losses or gradients differ by more than 1e-4 of their size (float32 over 200 steps).
    """
    _, torch_loss, model = rival
    ours, gradient = jax.value_and_grad(forcing_loss)(params, windows, TAU, num_pwl=PWL)
    theirs = torch_loss()
    theirs.backward()
    pairs = {"loss": (ours, theirs.detach())}
    pairs |= {name: (getattr(gradient, name), getattr(model, name).grad) for name in ("a", "W", "h", "L")}
    model.zero_grad()
    for name, (mine, other) in pairs.items():
        error = float(np.max(np.abs(np.asarray(mine) - other.numpy())) / np.max(np.abs(other.numpy())))
        if not error < 1e-4:
            raise SystemExit(f"error: {name} differs from PyTorch's by {error:.1e} of its size")
    print(f"same loss ({float(ours):.6f}) and gradients for the same weights and windows")


def compare_with_torch(torch: Any, series: jax.Array, rounds: int) -> dict[str, list[float]]:
    params = init_params(jax.random.key(1), LATENT, OBSERVED)
    windows = sample_windows(jax.random.key(2), series, BATCH, 201)
    rival = torch_training(torch, params, np.array(windows))
    check_agreement(torch, params, windows, rival)
    optimizer = optax.radam(RATE)
    ours = Training(make_update(optimizer), params, optimizer.init(params), windows)
    times = paired_times({"jaxpapers": ours, "PyTorch": rival[0]}, rounds)
    print_table(ratio_table(f"One update, T = 200, batch {BATCH}", times, baseline="jaxpapers"))
    print(f"{ratios(times, 'jaxpapers')['PyTorch'].median:.1f} times PyTorch's updates per second\n")
    return times


def compare_vmap(series: jax.Array, models: int, rounds: int) -> dict[str, list[float]]:
    optimizer = optax.radam(RATE)
    update = make_update(optimizer)
    keys = jax.random.split(jax.random.key(3), models)
    params = jax.vmap(lambda key: init_params(key, LATENT, OBSERVED))(keys)
    state = jax.vmap(optimizer.init)(params)
    windows = jax.vmap(lambda key: sample_windows(key, series, BATCH, 65))(keys)
    together = Training(jax.vmap(update), params, state, windows)
    alone = [
        Training(update, *jax.tree.map(lambda leaf, row=row: leaf[row], (params, state, windows)))
        for row in range(models)
    ]
    names = f"{models} in one vmap", f"{models} one by one"
    calls: dict[str, Callable] = {names[0]: together, names[1]: lambda: [training() for training in alone]}
    times = paired_times(calls, rounds)
    print_table(ratio_table(f"Updates of {models} models, T = 64, batch {BATCH}", times, baseline=names[0]))
    return times


def compare_methods(series: jax.Array, rounds: int) -> dict[str, list[float]]:
    params = init_params(jax.random.key(4), LATENT, OBSERVED)
    windows = sample_windows(jax.random.key(5), series, 1, 1025)

    def forward(method: str) -> Callable:
        def run(params, windows):
            return teacher_forced(params, windows, 1, 0.2, num_pwl=PWL, forced="state", method=method)

        compiled = jax.jit(run)
        return lambda: compiled(params, windows)

    calls = {method: forward(method) for method in ("sequential", "newton")}
    iterations = int(calls["newton"]()[2].iterations.max())
    times = paired_times(calls, rounds)
    print(f"\nNewton: {iterations} iterations; on models trained on Lorenz-63 it needs 4 to 6")
    print_table(ratio_table("Forward pass, T = 1024, batch 1", times, baseline="sequential"))
    return times
