"""Recurrences solved by Newton's method against one step after the other: states, derivatives, diagnostics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

from jaxpapers.ops.newton import check_structure, solve_recurrence
from tests.marks import mostly_slow

LENGTH, BATCH, WIDTH = 24, 2, 4
TIGHT = {"max_iterations": LENGTH, "tolerance": 1e-13}


def diagonal(params, h, x):
    """A gated unit for each channel."""
    gate = jax.nn.sigmoid(params[0] * h + x)
    return (1 - gate) * h + gate * jnp.tanh(params[1] * h - x)


def block(params, h, x):
    """Two numbers a channel that mix: state (2, n)."""
    c, y = h
    c = jnp.tanh(params[0, :2] * y + x[0]) * 0.9 + 0.3 * c
    return jnp.stack([c, jnp.tanh(c * params[1, :2] - 0.5 * y + x[1])])


def dense(params, h, x):
    return jnp.tanh(params @ h + x)


CELLS = {"diagonal": diagonal, "block": block, "dense": dense, "quasi": dense}
STATE = {"diagonal": (WIDTH,), "block": (2, 2), "dense": (WIDTH,), "quasi": (WIDTH,)}
CASES = [(structure, method) for structure in CELLS for method in ("sequential", "parallel")] + [("block", "chunked")]
CASES += [("diagonal", "fused"), ("block", "fused")]
ALWAYS = (("diagonal", "parallel"), ("dense", "parallel"), ("block", "sequential"), ("block", "chunked"), CASES[-1])


def problem(structure, length=LENGTH, batch=(BATCH,), scale=0.5, seed=0):
    rng = np.random.default_rng(seed)
    params = scale * rng.normal(size=(WIDTH, WIDTH))
    xs = rng.normal(size=(length, *batch, *STATE[structure]))
    return params, xs, rng.normal(size=(*batch, *STATE[structure]))


def one_by_one(structure, params, xs, h0):
    def body(h, x):
        h = jax.vmap(partial(CELLS[structure], params))(h, x)
        return h, h

    return lax.scan(body, h0, xs)[1]


def solve(structure, params, xs, h0, **options):
    if structure == "block":
        params = params[:, :2]  # a number for each channel is what the fused method wants
    return solve_recurrence(lambda h, x: CELLS[structure](params, h, x), xs, h0, structure=structure, **options)


@pytest.mark.parametrize(("structure", "method"), mostly_slow(CASES, ALWAYS))
def test_states_and_derivatives_are_those_of_the_loop(structure, method):
    arrays = problem(structure)
    weights = np.random.default_rng(1).normal(size=arrays[1].shape)
    directions = [np.random.default_rng(2).normal(size=array.shape) for array in arrays]
    with jax.enable_x64(True):

        def scalar(solver):
            return lambda *arrays: jnp.sum(weights * jnp.sin(solver(*arrays)))

        def everything(solver):
            def run(*arrays):
                gradient = jax.grad(scalar(solver), (0, 1, 2))
                return solver(*arrays), *jax.jvp(
                    gradient, arrays, tuple(directions)
                )  # second order: forward on reverse

            return jax.jit(run)

        expected = everything(partial(one_by_one, structure))(*arrays)
        options = {} if method in ("sequential", "fused") else TIGHT
        mine = everything(lambda *arrays: solve(structure, *arrays, method=method, **options).states)(*arrays)
    # The states are solved to 1e-13, and the derivatives are sums of about 50 of them.
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("structure", mostly_slow(("diagonal", "block", "dense"), ("diagonal",)))
def test_a_closed_form_jacobian_serves_as_well(structure):
    params, xs, h0 = problem(structure)

    def closed_form(params, h, x):
        full = jax.jacrev(partial(CELLS[structure], params))(h, x)
        if structure == "diagonal":
            return jnp.diagonal(full)
        return jnp.einsum("aibi->abi", full) if structure == "block" else full

    def loss(params, given):
        jacobian = partial(closed_form, params) if given else None
        return jnp.sum(solve(structure, params, xs, h0, jacobian=jacobian, method="parallel", **TIGHT).states ** 3)

    with jax.enable_x64(True):
        first = jax.grad(loss)
        second = jax.grad(lambda params, given: jnp.sum(first(params, given) ** 2))
        for derivative in (first, second):
            mine, other = (jax.jit(derivative, static_argnums=1)(params, given) for given in (True, False))
            np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-11)


def test_after_k_iterations_the_first_k_states_are_exact():
    params, xs, h0 = problem("dense", scale=1.5)
    with jax.enable_x64(True):
        expected = one_by_one("dense", params, xs, h0)
        for iterations in (1, 2, 5, 9):
            states = solve("dense", params, xs, h0, max_iterations=iterations, method="parallel").states
            # The guess f(0, x) makes no state exact here, as h0 is not 0; each iteration adds one.
            np.testing.assert_allclose(states[:iterations], expected[:iterations], rtol=1e-10, atol=1e-12)
            assert float(jnp.abs(states - expected).max()) > 1e-6


def test_a_recurrence_that_is_linear_takes_one_iteration():
    params, xs, h0 = problem("dense")
    found = solve_recurrence(
        lambda h, x: jnp.float32(params) @ h + x,
        jnp.float32(xs),
        jnp.float32(h0),
        structure="dense",
        method="parallel",
        tolerance=1e-5,
        max_iterations=9,
    )
    assert int(found.iterations) == 1
    assert bool(found.converged)
    np.testing.assert_array_equal(np.isnan(found.residuals), [False] * 2 + [True] * 8)


def test_from_the_solution_nothing_moves():
    params, xs, h0 = problem("block")
    with jax.enable_x64(True):
        states = solve("block", params, xs, h0, method="parallel", **TIGHT).states
        again = solve("block", params, xs, h0, guess=states, method="parallel", tolerance=1e-12)
        assert int(again.iterations) == 0
        np.testing.assert_array_equal(again.states, states)


@pytest.mark.parametrize("structure", ["diagonal", "block", "dense"])
def test_one_step_is_one_step_without_batch(structure):
    params, xs, h0 = problem(structure, length=1, batch=())
    with jax.enable_x64(True):
        states = solve(structure, params, xs, h0, method="parallel").states
        np.testing.assert_allclose(states[0], CELLS[structure](params, h0, xs[0]), rtol=1e-12)


def test_the_quasi_newton_takes_more_iterations_to_the_same_states():
    params, xs, h0 = problem("dense")
    with jax.enable_x64(True):
        exact, quasi = (
            solve(structure, params, xs, h0, method="parallel", **TIGHT) for structure in ("dense", "quasi")
        )
    np.testing.assert_allclose(quasi.states, exact.states, atol=1e-11)
    assert int(exact.iterations) < int(quasi.iterations) <= LENGTH


def explosive(h, x):
    """Slopes up to 6 at every step: products of hundreds of them overflow float32."""
    return jnp.sin(6 * h + x)


def test_divergence_is_reported_and_the_loop_falls_in_on_request():
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(400, 2)), jnp.float32)
    options = {"structure": "diagonal", "method": "parallel", "max_iterations": 10, "tolerance": 1e-4}
    alone = jax.jit(lambda xs: solve_recurrence(explosive, xs, jnp.zeros(2), **options))(xs)
    assert not bool(alone.converged)
    helped = jax.jit(lambda xs: solve_recurrence(explosive, xs, jnp.zeros(2), fallback="sequential", **options))(xs)
    assert not bool(helped.converged)  # the diagnostics stay those of the iteration
    expected = solve_recurrence(explosive, xs, jnp.zeros(2), structure="diagonal", method="sequential").states
    np.testing.assert_array_equal(helped.states, expected)
    # Without a tolerance, too, what is far from a solution has not converged.
    del options["tolerance"]
    assert not bool(jax.jit(lambda xs: solve_recurrence(explosive, xs, jnp.zeros(2), **options))(xs).converged)


def test_a_lost_sequence_leaves_the_others_alone():
    params, xs, h0 = problem("diagonal")
    xs = np.asarray(xs, np.float32)
    xs[5, 0, 1] = np.nan
    options = {"method": "parallel", "max_iterations": LENGTH, "tolerance": 1e-6}
    found = solve("diagonal", np.float32(params), jnp.asarray(xs), jnp.asarray(h0, jnp.float32), **options)
    assert not bool(found.converged)
    expected = one_by_one("diagonal", np.float32(params), jnp.asarray(xs), jnp.asarray(h0, jnp.float32))
    np.testing.assert_allclose(found.states[:, 1], expected[:, 1], atol=1e-6)  # float32


def test_gradients_through_the_fallback_are_those_of_the_loop():
    params, xs, h0 = problem("dense", scale=1.5)
    with jax.enable_x64(True):

        def loss(solver):
            return jax.jit(jax.grad(lambda params: jnp.sum(solver(params) ** 3)))

        options = {"method": "parallel", "max_iterations": 1, "tolerance": 1e-12, "fallback": "sequential"}
        mine = loss(lambda params: solve("dense", params, xs, h0, **options).states)(params)
        np.testing.assert_allclose(mine, loss(lambda p: one_by_one("dense", p, xs, h0))(params), rtol=1e-9)


def test_trust_holds_steps_back_that_would_blow_up():
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(200, 2)), jnp.float32)
    options = {"structure": "diagonal", "method": "parallel", "max_iterations": 8}
    bold = solve_recurrence(explosive, xs, jnp.zeros(2), **options)
    careful = solve_recurrence(explosive, xs, jnp.zeros(2), trust=1.0, **options)
    # sin is at most 1, so are the states: iterates far beyond are the blow-up.
    assert not float(jnp.abs(bold.states).max()) < 1e3
    assert float(jnp.abs(careful.states).max()) < 10
    params, xs, h0 = problem("diagonal")
    with jax.enable_x64(True):
        options = {"method": "parallel", "max_iterations": 200, "tolerance": 1e-12}
        held = solve("diagonal", params, xs, h0, trust=0.5, **options)
        np.testing.assert_allclose(held.states, one_by_one("diagonal", params, xs, h0), atol=1e-11)
        assert int(held.iterations) > int(solve("diagonal", params, xs, h0, **options).iterations)


def test_trust_is_the_kalman_filter_of_the_textbook():
    from jaxpapers.ops.newton import _held_back

    J, r = np.random.default_rng(0).normal(size=(2, 30))
    trust, mean, variance, expected = 0.7, 0.0, 0.0, []
    for slope, drift in zip(J, r, strict=True):
        predicted, spread = slope * mean + drift, slope**2 * variance + 1
        gain = spread / (spread + 1 / trust)
        mean, variance = predicted - gain * predicted, (1 - gain) * spread
        expected.append(mean)
    with jax.enable_x64(True):
        J, r = _held_back(jnp.asarray(J), jnp.asarray(r), trust)
    mean, filtered = 0.0, []
    for slope, drift in zip(np.asarray(J), np.asarray(r), strict=True):
        mean = slope * mean + drift
        filtered.append(mean)
    np.testing.assert_allclose(filtered, expected, rtol=1e-12)


@pytest.mark.parametrize("segment", mostly_slow((7, 8), (7,)))  # with a rest and without
def test_segments_solve_what_all_steps_at_once_do_not(segment):
    xs = np.random.default_rng(3).normal(size=(96, 2))
    options = {"structure": "diagonal", "method": "parallel", "max_iterations": 10, "tolerance": 1e-6}
    with jax.enable_x64(True):
        together, found = (
            jax.jit(lambda xs, s=s: solve_recurrence(explosive, xs, jnp.zeros(2), segment=s, **options))(xs)
            for s in (0, segment)
        )
        # One equation at a time: errors grow sixfold a step, so that no two orders of summation stay together.
        previous = jnp.concatenate([jnp.zeros((1, 2)), found.states[:-1]])
        np.testing.assert_allclose(found.states, explosive(previous, xs), atol=1e-6)
    assert not bool(together.converged)
    assert bool(found.converged)
    done = int(found.iterations)
    assert done <= segment  # k iterations make k states exact
    assert np.isfinite(found.residuals[: done + 1]).all()
    assert np.isnan(found.residuals[done + 1 :]).all()
    assert float(found.residuals[done]) <= 1e-6


def test_segments_have_the_guess_and_the_derivatives_of_the_whole():
    params, xs, h0 = problem("dense")
    with jax.enable_x64(True):
        whole = solve("dense", params, xs, h0, method="parallel", **TIGHT)
        warm = solve("dense", params, xs, h0, method="parallel", segment=5, guess=whole.states, tolerance=1e-12)
        assert int(warm.iterations) == 0

        def loss(params, segment):
            return jnp.sum(solve("dense", params, xs, h0, method="parallel", segment=segment, **TIGHT).states ** 3)

        gradient = jax.jit(jax.grad(loss), static_argnums=1)
        np.testing.assert_allclose(gradient(params, 5), gradient(params, 0), rtol=1e-9)


def test_clipped_iterates_survive_an_overflow():
    xs = jnp.asarray(np.random.default_rng(3).normal(size=(60, 2)), jnp.float32)

    def steep(h, x):
        return jnp.sin(1e4 * h + x)

    options = {"structure": "diagonal", "method": "parallel", "max_iterations": 61}
    bare, clipped = (solve_recurrence(steep, xs, jnp.zeros(2), clip_iterates=c, **options) for c in (0, 1e8))
    assert not np.isfinite(bare.residuals[-1])
    assert np.isfinite(clipped.states).all()


def test_the_relative_tolerance_is_a_share_of_the_guess():
    params, xs, h0 = problem("diagonal", scale=1.0)
    options = {"method": "parallel", "max_iterations": LENGTH}
    with jax.enable_x64(True):
        every = solve("diagonal", params, xs, h0, **options).residuals
        found = solve("diagonal", params, xs, h0, relative_tolerance=1e-3, **options)
    expected = int(np.argmax(np.asarray(every) <= 1e-3 * float(every[0])))
    assert int(found.iterations) == expected > 0
    assert bool(found.converged)


def test_damping_takes_shorter_steps():
    params, xs, h0 = problem("diagonal")
    whole, half = (
        solve("diagonal", params, xs, h0, method="parallel", damping=d, max_iterations=1) for d in (1.0, 0.5)
    )
    zeros = jnp.zeros((LENGTH, BATCH, WIDTH))
    start = jax.vmap(jax.vmap(partial(diagonal, params)))(zeros, jnp.asarray(xs))
    np.testing.assert_allclose(half.states, (whole.states + start) / 2, atol=1e-6)


def test_the_backward_pass_keeps_no_iterates():
    params, xs, h0 = problem("diagonal", length=64)

    def kept(iterations):
        options = {"method": "parallel", "max_iterations": iterations}
        pullback = jax.eval_shape(
            lambda p: jax.vjp(lambda p: solve("diagonal", p, xs, h0, **options).states, p)[1], params
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    # Three arrays as long as the sequence, inputs and states among them: no Jacobian, none of the gates.
    assert kept(2) == kept(50) <= 3 * xs.size + 2 * h0.size + 2 * params.size


@pytest.mark.parametrize("structure", mostly_slow(("diagonal", "block", "dense"), ("block",)))
def test_a_sequence_on_eight_devices_gives_the_numbers_of_one(structure):
    mesh = Mesh(np.array(jax.devices()[:8]), ("seq",))
    params, xs, h0 = problem(structure)
    with jax.enable_x64(True):

        def loss(mesh, params, xs):
            states = solve(structure, params, xs, h0, method="chunked", mesh=mesh, **TIGHT).states
            return jnp.sum(states**3), states

        (_, split), mine = jax.jit(jax.value_and_grad(partial(loss, mesh), (0, 1), has_aux=True))(params, xs)
        (_, whole), other = jax.jit(jax.value_and_grad(partial(loss, None), (0, 1), has_aux=True))(params, xs)
    np.testing.assert_allclose(split, whole, rtol=1e-11, atol=1e-12)
    for one, two in zip(mine, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("structure", ["diagonal", "block"])
def test_a_batch_on_eight_devices_goes_through_eight_kernels(structure):
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    params, xs, h0 = problem(structure, batch=(8,))
    with jax.enable_x64(True):

        def loss(mesh, params, xs, h0):
            states = solve(structure, params, xs, h0, method="fused", mesh=mesh).states
            return jnp.sum(states**3), states

        both = [
            jax.jit(jax.value_and_grad(partial(loss, m), (0, 1, 2), has_aux=True))(params, xs, h0) for m in (mesh, None)
        ]
    for one, two in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-12)  # sums over the batch in another order


def test_auto_takes_the_kernel_on_tpu_where_a_mesh_says_how_the_batch_lies():
    params, xs, h0 = (jnp.float32(array) for array in problem("diagonal"))

    def kernels(mesh, f=diagonal):
        run = jax.jit(
            lambda params, xs, h0: (
                solve_recurrence(lambda h, x: f(params, h, x), xs, h0, structure="diagonal", mesh=mesh).states
            )
        )
        return jax.export.export(run, platforms=["tpu"])(params, xs, h0).mlir_module().count("@tpu_custom_call")

    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert kernels(mesh) == 1
    assert kernels(None) == 0
    assert kernels(mesh, lambda params, h, x: jnp.tanh(h + params.sum() + x)) == 0  # a whole matrix in every channel


@pytest.mark.parametrize("structure", ["diagonal", "block", "dense"])
def test_gradients_are_finite_differences(structure):
    arrays = problem(structure, length=6)
    weights = np.random.default_rng(1).normal(size=arrays[1].shape)
    directions = [np.random.default_rng(2).normal(size=array.shape) for array in arrays]
    with jax.enable_x64(True):

        @jax.jit
        def loss(*arrays):
            return jnp.sum(weights * solve(structure, *arrays, method="parallel", **TIGHT).states)

        slope = sum(
            np.vdot(gradient, direction)
            for gradient, direction in zip(jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays), directions, strict=True)
        )
        ahead, behind = (loss(*(a + s * d for a, d in zip(arrays, directions, strict=True))) for s in (1e-5, -1e-5))
        difference = float((ahead - behind) / 2e-5)
    np.testing.assert_allclose(slope, difference, rtol=1e-7)  # the third derivative times 1e-10


def test_auto_does_without_dense_jacobians_that_would_fill_the_memory():
    def jaxpr(length):
        shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((128, 128), (length, 64, 128), (64, 128)))
        return str(jax.make_jaxpr(partial(solve, "dense"))(*shapes))

    assert "f32[1024,64,128,128]" in jaxpr(1024)
    assert "f32[1025,64,128,128]" not in jaxpr(1025)  # 4 GiB and more


def test_jit_vmap_and_trees_of_inputs():
    params, xs, h0 = problem("dense")
    stacked = np.stack([params, 0.5 * params])

    def run(params):
        def step(h, inputs):
            return jnp.tanh(params @ h + inputs["x"] * inputs["scale"])

        inputs = {"x": jnp.asarray(xs), "scale": jnp.full((LENGTH, BATCH), 0.5)}
        return solve_recurrence(step, inputs, jnp.asarray(h0), structure="dense", method="parallel", **TIGHT).states

    with jax.enable_x64(True):
        together = jax.jit(jax.vmap(run))(stacked)
        for one, params in zip(together, stacked, strict=True):
            np.testing.assert_allclose(one, one_by_one("dense", params, 0.5 * xs, h0), atol=1e-12)


def test_a_wrong_structure_is_seen_by_the_check():
    params, xs, h0 = problem("dense", batch=())
    with pytest.raises(ValueError, match="df/dh is not 'diagonal': an entry outside of the structure is"):
        check_structure(partial(dense, params), xs[0], h0, "diagonal")
    check_structure(partial(dense, params), xs[0], h0, "dense")
    params, xs, h0 = problem("block", batch=())
    check_structure(partial(block, params), xs[0], h0, "block")
    with pytest.raises(ValueError, match="df/dh is not 'block'"):
        check_structure(lambda h, x: block(params, h[:, ::-1], x), xs[0], h0, "block")
    params, xs, h0 = problem("diagonal", batch=())
    check_structure(partial(diagonal, params), xs[0], h0, "diagonal")


def test_a_wrong_jacobian_is_seen_by_the_check():
    params, xs, h0 = problem("diagonal", batch=())
    step = partial(diagonal, params)

    def slopes(h, x):
        return jnp.diagonal(jax.jacrev(step)(h, x))

    check_structure(step, xs[0], h0, "diagonal", slopes)
    with pytest.raises(ValueError, match=r"the closed-form Jacobian is off by 0\.1"):
        check_structure(step, xs[0], h0, "diagonal", lambda h, x: slopes(h, x) + 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "banded"}, "structure 'banded' is unknown"),
        ({"method": "fast"}, "method 'fast' is unknown"),
        ({"fallback": "hope"}, "fallback 'hope' is unknown"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0, got nan"),
        ({"relative_tolerance": -1}, "relative_tolerance must be at least 0, got -1"),
        ({"segment": -4}, "segment must be at least 0, got -4"),
        ({"damping": 0.0}, r"damping must lie in \(0, 1\], got 0.0"),
        ({"structure": "dense", "trust": 1.0}, "trust needs a diagonal or quasi structure, got 'dense'"),
        ({"h0": np.zeros((3, WIDTH), np.float32)}, r"\(time, \*batch, \.\.\.\)"),
        ({"h0": np.zeros((BATCH, WIDTH), int)}, "int32 floats"),
        ({"xs": np.zeros((0, BATCH, WIDTH), np.float32)}, "one length above 0"),
        ({"guess": np.zeros(WIDTH, np.float32)}, r"the guess has shape \(4,\), expected .* \(24, 2, 4\)"),
        ({"f": lambda h, x: h[:2]}, r"f maps a state \(4,\) of float32 to \(2,\)"),
        ({"method": "fused", "structure": "dense"}, "method 'fused' takes the structures .*, got 'dense'"),
        ({"method": "fused", "mesh": Mesh(np.array(jax.devices()), "seq")}, "must not split `seq`"),
        ({"segment": 4, "mesh": Mesh(np.array(jax.devices()), "seq")}, "must not split `seq`"),
        (
            {"method": "fused", "mesh": Mesh(np.array(jax.devices()), "data")},
            r"a batch of \(2,\) does not divide over the axis 'data' of the mesh \{'data': 8\}",
        ),
        ({"method": "fused", "f": lambda h, x: h * np.ones((4, 3), np.float32)[:, 0] + x[::-1]}, "not channelwise"),
    ],
)
def test_bad_input_is_refused(options, message):
    xs, h0 = np.zeros((LENGTH, BATCH, WIDTH), np.float32), np.zeros((BATCH, WIDTH), np.float32)
    arguments = {"f": lambda h, x: h + x, "xs": xs, "h0": h0, "structure": "diagonal"} | options
    f, xs, h0 = (arguments.pop(name) for name in ("f", "xs", "h0"))
    with pytest.raises(ValueError, match=message):
        solve_recurrence(f, xs, h0, **arguments)
