"""What the GPU sampler has launched, and reading it once it is there."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.host_copies import Download, upload
from engine.outputs import TokenLogprobs
from engine.sampler import SampledTokens
from kernels.gpu.logprobs import token_logprobs

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PendingTokens:
    """The tokens of a step, perhaps not chosen yet."""

    copy: Download
    num_rows: int
    scored: list[int]  # rows that want log probabilities
    num_top: list[int]  # of each

    def get(self) -> SampledTokens:
        """Waits for the step, also for one without rows: so many are in flight and no more."""
        words = self.copy.get()
        num_rows = self.num_rows
        logprobs: list[TokenLogprobs | None] | None = None
        if self.scored:
            entries = words[first_entry(num_rows) :].reshape(len(self.scored), -1)
            logprobs = [None] * num_rows
            for index, num_top, entry in zip(self.scored, self.num_top, entries, strict=True):
                logprobs[index] = _read_logprobs(entry, num_top)
        return SampledTokens(
            token_ids=words[:num_rows].copy(),
            logprobs=logprobs,
            invalid=np.flatnonzero(words[num_rows : 2 * num_rows] == 0).tolist(),
        )


@dataclass(frozen=True, slots=True)
class PendingLogprobs:
    """Scores of given tokens, perhaps not computed yet."""

    copy: Download | None  # None without tokens

    def get(self) -> list[TokenLogprobs]:
        """Waits for the scores."""
        if self.copy is None:
            return []
        entries = self.copy.get()
        return [_read_logprobs(entry, (len(entry) - 3) // 2) for entry in entries]


@torch.inference_mode()
def launch_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> PendingLogprobs:
    """Start scoring token_ids [n] under logits [n or more, V], with num_top alternatives each."""
    if len(token_ids) == 0:
        return PendingLogprobs(None)
    num_top = min(num_top, logits.shape[1])
    if token_ids.device == logits.device:
        on_device = token_ids.to(torch.int32)
    else:
        (on_device,) = upload([token_ids.to(torch.int32).numpy()], logits.device)
    shape = (len(token_ids), 3 + 2 * num_top)
    entries = torch.empty(shape, dtype=torch.int32, device=logits.device)
    token_logprobs(logits, None, on_device, num_top, entries)
    return PendingLogprobs(Download.start(entries))


def first_entry(num_rows: int) -> int:
    """Where log probabilities begin behind two words per row: at a multiple of 16 bytes, as Triton
    compiles anew for a pointer whose alignment is another one.
    """
    return -(-2 * num_rows // 4) * 4


def _read_logprobs(entry: Int32Array, num_top: int) -> TokenLogprobs:
    """From the words of kernels.gpu.logprobs.token_logprobs, which may hold more alternatives."""
    logprobs = np.ascontiguousarray(entry).view(np.float32)
    first_logprob = 3 + (len(entry) - 3) // 2
    return TokenLogprobs(
        token_id=int(entry[0]),
        logprob=float(logprobs[1]),
        rank=int(entry[2]),
        top_token_ids=entry[3 : 3 + num_top].tolist(),
        top_logprobs=logprobs[first_logprob : first_logprob + num_top].tolist(),
    )
