"""What all tests share; `README.md` beside it says where a test belongs.

Every test sees eight CPU devices, and a silent broadcast is an error. XLA compiles
quickly, see `helpers/compiling.py`, and slow tests run only on request.
"""

import gc
import os
import subprocess
import sys
import tempfile

import jax
import pytest
from helpers import compiling

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects: by default a tenth of the time is garbage collection.
gc.set_threshold(200_000, 100, 100)


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "slow: takes long and rarely breaks; runs once in `.ci/run` and when asked for",
    )
    # Flags that are set, even to nothing, are kept. The workers inherit them, and so do
    # scripts that run in their own processes.
    if "XLA_FLAGS" not in os.environ and are_known(compiling.QUICK):
        os.environ["XLA_FLAGS"] = compiling.QUICK

    # Many tests jit the same training step, and all but the first find its program in
    # this folder. Each process has its own, since JAX may read a file that another
    # process is still writing.
    if jax.config.jax_compilation_cache_dir is None:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        jax.config.update("jax_compilation_cache_dir", folder.name)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def are_known(flags):
    """Whether this XLA knows the flags; one that does not ends its process."""
    command = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    probe = subprocess.run(command, env=environment, capture_output=True, check=False)
    return probe.returncode == 0


def wants_slow(config):
    """Whether `-m` mentions the slow tests, or a test is named."""
    return "slow" in config.option.markexpr or any("::" in arg for arg in config.args)


def pytest_report_header(config):
    return None if wants_slow(config) else "slow tests are left out: -m slow runs them"


def pytest_collection_modifyitems(config, items):
    if wants_slow(config):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture
def x64():
    """Turns on 64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
