"""ParallelGroup: one rank's place among the ranks of an engine, over torch.distributed.

The layers are cut into `num_stages` stages, and each stage is shared by `size` ranks (tensor
parallel): rank r of the engine is rank r % size of stage r // size. Within a stage column-parallel
linears need no communication, row-parallel ones one all_reduce, a vocab-parallel head one gather
to the stage's rank 0. Alone in its stage, a rank's collectives are the identity. What stages say
to each other is engine/pipeline.py's.

Tensors travel over NCCL on GPUs and gloo on CPUs, host arrays always over gloo.
"""

import fcntl
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from engine.errors import EngineDeadError

MEET_S = 60  # for every rank to come
_IDLE = timedelta(days=365)  # ranks wait inside a broadcast while there is no work
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    rank: int = 0  # within its stage
    size: int = 1  # ranks of a stage: tp
    stage: int = 0
    num_stages: int = 1  # pp
    num_neighbours: int = 1  # ranks on this node, itself included

    tensors: dist.ProcessGroup | None = None  # of this stage; None: all ranks are one stage
    arrays: dist.ProcessGroup | None = None  # the same over gloo
    all_arrays: dist.ProcessGroup | None = None  # every rank over gloo; None: the default group

    @classmethod
    def join(
        cls,
        rank: int,
        tp: int,
        address: str,
        device: str,
        *,
        pp: int = 1,
        listener: socket.socket | None = None,
        num_neighbours: int | None = None,
    ) -> "ParallelGroup":
        """Meet the other ranks at `address` (host:port); a no-op for one rank.

        Rank 0 listens there, on `listener` if it has one. EngineDeadError when not all ranks came
        within MEET_S. `num_neighbours` of them share this node; None: all.

        On GPUs every rank takes the first that it sees, so each process must see one of its own:
        Ray sets CUDA_VISIBLE_DEVICES of each actor; who starts ranks without Ray must do the same.
        """
        world_size = tp * pp
        if world_size == 1:
            if listener is not None:
                listener.close()
            return cls()
        num_neighbours = num_neighbours or world_size
        host, port = address.rsplit(":", 1)
        if rank == 0 and listener is None:
            listener = listen(host, int(port))
        choose_interface(host)
        on_gpu = device == "cuda"
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                int(port),
                world_size,
                is_master=rank == 0,
                timeout=timedelta(seconds=MEET_S),
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except (dist.DistError, RuntimeError) as error:
            raise EngineDeadError(
                f"rank {rank} of {world_size} waited {MEET_S} s at {address} for the other ranks; "
                "can their nodes reach this address, and did their processes start?"
            ) from error
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_IDLE,
        )
        all_arrays = dist.new_group(backend="gloo", timeout=_IDLE) if on_gpu else None
        if pp == 1:
            return cls(rank, tp, 0, 1, num_neighbours, None, all_arrays, all_arrays)
        tensors = arrays = None
        for stage in range(pp):  # every rank takes part in making every group
            ranks = list(range(stage * tp, (stage + 1) * tp))
            group = dist.new_group(ranks, timeout=_IDLE)
            gloo = dist.new_group(ranks, backend="gloo", timeout=_IDLE) if on_gpu else group
            if rank in ranks:
                tensors, arrays = group, gloo
        return cls(rank % tp, tp, rank // tp, pp, num_neighbours, tensors, arrays, all_arrays)

    def leave(self) -> None:
        """No CUDA graph that holds collectives may be left: NCCL waits for its end
        (pytorch/pytorch#115388), and the worker's `close` comes first.
        """
        if self.num_ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def num_ranks(self) -> int:
        """Of the whole engine."""
        return self.size * self.num_stages

    @property
    def global_rank(self) -> int:
        return self.stage * self.size + self.rank

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.num_stages - 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the stage's ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.tensors)
        return x

    def broadcast(self, x: torch.Tensor) -> None:
        """The stage's rank 0 sends, the others receive, in place."""
        if self.size > 1:
            dist.broadcast(x, group=self.tensors, group_src=0)

    def gather_columns(self, x: torch.Tensor) -> torch.Tensor | None:
        """[M, N/size] of every rank joined to [M, N] on the stage's rank 0; None on the others."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(x.contiguous(), parts, group=self.tensors, group_dst=0)
        return torch.cat(parts, dim=1) if parts is not None else None

    def min(self, value: int) -> int:
        """The smallest value of the engine's ranks: what all of them can afford."""
        if self.num_ranks == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=self.all_arrays)
        return int(tensor.item())

    def broadcast_array(self, array: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """The stage's rank 0 sends an int32 array, the others pass None and receive it."""
        if self.size == 1:
            assert array is not None
            return array
        length = torch.tensor([0 if array is None else len(array)], dtype=torch.int64)
        dist.broadcast(length, group=self.arrays, group_src=0)
        data = (
            torch.from_numpy(array)
            if array is not None
            else torch.empty(int(length.item()), dtype=torch.int32)
        )
        dist.broadcast(data, group=self.arrays, group_src=0)
        return data.numpy()


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening socket at an IPv4 or IPv6 address; port 0: a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def choose_interface(host: str) -> None:
    """Let gloo use the interface that leads to `host`, unless GLOO_SOCKET_IFNAME names one.

    By default it takes the one of the host's own name, which need not be that of the cluster.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ and (name := _interface(_own_address(host))):
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_address(host: str) -> str:
    """The address this machine has for those it talks to at `host`; nothing is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))
        return str(probe.getsockname()[0])


def _interface(address: str) -> str | None:
    """The network interface that has this address; None when it cannot be told."""
    if ip_address(address).is_loopback:
        return "lo"
    packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    if ":" in address:
        table = Path("/proc/net/if_inet6")
        lines = table.read_text().splitlines() if table.exists() else []
        return next((each.split()[5] for each in lines if each.startswith(packed.hex())), None)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no IPv4 address
                request = struct.pack("256s", name.encode())
                if fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24] == packed:
                    return name
    return None
