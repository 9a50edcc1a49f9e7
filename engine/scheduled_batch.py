"""ScheduledBatch: what one step computes, as the scheduler decided; engine/batch.py flattens it."""

from dataclasses import dataclass, field

from engine.sequence import Sequence


@dataclass(slots=True)
class ScheduledBatch:
    """One step: sequence i computes num_new_tokens[i] tokens. Rows with one token come first."""

    seqs: list[Sequence] = field(default_factory=list)
    num_new_tokens: list[int] = field(default_factory=list)
    num_decodes: int = 0
    sampled: list[int] = field(default_factory=list)  # rows whose last token is computed
    new_rows: list[Sequence] = field(default_factory=list)  # those that (re)entered `running`
    # Block tables, as one array [max_num_seqs * table width]: what changed since the last step.
    table_changes: dict[int, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.num_new_tokens)

    def append(self, seq: Sequence, num_new_tokens: int) -> None:
        self.seqs.append(seq)
        self.num_new_tokens.append(num_new_tokens)

    def remove(self, seq: Sequence) -> int:
        """Take back what was given to a sequence that is preempted; returns its tokens."""
        if seq not in self.seqs:
            return 0
        index = self.seqs.index(seq)
        del self.seqs[index]
        return self.num_new_tokens.pop(index)
