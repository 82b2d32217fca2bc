"""47 papers as pure JAX functions and Flax modules.

Rooms: `ops` (shared numerics), `nn` (shared layers), one room per field of papers (`sequence`, ...),
`data` (readers and simulators) and `train` (the one training loop).
"""

__version__ = "0.1.0"
