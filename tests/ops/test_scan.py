"""Affine recurrences: every structure and method against a NumPy loop in float64, derivatives against the oracle's."""

import itertools
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpapers.ops.scan import affine_scan, affine_scan_sharded, combine
from tests.marks import mostly_slow

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "pararnn" / "reduction.npz"))
STRUCTURES = ("diagonal", "block", "dense")
METHODS = ("sequential", "parallel", "chunked", "auto")
STATE = {"diagonal": (6,), "block": (2, 3), "dense": (4,)}
MATRIX = {"diagonal": (6,), "block": (2, 2, 3), "dense": (4, 4)}
PRODUCT = {"diagonal": "...d,...d->...d", "block": "...oin,...in->...on", "dense": "...oi,...i->...o"}
CHUNK_SIZES = {"sequential": None, "parallel": None, "auto": None, "chunked": 3}  # several chunks of few steps
COMPOSE = {"diagonal": "...d,...d->...d", "block": "...oin,...ijn->...ojn", "dense": "...oi,...ij->...oj"}


def problem(structure, length, batch=(), seed=0, scale=0.6):
    """A, b, h0 in float64, time first; |A| so small that products neither vanish nor grow."""
    rng = np.random.default_rng(seed)
    width = MATRIX[structure][1] if structure != "diagonal" else 1
    A = scale * rng.normal(size=(length, *batch, *MATRIX[structure])) / np.sqrt(width)
    b = rng.normal(size=(length, *batch, *STATE[structure]))
    return A, b, rng.normal(size=(*batch, *STATE[structure]))


def loop(A, b, h, structure, reverse=False):
    """The recurrence as it is written down, one step after the other: states, and products of the matrices."""
    size = {"diagonal": None, "block": 2, "dense": 4}[structure]
    identity = np.ones(1) if size is None else np.eye(size)[..., None] if structure == "block" else np.eye(size)
    states, products = np.zeros_like(b), np.zeros_like(A)
    product = identity
    for t in reversed(range(len(b))) if reverse else range(len(b)):
        h = np.einsum(PRODUCT[structure], A[t], h) + b[t]
        product = np.einsum(COMPOSE[structure], A[t], np.broadcast_to(product, A[t].shape))
        states[t], products[t] = h, product
    return states, products


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("method", ["parallel", "chunked"])
def test_the_golden_reductions_of_the_authors_cuda_kernels(structure, method):
    name = {"diagonal": "diag", "block": "block2", "dense": "dense"}[structure]
    A, b, expected = (np.moveaxis(GOLDEN[f"{name}_{part}"], 0, 1) for part in ("J", "r", "sol"))
    if structure == "block":  # (..., out x channel, in) there
        A = np.moveaxis(A.reshape(*A.shape[:2], 2, 5, 2), -1, -2)
        b, expected = (part.reshape(*part.shape[:2], 2, 5) for part in (b, expected))
    with jax.enable_x64(True):
        states = jax.jit(partial(affine_scan, structure=structure, method=method))(np.float64(A), np.float64(b))
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)


SHORT, LONG = (list(itertools.product(STRUCTURES, lengths, (False, True))) for lengths in ((0, 1), (20,)))
ALWAYS = [*SHORT, ("block", 20, False), ("dense", 20, True)]  # the random ones below have all, on fewer shapes


@pytest.mark.parametrize(("structure", "length", "reverse"), mostly_slow(SHORT + LONG, ALWAYS))
def test_every_method_is_the_loop(structure, length, reverse):
    A, b, h0 = problem(structure, length, (2,))
    expected, products = loop(A, b, h0, structure, reverse)
    with jax.enable_x64(True):
        # Chunks of 8 steps, the default, leave 4 over; chunks of 10 are loops.
        for method, size in (*((method, None) for method in METHODS), ("chunked", 10))[: None if length > 1 else -1]:
            options = {"structure": structure, "reverse": reverse, "return_products": True}
            options |= {"method": method, "chunk_size": size}
            states, cumulated = jax.jit(partial(affine_scan, **options))(A, b, h0)
            np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)  # float64: order of sums only
            np.testing.assert_allclose(cumulated, products, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("structure", mostly_slow(STRUCTURES, ("block",)))
def test_methods_agree_on_a_long_odd_length_in_float32(structure):
    A, b, h0 = problem(structure, 4097)
    expected, _ = loop(A, b, h0, structure)
    arrays = [np.float32(x) for x in (A, b, h0)]
    for method in METHODS:
        states = jax.jit(partial(affine_scan, structure=structure, method=method))(*arrays)
        assert states.dtype == jnp.float32
        np.testing.assert_allclose(states, expected, atol=1e-4)  # float32 states of size about 2
    # A length that long chunks divide: another route of the chunked method on CPU.
    A, b, h0 = arrays
    states = jax.jit(partial(affine_scan, structure=structure, method="chunked"))(A[:-1], b[:-1], h0)
    np.testing.assert_allclose(states, expected[:-1], atol=1e-4)


@given(
    structure=st.sampled_from(STRUCTURES),
    method=st.sampled_from(METHODS),
    shape=st.sampled_from([(2, ()), (3, (2,)), (17, (1,)), (31, (2, 3))]),  # primes
    reverse=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_random_shapes_and_values_are_the_loop(structure, method, shape, reverse, seed):
    A, b, h0 = problem(structure, *shape, seed=seed)
    expected, _ = loop(A, b, h0, structure, reverse)
    with jax.enable_x64(True):
        states = jax.jit(partial(affine_scan, structure=structure, method=method, reverse=reverse))(A, b, h0)
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)


@given(
    structure=st.sampled_from(STRUCTURES),
    length=st.sampled_from([13, 40]),
    chunk_size=st.sampled_from([2, 3, 8, 10, 16]),
    reverse=st.booleans(),
    with_h0=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=6)
def test_chunks_of_any_size_are_the_loop(structure, length, chunk_size, reverse, with_h0, seed):
    A, b, h0 = problem(structure, length, seed=seed)
    expected, _ = loop(A, b, h0 if with_h0 else 0 * h0, structure, reverse)
    with jax.enable_x64(True):
        options = {"structure": structure, "reverse": reverse, "method": "chunked", "chunk_size": chunk_size}
        states = jax.jit(partial(affine_scan, **options))(A, b, h0 if with_h0 else None)
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)


@given(structure=st.sampled_from(STRUCTURES), seed=st.integers(0, 10**6))
@settings(max_examples=9)
def test_the_operator_is_associative_with_an_identity_and_does_not_commute(structure, seed):
    A, b, h = problem(structure, 3, seed=seed)
    with jax.enable_x64(True):
        first, second, third = zip(jnp.asarray(A), jnp.asarray(b), strict=True)
        left = combine(combine(first, second, structure), third, structure)
        right = combine(first, combine(second, third, structure), structure)
        for one, other in zip(left, right, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
        product, offset = left
        applied = np.einsum(PRODUCT[structure], product, h) + offset
        swapped, straight = (combine(*pair, structure) for pair in ((second, first), (first, second)))
    np.testing.assert_allclose(applied, loop(A, b, h, structure)[0][-1], rtol=1e-10, atol=1e-12)
    assert not np.allclose(swapped[1], straight[1])


@pytest.mark.parametrize("structure", mostly_slow(STRUCTURES, ("block",)))
def test_batch_major_layout_and_broadcasting(structure):
    A, b, h0 = problem(structure, 12, (3,))
    expected, _ = loop(A, b, h0, structure)
    shared_expected, _ = loop(np.broadcast_to(A[:, :1], A.shape), b, h0, structure)
    constant_expected, _ = loop(np.broadcast_to(A[:1], A.shape), b, h0, structure)
    with jax.enable_x64(True):
        for method in METHODS:
            options = {"structure": structure, "method": method, "chunk_size": CHUNK_SIZES[method]}

            def three_layouts(A, b, h0, options=options):
                batch_major = affine_scan(jnp.moveaxis(A, 0, 1), jnp.moveaxis(b, 0, 1), h0, axis=1, **options)
                shared = affine_scan(A[:, 0], b, h0, **options)
                return jnp.moveaxis(batch_major, 1, 0), shared, affine_scan(A[:1], b, h0, **options)

            batch_major, shared, constant = jax.jit(three_layouts)(A, b, h0)
            np.testing.assert_allclose(batch_major, expected, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(shared, shared_expected, rtol=1e-10, atol=1e-12)
            np.testing.assert_allclose(constant, constant_expected, rtol=1e-10, atol=1e-12)


def oracle(A, b, h0, structure, reverse):
    """The recurrence by `lax.scan`, which JAX differentiates in its own way."""

    def body(h, inputs):
        matrix, offset = inputs
        h = jnp.einsum(PRODUCT[structure], matrix, h) + offset
        return h, h

    return jax.lax.scan(body, h0, (A, b), reverse=reverse)[1]


def scalar(solver, weights):
    return lambda A, b, h0: jnp.sum(jnp.sin(solver(A, b, h0)) * weights)


@pytest.mark.parametrize(("structure", "reverse"), list(itertools.product(STRUCTURES, [False, True])))
def test_gradients_are_those_of_the_oracle(structure, reverse):
    A, b, h0 = problem(structure, 20, (2,))
    weights = np.random.default_rng(1).normal(size=b.shape)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (A, b, h0)]
        expected = jax.grad(scalar(lambda *x: oracle(*x, structure, reverse), weights), (0, 1, 2))(*arrays)
        # Chunks of 8 steps leave 4 over, chunks of 10 are loops.
        for method, size in (
            (("sequential", None), ("chunked", 8)) if reverse else (("parallel", None), ("chunked", 10))
        ):

            def solver(A, b, h0, method=method, size=size):
                return affine_scan(A, b, h0, structure=structure, reverse=reverse, method=method, chunk_size=size)

            got = jax.jit(jax.grad(scalar(solver, weights), (0, 1, 2)))(*arrays)
            for one, other in zip(got, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("argnums", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_any_choice_of_inputs_can_be_differentiated(argnums):
    A, b, h0 = problem("diagonal", 5)
    weights = np.random.default_rng(1).normal(size=b.shape)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (A, b, h0)]
        expected = jax.grad(scalar(lambda *x: oracle(*x, "diagonal", False), weights), argnums)(*arrays)
        got = jax.jit(jax.grad(scalar(affine_scan, weights), argnums))(*arrays)
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_second_order_forward_mode_and_vmap(structure):
    A, b, h0 = problem(structure, 9)
    rng = np.random.default_rng(2)
    weights = rng.normal(size=b.shape)
    direction = [rng.normal(size=x.shape) for x in (A, b, h0)]
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x) for x in (A, b, h0))

        def second(solver):
            slope = lambda *x: sum(  # noqa: E731
                jnp.vdot(g, d) for g, d in zip(jax.grad(scalar(solver, weights), (0, 1, 2))(*x), direction, strict=True)
            )
            return jax.jit(jax.grad(slope, (0, 1, 2)))(*arrays)

        expected = second(lambda *x: oracle(*x, structure, False))
        tangents = jax.jvp(lambda *x: oracle(*x, structure, False), arrays, tuple(map(jnp.asarray, direction)))[1]
        for method in ("sequential", "chunked"):

            def solver(A, b, h0, method=method):
                return affine_scan(A, b, h0, structure=structure, method=method, chunk_size=CHUNK_SIZES[method])

            for one, other in zip(second(solver), expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
            pushed = jax.jit(lambda *x: jax.jvp(solver, x, tuple(map(jnp.asarray, direction)))[1])(*arrays)
            np.testing.assert_allclose(pushed, tangents, rtol=1e-9, atol=1e-11)
            stacked = [jnp.stack([x, 2 * x]) for x in arrays[1:]]
            mapped = jax.vmap(solver, (None, 0, 0))(arrays[0], *stacked)
            np.testing.assert_allclose(mapped[1], 2 * mapped[0], rtol=1e-10, atol=1e-12)  # linear in (b, h0)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_sum_over_what_was_broadcast_and_reach_the_products(structure):
    A, b, h0 = problem(structure, 8, (3,))
    weights = np.random.default_rng(3).normal(size=A[:, 0].shape)
    with jax.enable_x64(True):
        shared = jnp.asarray(A[:, 0])

        scan = partial(affine_scan, structure=structure, method="chunked", chunk_size=3)

        def states(A):
            return jnp.sum(jnp.square(scan(A, b, h0)))

        def products(A):
            return jnp.sum(scan(A, b[:, 0], return_products=True)[1] * weights)

        for function in map(jax.jit, (states, products)):
            got = jax.jit(jax.grad(function))(shared)
            # Central differences along one direction; their error is about 1e-10 relative.
            direction = np.random.default_rng(4).normal(size=shared.shape)
            step = 1e-5
            ahead, behind = (function(shared + sign * step * direction) for sign in (1, -1))
            np.testing.assert_allclose(jnp.vdot(got, direction), (ahead - behind) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_inputs_are_summed_in_float32(method):
    length = 2000
    b = jnp.ones((length, 1), jnp.bfloat16)
    states = jax.jit(partial(affine_scan, method=method))(jnp.ones((length, 1), jnp.bfloat16), b)
    assert states.dtype == jnp.bfloat16
    # A bfloat16 sum of ones would stop at 256.
    np.testing.assert_allclose(np.float32(states[-1]), length, rtol=2**-8)


@pytest.mark.parametrize("method", METHODS)
def test_100k_steps_stay_bounded_and_decay_without_nan(method):
    length = 100_000
    rng = np.random.default_rng(0)
    angles = rng.uniform(0, 2 * np.pi, length)
    rotations = np.stack([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]])
    A = np.float32(np.moveaxis(rotations, -1, 0)[..., None])  # orthogonal 2x2 blocks: norms must stay 1
    blocks = jax.jit(partial(affine_scan, structure="block", method=method))
    states = blocks(A, jnp.zeros((length, 2, 1)), jnp.array([[1.0], [0.0]]))
    norms = np.linalg.norm(np.asarray(states)[:, :, 0], axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-3)  # 1e5 roundings of 6e-8, mostly cancelling
    decays = jax.jit(partial(affine_scan, method=method))
    decayed = decays(jnp.full((length, 1), 0.5), jnp.zeros((length, 1)), jnp.ones(1))
    assert np.isfinite(decayed).all()
    assert decayed[-1] == 0
    np.testing.assert_allclose(decayed[:100, 0], 0.5 ** np.arange(1, 101), rtol=1e-6)


@pytest.mark.parametrize(("structure", "reverse"), list(itertools.product(STRUCTURES, [False, True])))
def test_a_sharded_sequence_gives_the_single_device_numbers(structure, reverse):
    mesh = Mesh(np.array(jax.devices()[:8]), ("seq",))
    A, b, h0 = problem(structure, 32, (2,))
    expected, _ = loop(A, b, h0, structure, reverse)
    weights = np.random.default_rng(5).normal(size=b.shape)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(x) for x in (A, b, h0)]

        def sharded(A, b, h0):
            return affine_scan_sharded(A, b, h0, mesh=mesh, structure=structure, reverse=reverse)

        np.testing.assert_allclose(jax.jit(sharded)(*arrays), expected, rtol=1e-10, atol=1e-12)
        single = jax.grad(scalar(lambda *x: oracle(*x, structure, reverse), weights), (0, 1, 2))(*arrays)
        several = jax.jit(jax.grad(scalar(sharded, weights), (0, 1, 2)))(*arrays)
        for one, other in zip(several, single, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="8"):
        affine_scan_sharded(A[:30], b[:30], mesh=mesh, structure=structure)


def test_a_batch_that_is_split_over_data_stays_so():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "seq"))
    A, b, _ = problem("diagonal", 12, (4,))
    expected, _ = loop(A, b, np.zeros_like(b[0]), "diagonal")
    split = NamedSharding(mesh, PartitionSpec("seq", "data"))
    with jax.enable_x64(True):
        arrays = [jax.device_put(x, split) for x in (A, b)]
        compiled = jax.jit(partial(affine_scan_sharded, mesh=mesh)).lower(*arrays).compile()
        states = compiled(*arrays)
    np.testing.assert_allclose(states, expected, rtol=1e-10, atol=1e-12)
    assert states.sharding.is_equivalent_to(split, states.ndim)
    # What travels are the summaries, one matrix and one vector a device and row; never the 12 steps or a device's 3.
    gathered = re.findall(r"= f64\[([\d,]+)\]\S* all-gather", compiled.as_text())
    assert gathered
    assert {int(shape.split(",")[0]) for shape in gathered} <= {1, 4}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: affine_scan(np.ones((5, 3)), np.ones((4, 3))), r"\(5, 3\)"),
        (lambda: affine_scan(np.ones((5, 3, 3)), np.ones((5, 3)), structure="blok"), "blok"),
        (lambda: affine_scan(np.ones((5, 3, 3)), np.ones((5, 3)), method="fast"), "fast"),
        (lambda: affine_scan(np.ones((5, 3)), np.ones((5, 3)), axis=1), "axis"),
        (lambda: affine_scan(np.ones((5, 3)), np.ones((5, 3)), axis=-1), "axis"),
        (lambda: affine_scan(np.ones((5, 3)), np.ones((5, 3)), method="chunked", chunk_size=1), "chunk_size"),
        (lambda: affine_scan(np.ones((5, 3)), np.ones((5, 3)), np.ones(4)), "h0"),
        (lambda: affine_scan(np.ones((5, 3), int), np.ones((5, 3), int)), "float"),
        (lambda: affine_scan(np.ones((5, 2, 3)), np.ones((5, 3)), structure="dense"), r"\(5, 2, 3\)"),
    ],
)
def test_bad_input_is_refused_at_the_door(call, message):
    with pytest.raises(ValueError, match=message):
        call()
