"""ParallelGroup: the ranks that share each layer, over torch.distributed (NCCL or gloo).

Column-parallel linears need no communication, row-parallel ones one all_reduce, a
vocab-parallel head one gather to rank 0. With one rank every call is the identity.
"""

import socket
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

_MEET = timedelta(seconds=60)  # for every rank to come
_IDLE = timedelta(days=365)  # ranks wait inside a broadcast while there is no work


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    rank: int = 0
    size: int = 1

    control: dist.ProcessGroup | None = None  # gloo, for host arrays; None: the default group

    @classmethod
    def join(cls, rank: int, size: int, address: str, device: str) -> "ParallelGroup":
        """Meet the other ranks at `address` (host:port, on rank 0); a no-op for one rank."""
        if size == 1:
            return cls()
        host, port = address.rsplit(":", 1)
        listener = socket.create_server((host, int(port))).detach() if rank == 0 else None
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), size, rank == 0, timeout=_MEET, master_listen_fd=listener
        )
        on_gpu = device == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=_IDLE
        )
        control = dist.new_group(backend="gloo", timeout=_IDLE) if on_gpu else None
        return cls(rank, size, control)

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor | None:
        """[M, N/size] of every rank joined to [M, N] on rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, dst=0)
        return torch.cat(parts, dim=1) if parts is not None else None

    def min(self, value: int) -> int:
        """The smallest of the ranks' values: what all of them can afford."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.control)
        return int(tensor.item())

    def broadcast_array(self, array: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Rank 0 sends an int32 array, the others pass None and receive it."""
        if self.size == 1:
            assert array is not None
            return array
        length = torch.tensor([0 if array is None else len(array)], dtype=torch.int64)
        dist.broadcast(length, src=0, group=self.control)
        data = (
            torch.from_numpy(array)
            if array is not None
            else torch.empty(int(length.item()), dtype=torch.int32)
        )
        dist.broadcast(data, src=0, group=self.control)
        return data.numpy()
