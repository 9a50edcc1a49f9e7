"""What every Triton kernel asks about where it runs.

The interpreter (Triton 3.6 to 3.9) has no inline PTX and computes garbage in bf16, without saying
so: under INTERPRET kernels turn bf16 and fp16 into float32 right after a load, and unpack with
shifts. Branches on a constexpr that is false are not compiled.
"""

import triton.language as tl

from kernels.gpu import interpreted

INTERPRET = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
