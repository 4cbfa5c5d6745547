"""How the tests compile: quickly, unless bits or the compiled program matter.

The tests spend most of their time in XLA. With `XLA_FLAGS` that turn off its MLIR
emitters and its optimizations it compiles in a third of the time. A kernel then
computes the same, but its rounding and the memory of the whole program may differ. So
claims about those are tested with programs compiled `as_shipped`, as users' programs
are, and `.ci/run` compiles everything so in one environment, with an empty `XLA_FLAGS`.
"""

import functools
import os

import jax

QUICK = "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0"
DEFAULTS = {"xla_cpu_use_fusion_emitters": True, "xla_backend_optimization_level": 3}

# For `Lowered.compile`, too.
options = DEFAULTS if os.environ.get("XLA_FLAGS") == QUICK else None
as_shipped = functools.partial(jax.jit, compiler_options=options)
