"""Data: the official files of the papers, simulators, and batches of both.

Map of the room:

- `download`: the one place that finds, downloads and verifies official files. A reader registers an
  `OfficialFile` and calls `locate` (a path) or `open_data` (a decompressed stream); `find` only looks.
  `$JAXPAPERS_DATA` (default `~/.cache/jaxpapers`) holds the files and may be read-only.
- `series`: readers of time series; `alrnn_series` has the seven series that the AL-RNN authors ship.
- `forecasting`: multivariate series that forecasters are compared on, their splits and scaling, windows on the device.
- `dynamics`: simulators: a Runge-Kutta integrator, the fields of Lorenz-63, Roessler and Lorenz-96,
  standardisation and delay embedding. What needs no download.
- `control`: an agent among obstacles, a pendulum, a cart-pole: systems that are controlled from images.
- `text`: text corpora as characters or bytes, their splits, windows of tokens.
- `tokens`: files of token ids, mapped into memory, and windows of them.
- `oscillators`: AR(2) processes that many variates hear with delays; what forecasters across variates are tried on.
- `waves`: travelling waves on a grid (Stuart-Landau), what a vortex street looks like.
- `images`: MNIST, Fashion-MNIST, CIFAR, Omniglot as arrays of 8-bit pixels.
- `tdl`: radio channels, the tapped delay lines of 3GPP, as an OFDM receiver sees them at its pilots.
- `tasks`: synthetic sequence tasks, drawn by key: parity, MQAR, k-hop, Keep-nth.
- `windows`: batches as pure functions of the step, so that a resumed run continues bit for bit:
  `window_batches` on the device, `host_batches` (a grain dataset) on the host.

This file imports none of them, so that a reader of one file does not pay for JAX and grain.
"""
