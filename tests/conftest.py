"""Settings of the whole suite: CPU, eight virtual devices, a compilation cache that survives the process."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Most of the suite's time is compilation, of programs that run once on little data; processes of the tests inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax

CACHE = Path(__file__).parents[1] / ".cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# A first example pays for tracing and compilation, so a deadline would measure XLA, not the code.
hypothesis.settings.register_profile("jaxpapers", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jaxpapers")
