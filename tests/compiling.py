"""How the tests compile: quickly, but for those that look at bits or at the program.

Nearly all that the tests wait for is XLA. Told by `XLA_FLAGS` not to write its kernels
through MLIR and not to optimize them, it compiles in a third of the time. What a kernel
computes is the same; how it rounds, and what the whole program keeps, need not be. So
what is claimed of those is compiled `as_shipped`, as users' programs are, and `.ci/run`
has one environment where everything is, by setting `XLA_FLAGS` to nothing.
"""

import functools
import os

import jax

QUICK = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
DEFAULTS = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}

# For `Lowered.compile`, too.
options = DEFAULTS if os.environ.get("XLA_FLAGS") == QUICK else None
as_shipped = functools.partial(jax.jit, compiler_options=options)
