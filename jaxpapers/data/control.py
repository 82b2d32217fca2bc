"""Systems that are controlled from images alone: an agent among obstacles, a pendulum, a cart-pole.

The tasks of E2C (Watter et al. 2015) and PCC (Levine et al. 2020), with the constants of PCC's public code
(VinAIResearch/PCC-pytorch). Differences: discs and lines are drawn with soft edges, so that a picture changes with
every motion; a step is one of Runge-Kutta. The standard deviations of the noisy versions are ours: neither paper nor
code says them.

    data = simulate_control(PENDULUM, jax.random.key(0), num_windows=64, num_steps=12)

A system's functions act on single states and on batches of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxpapers.data.dynamics import rk4

GRAVITY = 9.81  # m / s^2
DT = 0.02  # s, of pendulum and cart-pole

# Plane: lengths in pixels; a pixel (i, j) has its middle at (i + 0.5, j + 0.5).
PLANE = 40
OBSTACLES = np.array([[20.5, 5.5], [20.5, 13.5], [20.5, 27.5], [20.5, 35.5], [10.5, 20.5], [30.5, 20.5]], np.float32)
OBSTACLE_RADIUS = 2.5
AGENT_RADIUS = 1.5
MAX_MOVE = 3.0

# Pendulum: a rod of mass m and length l about its end.
ROD_MASS = 0.1  # kg
ROD_LENGTH = 0.5  # m
MAX_TORQUE = 1.0  # N m
MAX_SPEED = 3 * np.pi  # rad / s

# Cart-pole: the pole's mass and half-length are the rod's.
CART_MASS = 1.0  # kg
MAX_FORCE = 10.0  # N
TRACK = 2.4  # m to either side
MAX_CART_SPEED = 6.0  # m / s
MAX_POLE_SPEED = 2 * np.pi  # rad / s


class ControlSystem(NamedTuple):
    """What a controller from images meets.

    Attributes:
      step: `(state, control) -> state`; clips the control.
      render: `state -> image` (height, width), 0 to 1.
      project: `state -> state` back into its range, after noise.
      draw_state: `key -> state`, as the training data have them.
      draw_start: `key -> state` at the start of the task.
      in_goal: `(state, goal) -> bool`.
      goals: (goals, state_dim).
      control_dim: width of a control.
      max_control: largest control in each direction.
      frames: images in an observation; two show a velocity.
      size: height and width of an image.
      noise: standard deviation of each state component in the noisy version of the task.
    """

    step: Callable[[Array, Array], Array]
    render: Callable[[Array], Array]
    project: Callable[[Array], Array]
    draw_state: Callable[[Array], Array]
    draw_start: Callable[[Array], Array]
    in_goal: Callable[[Array, Array], Array]
    goals: np.ndarray
    control_dim: int
    max_control: float
    frames: int
    size: int
    noise: float


class ControlWindows(NamedTuple):
    """Windows of random motion.

    Attributes:
      images: (windows, time, height, width, frames), the newest frame last.
      controls: (windows, time - 1, control_dim); control n leads from time n to n + 1.
      states: (windows, time, state_dim), of the newest frame.
    """

    images: Float[Array, "windows time height width frames"]
    controls: Float[Array, "windows moves control"]
    states: Float[Array, "windows time state"]


def planar_is_free(state: Float[Array, "*batch 2"]) -> Bool[Array, "*batch"]:
    """Whether the agent may stand there: no obstacle's middle within its square of 3 by 3 pixels."""
    near = jnp.all(jnp.abs(state[..., None, :] - OBSTACLES) <= AGENT_RADIUS, axis=-1)
    return ~jnp.any(near, axis=-1)


def planar_step(state: Float[Array, "*batch 2"], control: Float[Array, "*batch 2"]) -> Float[Array, "*batch 2"]:
    """Moves (row, column) by the control, each component clipped to 3 pixels; a move that ends at an obstacle fails."""
    target = _planar_project(state + jnp.clip(control, -MAX_MOVE, MAX_MOVE))
    return jnp.where(planar_is_free(target)[..., None], target, state)


def planar_render(state: Float[Array, "*batch 2"]) -> Float[Array, "*batch 40 40"]:
    """Six obstacles and the agent, a disc of radius 1.5."""
    agent = _disc(state[..., None, None, :], AGENT_RADIUS)
    return jnp.maximum(agent, jnp.max(_disc(OBSTACLES[:, None, None], OBSTACLE_RADIUS), axis=0))


def _planar_project(state: Array) -> Array:
    return jnp.clip(state, AGENT_RADIUS, PLANE - AGENT_RADIUS)


def _disc(middle: Array | np.ndarray, radius: float) -> Array:
    return jnp.clip(radius + 0.5 - jnp.linalg.norm(_pixels(PLANE) - middle, axis=-1), 0, 1)


def _planar_draw_state(key: Array) -> Array:
    # Of 8 places the first free one: an obstacle takes less than 1% of the plane, all six 4%.
    places = jax.random.uniform(key, (8, 2), minval=AGENT_RADIUS, maxval=PLANE - AGENT_RADIUS)
    return places[jnp.argmax(planar_is_free(places))]


def pendulum_acceleration(
    angle: Float[Array, "*batch"], torque: Float[Array, "*batch"] | float
) -> Float[Array, "*batch"]:
    """(m g l sin(angle) - torque) / (m l^2 / 3) in rad/s^2; the angle is 0 upright, where the rod falls from.

    The length stands in gravity's torque as in PCC's code; of a rod about its end it would be l / 2.
    """
    inertia = ROD_MASS * ROD_LENGTH**2 / 3
    return (ROD_MASS * GRAVITY * ROD_LENGTH * jnp.sin(angle) - torque) / inertia


def pendulum_step(state: Float[Array, "*batch 2"], control: Float[Array, "*batch 1"]) -> Float[Array, "*batch 2"]:
    """(angle, angular velocity) 0.02 s later under a torque, clipped to 1 N m."""
    torque = jnp.clip(control[..., 0], -MAX_TORQUE, MAX_TORQUE)

    def field(state: Array) -> Array:
        return jnp.stack([state[..., 1], pendulum_acceleration(state[..., 0], torque)], axis=-1)

    return _pendulum_project(rk4(field, DT)(state))


def pendulum_render(state: Float[Array, "*batch 2"]) -> Float[Array, "*batch 48 48"]:
    """A rod from the middle, 22 pixels long and 4 wide; up is up, positive angles are to the right."""
    middle = jnp.full((*state.shape[:-1], 2), 24.0)
    return _line(48, middle, middle + 22 * _direction(state[..., 0]), 4.0)


def _pendulum_project(state: Array) -> Array:
    return jnp.stack([_wrap(state[..., 0]), jnp.clip(state[..., 1], -MAX_SPEED, MAX_SPEED)], axis=-1)


def cartpole_step(state: Float[Array, "*batch 4"], control: Float[Array, "*batch 1"]) -> Float[Array, "*batch 4"]:
    """(angle, angular velocity, position, velocity) 0.02 s later under a force, clipped to 10 N (Barto et al. 1983)."""
    force = jnp.clip(control[..., 0], -MAX_FORCE, MAX_FORCE)
    mass = CART_MASS + ROD_MASS

    def field(state: Array) -> Array:
        angle, speed, _, velocity = jnp.moveaxis(state, -1, 0)
        push = force + ROD_MASS * ROD_LENGTH * jnp.square(speed) * jnp.sin(angle)
        inertia = ROD_LENGTH * (4 / 3 * mass - ROD_MASS * jnp.square(jnp.cos(angle)))
        turn = (mass * GRAVITY * jnp.sin(angle) - jnp.cos(angle) * push) / inertia
        return jnp.stack(
            [speed, turn, velocity, (push - ROD_MASS * ROD_LENGTH * turn * jnp.cos(angle)) / mass], axis=-1
        )

    return _cartpole_project(rk4(field, DT)(state))


def cartpole_render(state: Float[Array, "*batch 4"]) -> Float[Array, "*batch 80 80"]:
    """A cart of 16 by 8 pixels, whose 64 pixels of way are the track, and a pole of 52 by 6."""
    column = 40 + state[..., 2] / TRACK * 32
    middle = jnp.stack([jnp.full_like(column, 70), column], axis=-1)
    pole = _line(80, middle, middle + 52 * _direction(state[..., 0]), 6.0)
    away = jnp.abs(_pixels(80) - middle[..., None, None, :])
    cart = jnp.prod(jnp.clip(np.array([4, 8], np.float32) + 0.5 - away, 0, 1), axis=-1)
    return jnp.maximum(pole, cart)


def _cartpole_project(state: Array) -> Array:
    angle, speed, position, velocity = jnp.moveaxis(state, -1, 0)
    speed = jnp.clip(speed, -MAX_POLE_SPEED, MAX_POLE_SPEED)
    velocity = jnp.clip(velocity, -MAX_CART_SPEED, MAX_CART_SPEED)
    return jnp.stack([_wrap(angle), speed, position, velocity], axis=-1)


def _wrap(angle: Array) -> Array:
    return jnp.mod(angle + np.pi, 2 * np.pi) - np.pi


def _direction(angle: Array) -> Array:
    """(row, column) of the way from a pivot to the end of a rod."""
    return jnp.stack([-jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _pixels(size: int) -> np.ndarray:
    middles = np.arange(size, dtype=np.float32) + 0.5
    return np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1)


def _line(size: int, start: Array, end: Array, width: float) -> Array:
    along = (end - start)[..., None, None, :]
    away = _pixels(size) - start[..., None, None, :]
    share = jnp.clip(jnp.sum(away * along, axis=-1) / jnp.sum(along * along, axis=-1), 0, 1)
    distance = jnp.linalg.norm(away - share[..., None] * along, axis=-1)
    return jnp.clip(width / 2 + 0.5 - distance, 0, 1)


def _uniform(low: tuple[float, ...], high: tuple[float, ...]) -> Callable[[Array], Array]:
    return lambda key: jax.random.uniform(key, (len(low),), minval=jnp.array(low), maxval=jnp.array(high))


PLANAR = ControlSystem(
    step=planar_step,
    render=planar_render,
    project=_planar_project,
    draw_state=_planar_draw_state,
    draw_start=_uniform((3.0, 3.0), (7.0, 7.0)),
    in_goal=lambda state, goal: jnp.linalg.norm(state - goal, axis=-1) <= 2,
    goals=np.array([[37, 37], [37, 3], [3, 37]], np.float32),
    control_dim=2,
    max_control=MAX_MOVE,
    frames=1,
    size=PLANE,
    noise=1.0,
)
PENDULUM = ControlSystem(  # the task `swing`
    step=pendulum_step,
    render=pendulum_render,
    project=_pendulum_project,
    draw_state=_uniform((-np.pi, -MAX_SPEED), (np.pi, MAX_SPEED)),
    draw_start=_uniform((0.9 * np.pi, 0.0), (0.95 * np.pi, 0.0)),
    in_goal=lambda state, goal: jnp.abs(_wrap(state[..., 0] - goal[..., 0])) <= np.pi / 6,
    goals=np.zeros((1, 2), np.float32),
    control_dim=1,
    max_control=MAX_TORQUE,
    frames=2,
    size=48,
    noise=0.1,
)
CARTPOLE = ControlSystem(  # balance
    step=cartpole_step,
    render=cartpole_render,
    project=_cartpole_project,
    draw_state=_uniform(
        (-np.pi / 5, -MAX_POLE_SPEED, -TRACK, -MAX_CART_SPEED), (np.pi / 5, MAX_POLE_SPEED, TRACK, MAX_CART_SPEED)
    ),
    draw_start=_uniform((-np.pi / 8, 0.0, 0.0, 0.0), (np.pi / 8, 0.0, 0.0, 0.0)),
    in_goal=lambda state, goal: (
        (jnp.abs(_wrap(state[..., 0] - goal[..., 0])) <= np.pi / 10) & (jnp.abs(state[..., 2]) <= TRACK)
    ),
    goals=np.zeros((1, 4), np.float32),
    control_dim=1,
    max_control=MAX_FORCE,
    frames=2,
    size=80,
    noise=0.1,
)


def disturbed_step(
    system: ControlSystem,
    state: Float[Array, "*batch state"],
    control: Float[Array, "*batch control"],
    shock: Float[Array, "*batch state"],
) -> Float[Array, "*batch state"]:
    """A step, the noise of the process added to it, and back into the state's range."""
    return system.project(system.step(state, control) + shock)


def observe(
    system: ControlSystem, before: Float[Array, "*batch state"], state: Float[Array, "*batch state"]
) -> Float[Array, "*batch height width frames"]:
    """What the controller sees: the state's image, after that of the state before where two frames are seen."""
    seen = (before, state)[-system.frames :]
    return jnp.stack([system.render(frame) for frame in seen], axis=-1)


def simulate_control(
    system: ControlSystem, key: PRNGKeyArray, num_windows: int, num_steps: int, noise: float = 0.0
) -> ControlWindows:
    """Windows from random states under controls uniform in the allowed range.

    Raises:
        ValueError: num_windows or num_steps below 1, or negative noise.
    """
    if num_windows < 1 or num_steps < 1:
        raise ValueError(f"num_windows and num_steps must be at least 1, got {num_windows} and {num_steps}")
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}")
    start_key, control_key, noise_key = jax.random.split(key, 3)
    moves = num_steps - 2 + system.frames
    start = jax.vmap(system.draw_state)(jax.random.split(start_key, num_windows))
    limit = system.max_control
    controls = jax.random.uniform(control_key, (moves, num_windows, system.control_dim), minval=-limit, maxval=limit)
    shocks = jnp.zeros((moves, *start.shape))
    if noise:
        shocks = noise * jax.random.normal(noise_key, shocks.shape)

    def advance(state: Array, given: tuple[Array, Array]) -> tuple[Array, Array]:
        state = disturbed_step(system, state, *given)
        return state, state

    after = lax.scan(advance, start, (controls, shocks))[1]
    states = jnp.moveaxis(jnp.concatenate([start[None], after]), 0, 1)
    skip = system.frames - 1
    images = observe(system, states[:, : states.shape[1] - skip], states[:, skip:])
    return ControlWindows(images, jnp.moveaxis(controls, 0, 1)[:, skip:], states[:, skip:])
