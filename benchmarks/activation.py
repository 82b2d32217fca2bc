"""Activations, forward and backward: PolyNorm and PolyReLU plain, recomputed and fused, against others and PyTorch.

What stands between the two matrices of a feed-forward block, at the width of PolyCom's model of 1.3 billion parameters
and as many tokens as a CPU bears (the sequences of one device there: --rows 8192 --dtype bfloat16). A call takes inputs
and a cotangent, and returns values and gradients. The cotangent waits for all values, as it does in a network.

- `fused`: the library's functions, whose backward passes keep the inputs and a few numbers a token;
- `plain`: the formula as JAX differentiates it, and `remat`: the same within `jax.checkpoint`;
- `PyTorch`: the authors' functions, eager, and `PyTorch, recomputed`: within its `checkpoint`, as they are used. They
  take part on a CPU where PyTorch is installed.

No route is timed unless values and gradients agree. MiB are what JAX keeps between the passes, and the temporaries of
the compiled program; XLA drops the barriers of `jax.checkpoint` on CPUs, where `remat` has the temporaries of `plain`.
ReLU, GELU and the product of a SwiGLU stand beside the fused functions at equal parameters: the product has two inputs,
each of two thirds of the width. Last come whole updates of a language model, equal but for the activation.
"""

import argparse
import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.rivals import Training
from benchmarks.rivals.polycom import their_polynorm, their_polyrelu
from benchmarks.timing import (
    environment,
    environment_line,
    figure_table,
    find_rival,
    mebibytes,
    paired_times,
    print_table,
    ratios,
    write_json,
)
from benchmarks.training import SAMPLE_S
from experiments.timing import residual_bytes, temporary_bytes
from jaxpapers.components.polycom import (
    TransformerLM,
    coeffs_from_reference,
    coeffs_to_reference,
    matched_hidden,
    poly_norm,
    poly_relu,
    polycom,
    rms_normalise,
)
from jaxpapers.nn.encoder import gelu
from jaxpapers.nn.language import language_loss
from jaxpapers.train import jit_once, make_optimizer

COEFFS = np.float32([0.125, 0.375, -0.25, 0.5])  # exact in bfloat16, too
MODEL = {"width": 256, "num_layers": 4, "num_heads": 4, "hidden": 1056, "vocab_size": 65}
SEQUENCES, CONTEXT = 8, 256
MODELS = ("swiglu", "relu", "gelu", "polyrelu", "polynorm")
# Of an array's norm. PyTorch's powers are in the type of the inputs, ours in float32: in bfloat16 they differ by 4e-3.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2e-2}


class Candidate(NamedTuple):
    """An activation with coefficients, by every route."""

    fused: Callable[..., jax.Array]
    plain: Callable[..., jax.Array]
    theirs: Callable[..., Any]


CANDIDATES = {
    "PolyNorm": Candidate(poly_norm, partial(polycom, rho=rms_normalise, kind="II"), their_polynorm),
    "PolyReLU": Candidate(poly_relu, partial(polycom, rho=jax.nn.relu), their_polyrelu),
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks activation", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048, help="tokens")
    parser.add_argument("--width", type=int, default=8256, help="units of an ungated block, a multiple of 3")
    parser.add_argument("--dtype", choices=AGREEMENT, default="float32", help="of inputs and values")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each rival")
    parser.add_argument("--torch-threads", type=int, help="threads of PyTorch; its own choice without")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(argv)
    if args.rows < 1 or args.width < 1 or args.width % 3:
        parser.error(f"{args.rows} rows of width {args.width}: both must be at least 1, the width a multiple of 3")
    where = environment() | {"rows": args.rows, "width": args.width, "dtype": args.dtype}
    torch = find_torch(args.torch_threads)
    if torch:
        where |= {"torch": torch.__version__, "torch threads": torch.get_num_threads()}

    print(f"{environment_line()}, {args.rows} x {args.width} in {args.dtype}")
    keys = jax.random.split(jax.random.key(0), 3)
    x, other, g = (jax.random.normal(key, (args.rows, args.width), args.dtype) for key in keys)
    results = {name: compare_routes(name, x, g, torch, args.rounds) for name in CANDIDATES}
    results["activations"] = compare_activations(x, other, g, args.rounds)
    results["models"] = compare_models(args.rounds)
    if args.json:
        write_json(args.json, {"environment": where} | results)
    return 0


def find_torch(threads: int | None) -> Any:
    """PyTorch, or None where it takes no part."""
    torch = find_rival("PyTorch", lambda: importlib.import_module("torch"))
    if torch and threads is not None:
        torch.set_num_threads(threads)
    return torch


def compile_all(cases: Mapping[str, tuple]) -> tuple[dict[str, Callable], dict[str, dict[str, int]]]:
    """Programs and bytes of some cases (function, cotangent, *inputs).

    Returns:
        name -> `() -> (values, gradient of each input)`; name -> what is kept between the passes, and temporaries.
    """
    calls: dict[str, Callable] = {}
    memory = {}
    for name, (function, *arrays) in cases.items():
        program = jax.jit(partial(both_passes, function)).lower(*arrays).compile()
        calls[name] = partial(program, *arrays)
        kept, temporary = residual_bytes(function, *arrays[1:]), temporary_bytes(program)
        memory[name] = {"kept": kept, "temporary": temporary}
    return calls, memory


def both_passes(function: Callable[..., jax.Array], g: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Values and the gradient of each input."""
    values, pull = jax.vjp(function, *inputs)
    finite = jnp.isfinite(jnp.sum(values, dtype=jnp.float32))  # not known before all values are
    return values, *pull(jnp.where(finite, g, jnp.nan))


def compare_routes(name: str, x: jax.Array, g: jax.Array, torch: Any, rounds: int) -> dict[str, Any]:
    """Seconds per round and temporary bytes of every route to one activation.

    Raises:
        SystemExit: two routes compute different things.
    """
    candidate, coeffs = CANDIDATES[name], jnp.asarray(COEFFS)
    routes = {"fused": candidate.fused, "plain": candidate.plain, "remat": jax.checkpoint(candidate.plain)}
    ours = {route: (function, g, x, coeffs) for route, function in routes.items()}
    calls, memory = compile_all(ours)
    if torch:
        calls |= torch_calls(torch, candidate.theirs, x, g)
    expected = in_our_layout(calls["fused"]())
    for route, call in calls.items():
        refuse_disagreement(f"{name}, {route}", in_our_layout(call()), expected, AGREEMENT[f"{x.dtype}"])
    return measure(f"{name}, forward and backward", calls, memory, rounds)


def torch_calls(torch: Any, function: Callable[..., Any], x: jax.Array, g: jax.Array) -> dict[str, Callable]:
    """Both rivals: `() -> (values, gradients of inputs, weight and bias)`."""
    from torch.utils.checkpoint import checkpoint

    weight, bias = coeffs_to_reference(COEFFS)
    kind = getattr(torch, f"{x.dtype}")
    inputs = [torch.tensor(np.array(each, np.float32)).to(kind).requires_grad_() for each in (x, weight, bias)]
    cotangent = torch.tensor(np.array(g, np.float32)).to(kind)
    whole = partial(function, torch)

    def run(forward: Callable[..., Any]) -> tuple[Any, ...]:
        values = forward(*inputs)
        return values, *torch.autograd.grad(values, inputs, cotangent)

    return {
        "PyTorch": partial(run, whole),
        "PyTorch, recomputed": partial(run, partial(checkpoint, whole, use_reentrant=False)),
    }


def in_our_layout(results: Sequence[Any]) -> list[np.ndarray]:
    """Values, gradient of the inputs, and gradient of the coefficients as one array, in float32."""
    if isinstance(results[0], jax.Array):
        return [np.asarray(each, np.float32) for each in results]
    values, of_inputs, *of_coeffs = (each.detach().float().numpy() for each in results)
    return [values, of_inputs, coeffs_from_reference(*of_coeffs)]


def refuse_disagreement(
    where: str, found: Sequence[np.ndarray], expected: Sequence[np.ndarray], agreement: float
) -> None:
    """Raises SystemExit rather than let programs be timed that compute different things."""
    for what, mine, other in zip(("values", "dx", "da"), found, expected, strict=True):
        error = np.linalg.norm(mine - other) / np.linalg.norm(other)
        if not error <= agreement:
            raise SystemExit(f"error: {where}: {what} differs from the fused function's by {error:.1e} of its size")


def compare_activations(x: jax.Array, other: jax.Array, g: jax.Array, rounds: int) -> dict[str, Any]:
    """Seconds per round and temporary bytes of different activations."""
    coeffs = jnp.asarray(COEFFS)
    narrow, up, narrow_g = (each[:, : matched_hidden(x.shape[1])] for each in (x, other, g))
    cases: dict[str, tuple] = {
        "ReLU": (jax.nn.relu, g, x),
        "GELU": (gelu, g, x),
        "SwiGLU's product": (lambda gate, up: nn.silu(gate) * up, narrow_g, narrow, up),
        "PolyNorm": (poly_norm, g, x, coeffs),
        "PolyReLU": (poly_relu, g, x, coeffs),
    }
    calls, memory = compile_all(cases)
    return measure("Activations at equal parameters, forward and backward", calls, memory, rounds)


def compare_models(rounds: int) -> dict[str, Any]:
    """Seconds per round of an update of a language model with each activation, at equal parameters."""
    tokens = jax.random.randint(jax.random.key(0), (SEQUENCES, CONTEXT + 1), 0, MODEL["vocab_size"])
    times = paired_times({name: language_update(name, tokens) for name in MODELS}, rounds, SAMPLE_S)
    title = f"An update of {SEQUENCES} x {CONTEXT} tokens at equal parameters, float32"
    table = figure_table("", "ms", "tokens/s", "x swiglu", "quartiles", title=title)
    for name, ratio in ratios(times, "swiglu").items():
        seconds = statistics.median(times[name])
        rate = f"{SEQUENCES * CONTEXT / seconds:,.0f}"
        table.add_row(name, f"{1e3 * seconds:.1f}", rate, *ratio.cells())
    print_table(table)
    return {"seconds": times}


def language_update(activation: str, tokens: jax.Array) -> Training:
    """One AdamW update after another of a model with an activation, on the same tokens."""
    model = TransformerLM(activation=activation, **MODEL)

    def loss(params: Any, extra: Any, tokens: jax.Array, key: Any) -> tuple:
        return language_loss(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])[0], (extra, {})

    params = jit_once(model.init)(jax.random.key(0), tokens[:, :-1])["params"]
    return Training(loss, make_optimizer("adamw", 1e-3, clip_norm=1.0), params, None, tokens)


def measure(
    title: str, calls: Mapping[str, Callable], memory: Mapping[str, Mapping[str, int]], rounds: int
) -> dict[str, Any]:
    """Times all in turn and prints the table, of ratios to the first."""
    times = paired_times(calls, rounds, SAMPLE_S)
    baseline = next(iter(calls))
    table = figure_table("", "ms", f"x {baseline}", "quartiles", "MiB kept", "MiB temporary", title=title)
    for name, ratio in ratios(times, baseline).items():
        sizes = [mebibytes(memory[name][what]) if name in memory else "-" for what in ("kept", "temporary")]
        milliseconds = f"{1e3 * statistics.median(times[name]):.3f}"
        table.add_row(name, milliseconds, *ratio.cells(), *sizes)
    print_table(table)
    return {"seconds": times, "bytes": memory}
