"""How programs of tests are made: in little time, or with the bits that users have."""

from importlib import metadata

_OLDER = metadata.version("jax").startswith("0.10.")

# A program is one piece for the compiler: pieces are for many cores, and cost more time in all.
ONE_PIECE = "--xla_cpu_parallel_codegen_split_count=1"

# And the older emitters of XLA's CPU compiler, which later versions no longer have: a program is
# made in less than half of the time. They contract products and sums otherwise in a loop than
# outside.
QUICK = [ONE_PIECE, *(["--xla_cpu_use_fusion_emitters=false"] if _OLDER else [])]

# Of modules marked `optimized`, whose programs run for long: they are made in half of the time that
# users' take, and run as fast here. All others are made at level 0, as conftest.py says.
LONG = "--xla_backend_optimization_level=1"

# Compiler options of programs whose bits are compared with those of other programs.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if _OLDER else {}
