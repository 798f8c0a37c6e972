"""What one pull brings from where to where, for every kind of copier."""

from collections.abc import Sequence
from dataclasses import dataclass

from kv_transfer.plan import TransferPlan
from kv_transfer.transports.base import Run

SOURCE_RANK = 0  # one link reads one rank


@dataclass(frozen=True, slots=True)
class Target:
    """Where one pull's pieces come from and go. All sizes and ids have been checked."""

    lease_id: str
    groups: tuple[range, ...]  # the source's layers of each group
    source_block_ids: Sequence[int]
    sink_block_ids: Sequence[int]  # for positions from num_held_tokens on
    num_tokens: int
    num_held_tokens: int

    def needed_groups(self, plan: TransferPlan) -> frozenset[int]:
        return frozenset(group for group, layers in enumerate(self.groups) if plan.needs(SOURCE_RANK, layers))


def batches(runs: Sequence[Run], sizes: Sequence[int], batch_bytes: int) -> list[list[tuple[Run, int]]]:
    """The runs, cut into batches of about `batch_bytes` (at least a piece, at most that when no piece is larger).

    `sizes`: the bytes of one piece of each run, which every part keeps beside it.
    """
    cut: list[list[tuple[Run, int]]] = []
    room = 0
    for run, size in zip(runs, sizes, strict=True):
        start = 0
        while start < run.num_blocks:
            if room < size or not cut:
                cut.append([])
                room = batch_bytes
            stop = min(run.num_blocks, start + max(1, room // size))
            cut[-1].append((run.part(start, stop), size))
            room -= (stop - start) * size
            start = stop
    return cut
