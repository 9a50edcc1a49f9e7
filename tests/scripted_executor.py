"""An Executor that computes nothing: its next token is a function of the whole history.

It computes a step when it is collected, in order, as a pipeline may. It checks what a real one
relies on: every key and value a query reads was written by the same sequence (or by one with the
same prefix) at the slot the batch names.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from engine.batch import PENDING, Batch, Sampling
from engine.block_tables import BlockTables, Places
from engine.executor import EngineInfo
from engine.outputs import StepResult


def next_token(history: Sequence[int], vocab_size: int) -> int:
    """A token that depends on every earlier one."""
    value = 17
    for token_id in history:
        value = (value * 31 + token_id + 7) % 1_000_003
    return value % vocab_size


class ScriptedExecutor:
    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        session_len: int = 128,
        vocab_size: int = 50,
        pp: int = 1,
        max_num_seqs: int = 256,
        max_in_flight: int | None = None,
        spoils: Callable[[], bool] = lambda: False,
    ) -> None:
        """`spoils` says of each row that is drawn whether it has no usable token.

        `max_in_flight` is `pp` unless given.
        """
        self.info = EngineInfo(
            vocab_size=vocab_size,
            session_len=min(session_len, num_blocks * block_size),
            num_blocks=num_blocks,
            block_size=block_size,
            dtype="float32",
            device="cpu",
            tp=1,
            pp=pp,
            max_in_flight=max_in_flight or pp,
        )
        self._tables = BlockTables(max_num_seqs, self.info.session_len, block_size)
        self.slots: dict[int, int] = {}  # slot → token whose key and value it holds
        self.last_token: dict[int, int] = {}  # row → newest sampled token, as a device keeps it
        self.num_tokens_per_step: list[int] = []
        self.max_in_flight = 0
        self._launched: deque[Batch] = deque()
        self._spoils = spoils
        self.closed = False

    def launch(self, batch: Batch, sampling: Sampling) -> None:
        batch = Batch.unpack(batch.buffer.copy())  # what crosses processes is enough
        self.num_tokens_per_step.append(batch.num_tokens)
        assert self.info.pp == 1 or PENDING not in batch.input_ids, "the first stage knows none"
        self._launched.append(batch)
        self.max_in_flight = max(self.max_in_flight, self.num_in_flight)

    @property
    def num_in_flight(self) -> int:
        return len(self._launched)

    def collect(self) -> StepResult:
        batch = self._launched.popleft()
        histories = self._write_and_read(batch)
        sampled: list[int] = []
        for logit_index in batch.logit_indices[: batch.num_sampled]:
            seq = int(np.searchsorted(batch.query_start_loc, logit_index, side="right")) - 1
            token_id = next_token(histories[seq], self.info.vocab_size)
            self.last_token[int(batch.rows[seq])] = token_id
            sampled.append(token_id)
        invalid = [index for index in range(len(sampled)) if self._spoils()]
        return StepResult(np.array(sampled, dtype=np.int32), invalid=invalid)

    def close(self) -> None:
        assert not self._launched, "steps are in flight"
        self.closed = True

    def _write_and_read(self, batch: Batch) -> list[list[int]]:
        """Write this step's tokens to their slots; read each sequence back through its table."""
        places = self._tables.advance(batch)
        starts = batch.query_start_loc
        for seq, row in enumerate(batch.rows.tolist()):
            for token in range(starts[seq], starts[seq + 1]):
                token_id = int(batch.input_ids[token])
                known = self.last_token[row] if token_id == PENDING else token_id
                self.slots[int(places.slot_mapping[token])] = known
        return [
            [self.slots[slot] for slot in self._slots(batch, places, seq)]
            for seq in range(batch.num_seqs)
        ]

    def _slots(self, batch: Batch, places: Places, seq: int) -> list[int]:
        size = self.info.block_size
        return [
            int(places.block_tables[seq, position // size]) * size + position % size
            for position in range(int(batch.context_lens[seq]))
        ]
