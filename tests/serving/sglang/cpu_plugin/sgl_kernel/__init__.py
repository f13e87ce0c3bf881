"""A stand-in for SGLang's compiled kernels, of which no package for a CPU is published.

Many of SGLang's modules import them at the top; without Intel AMX none of those that a CPU reaches calls them.
"""

from sglang_on_cpu.absent import stand_in

# SGLang tests for this module with `try`, and reads values from it if it is there.
__getattr__ = stand_in(__name__, without=("scalar_type",))
