"""TokenHistory: the tokens of rows whose sampling looks back, on the device.

int32 [max_num_seqs, session_len], prompt then output, allocated when the first such row comes
(8 MB for 256 rows of 8192). It does not know how long a row is: callers say so.
"""

import torch
from torch import Tensor


class TokenHistory:
    def __init__(self, max_num_seqs: int, session_len: int, device: str) -> None:
        self.session_len = session_len
        self._max_num_seqs = max_num_seqs
        self.device = device
        self._table = torch.zeros((0, session_len), dtype=torch.int32, device=device)

    def write(self, row: int, token_ids: list[int]) -> None:
        """Set a row from its start; what it held before is forgotten."""
        if len(self._table) == 0:
            self._table = torch.zeros(
                (self._max_num_seqs, self.session_len), dtype=torch.int32, device=self.device
            )
        kept = token_ids[: self.session_len]
        self._table[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)

    def append(self, rows: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
        """Put token_ids [n] at index lengths [n] of rows [n]."""
        columns = lengths.clamp(max=self.session_len - 1)  # a full session's last token is unused
        self._table[rows, columns] = token_ids.to(torch.int32)

    def window(self, rows: Tensor, starts: Tensor, width: int) -> Tensor:
        """Token ids int64 [n, width] from starts [n] on; outside the session any valid id."""
        columns = starts[:, None] + torch.arange(width, device=starts.device)
        columns.clamp_(0, self.session_len - 1)
        return self._table[rows[:, None], columns].to(torch.int64)
