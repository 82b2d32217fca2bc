"""Systems controlled from images: closed forms of their motion, and where things are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxpapers.data import control

NO_FORCE = jnp.zeros(1)


def run(system, state, control_, steps):
    """States 1..steps under one control."""

    def body(state, _):
        state = system.step(state, control_)
        return state, state

    return np.asarray(jax.jit(lambda s: jax.lax.scan(body, s, length=steps)[1])(jnp.asarray(state)))


def test_agent_moves_and_stops_at_walls():
    start = jnp.array([10.0, 10.0])
    np.testing.assert_allclose(control.planar_step(start, jnp.array([1.0, -2.0])), [11, 8])
    np.testing.assert_allclose(control.planar_step(start, jnp.array([9.0, -9.0])), [13, 7])  # clipped to 3
    np.testing.assert_allclose(control.planar_step(jnp.array([2.0, 38.0]), jnp.array([-3.0, 3.0])), [1.5, 38.5])


def test_obstacles_block():
    for obstacle in control.OBSTACLES:
        before = jnp.asarray(obstacle + np.array([0, 3], np.float32))
        np.testing.assert_array_equal(control.planar_step(before, jnp.array([0.0, -3.0])), before)
        np.testing.assert_array_equal(
            control.planar_step(before, jnp.array([0.0, -1.6])), before
        )  # 1.4 from the middle
        np.testing.assert_allclose(control.planar_step(before, jnp.array([0.0, -1.4])), before - np.array([0, 1.4]))


def energy(angle, speed):
    """Of the pendulum, over its inertia: speed^2 / 2 + 3 g / l cos(angle)."""
    return speed**2 / 2 + 3 * control.GRAVITY / control.ROD_LENGTH * np.cos(angle)


def test_free_pendulum_keeps_its_energy_and_has_the_period_of_small_swings():
    # About the lowest point acceleration = -3 g / l * deflection. The speed, which is not wrapped, crosses zero.
    states = run(control.PENDULUM, np.array([np.pi - 0.05, 0.0], np.float32), NO_FORCE, 400)
    energies = energy(*states.T.astype(np.float64))
    # Runge-Kutta and float32 angles of size pi: 1e-6 of the energy, 59, against 0.07 that go to and fro.
    np.testing.assert_allclose(energies, energy(np.pi - 0.05, 0.0), atol=1e-3)
    speed = states[:, 1].astype(np.float64)
    (crossed,) = np.nonzero((speed[:-1] < 0) & (speed[1:] >= 0))
    times = control.DT * (crossed + speed[crossed] / (speed[crossed] - speed[crossed + 1]))
    period = 2 * np.pi * np.sqrt(control.ROD_LENGTH / (3 * control.GRAVITY))
    np.testing.assert_allclose(np.diff(times).mean(), period, rtol=1e-3)  # 0.05^2 / 16 by the swing's size


def test_pendulum_torque_and_limits():
    hanging = jnp.array([np.pi, 0.0], jnp.float32)
    one, much = (float(control.pendulum_step(hanging, jnp.array([torque]))[1]) for torque in (1.0, 5.0))
    assert one == much  # clipped
    np.testing.assert_allclose(one, -control.DT * 3 / (0.1 * 0.5**2), rtol=0.01)  # gravity gains on it within the step
    fast = control.pendulum_step(jnp.array([3.1, 9.4]), jnp.array([-1.0]))
    assert fast[1] == np.float32(control.MAX_SPEED)
    assert -np.pi <= fast[0] < -2.9  # went through the lowest point


def test_cartpole_against_scipy():
    """Both equations of motion of the Lagrangian, solved as a linear system in the accelerations."""
    m, l, total, g = control.ROD_MASS, control.ROD_LENGTH, control.CART_MASS + control.ROD_MASS, control.GRAVITY

    def field(_, state, force):
        angle, speed, _, velocity = state
        matrix = [[4 / 3 * m * l**2, m * l * np.cos(angle)], [m * l * np.cos(angle), total]]
        turn, push = np.linalg.solve(matrix, [m * g * l * np.sin(angle), force + m * l * speed**2 * np.sin(angle)])
        return [speed, turn, velocity, push]

    start = np.array([0.3, -0.5, 0.1, 0.2])
    exact = solve_ivp(field, (0, 0.4), start, args=(2.0,), rtol=1e-10, atol=1e-10).y[:, -1]
    states = run(control.CARTPOLE, start.astype(np.float32), jnp.array([2.0]), 20)
    np.testing.assert_allclose(states[-1], exact, atol=1e-5)  # float32


def centroid(image):
    rows, columns = np.indices(image.shape) + 0.5
    return np.array([(image * rows).sum(), (image * columns).sum()]) / image.sum()


@pytest.mark.parametrize("place", [(5.0, 33.0), (12.3, 12.9), (1.5, 38.5)])
def test_agent_is_drawn_where_it_is(place):
    empty = np.zeros((40, 40))
    rows, columns = np.indices(empty.shape) + 0.5
    for row, column in control.OBSTACLES:
        empty = np.maximum(empty, np.clip(3 - np.hypot(rows - row, columns - column), 0, 1))
    image = np.asarray(control.planar_render(jnp.array(place)))
    assert image.shape == (40, 40)
    assert image.min() == 0
    assert image.max() == 1
    agent = np.where(empty == 0, image, 0)
    # Sampled edges of a disc of 3 pixels: a tenth of a pixel.
    np.testing.assert_allclose(centroid(agent), place, atol=0.1)
    np.testing.assert_allclose(np.where(empty > 0, image, 0), empty, atol=1e-5)


def test_rods_point_where_they_should():
    # The middle of the rod is half its length from the pivot, up for 0, to the right for pi / 2.
    for angle, expected in ((0.0, (13, 24)), (np.pi / 2, (24, 35)), (np.pi, (35, 24))):
        np.testing.assert_allclose(
            centroid(np.asarray(control.pendulum_render(jnp.array([angle, 0.0])))), expected, atol=0.1
        )
    image = np.asarray(control.cartpole_render(jnp.array([0.0, 0.0, 1.2, 0.0])))
    np.testing.assert_allclose(centroid(image[66:])[1], 40 + 16, atol=0.1)  # half of the way to the end of the track
    np.testing.assert_allclose(centroid(image[20:60])[1], 56, atol=0.1)
    assert image[:14].max() == 0  # 70 - 52, and half the width


def test_two_frames_show_the_states_before_and_now():
    before, now = jnp.array([0.3, 1.0]), jnp.array([0.5, 2.0])
    seen = control.observe(control.PENDULUM, before, now)
    np.testing.assert_array_equal(seen[..., 0], control.pendulum_render(before))
    np.testing.assert_array_equal(seen[..., 1], control.pendulum_render(now))
    assert control.observe(control.PLANAR, before, now).shape == (40, 40, 1)


@pytest.mark.parametrize("name", ["PLANAR", "PENDULUM"])
def test_windows_follow_the_system(name):
    system = getattr(control, name)
    simulate = jax.jit(lambda key: control.simulate_control(system, key, 6, 5))
    data, again, other = (simulate(jax.random.key(seed)) for seed in (0, 0, 1))
    for part, same, different in zip(data, again, other, strict=True):
        np.testing.assert_array_equal(part, same)
        assert not np.array_equal(part, different)
    assert data.images.shape == (6, 5, system.size, system.size, system.frames)
    assert data.controls.shape == (6, 4, system.control_dim)
    assert np.abs(data.controls).max() <= system.max_control
    after = system.step(data.states[:, :-1], data.controls)
    np.testing.assert_allclose(data.states[:, 1:], after, atol=1e-5)
    np.testing.assert_allclose(data.images[..., -1], system.render(data.states), atol=1e-5)
    if system.frames == 2:
        np.testing.assert_allclose(data.images[:, 1:, ..., 0], data.images[:, :-1, ..., 1], atol=1e-5)
    else:
        assert control.planar_is_free(data.states).all()


def test_noise_has_its_size_and_stays_in_range():
    state = jnp.array([20.0, 2.0])
    after = control.disturbed_step(control.PLANAR, state, jnp.array([1.0, 0.0]), jnp.array([0.5, -3.0]))
    np.testing.assert_allclose(after, [21.5, 1.5])
    moved = control.simulate_control(control.CARTPOLE, jax.random.key(2), 400, 1, 0.1)
    assert moved.controls.shape == (400, 0, 1)
    # From |angle| <= pi / 5 and |position| <= 2.4, both uniform, by speeds times 0.02 s and the noise.
    deviation = np.asarray(moved.states)[:, 0].std(axis=0)
    expected = [np.hypot(np.pi / 5, 0.02 * control.MAX_POLE_SPEED), np.hypot(2.4, 0.02 * control.MAX_CART_SPEED)]
    np.testing.assert_allclose(deviation[[0, 2]] ** 2, np.square(expected) / 3 + 0.1**2, rtol=0.2)  # 3 sqrt(2 / 400)


def test_goals():
    assert control.PLANAR.in_goal(jnp.array([36.0, 36.0]), control.PLANAR.goals[0])
    assert not control.PLANAR.in_goal(jnp.array([35.0, 36.0]), control.PLANAR.goals[0])
    assert control.PENDULUM.in_goal(jnp.array([-0.5, 3.0]), control.PENDULUM.goals[0])
    assert not control.PENDULUM.in_goal(jnp.array([0.6, 0.0]), control.PENDULUM.goals[0])
    assert not control.CARTPOLE.in_goal(jnp.array([0.1, 0.0, 2.5, 0.0]), control.CARTPOLE.goals[0])
    assert control.CARTPOLE.in_goal(jnp.array([0.1, 0.0, 2.0, 0.0]), control.CARTPOLE.goals[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: control.simulate_control(control.PLANAR, jax.random.key(0), 0, 3), "num_windows"),
        (lambda: control.simulate_control(control.PLANAR, jax.random.key(0), 3, 0), "num_steps"),
        (lambda: control.simulate_control(control.PLANAR, jax.random.key(0), 3, 3, -1.0), "noise"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
