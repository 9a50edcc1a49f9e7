"""SwiGLU's elementwise half: silu(gate) * up."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import library_for
from kernels.gpu import on_gpu
from kernels.partials import Partials, summed


def silu_mul(gate_up: Tensor | Partials) -> Tensor:
    """gate_up [T, 2*I], gate first -> [T, I]."""
    if on_gpu(gate_up.data if isinstance(gate_up, Partials) else gate_up):
        from kernels.gpu.activation import silu_mul as silu_mul_on_gpu

        return silu_mul_on_gpu(gate_up)
    gate_up = summed(gate_up)
    native = library_for(gate_up)
    if native is not None:
        assert gate_up.is_contiguous()
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        native.manta_silu_mul(
            gate_up.data_ptr(), out.data_ptr(), rows, size, torch.get_num_threads()
        )
        return out
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
