"""The workers as policies see them: one array for each number, for decisions whose time hardly grows with the workers.

Placement owns the table. A Pool holds the workers of one role that may get a request now; position i of each of its
arrays is one worker. What a worker reports marks it as dirty, and `refresh` brings the arrays up to date before a
decision. Who is in a pool changes rarely; then the pool is built anew.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from engine.step_model import StepModel
from router.cluster_view import DECODE, PREFILL, WorkerState
from router.compiled import Bools, FloatRows, Floats, Ints
from router.costs import MIN_FREE, Column
from router.demand import Demand

# Of an H200 with an 8B model: what workers are taken for until one of them has run some steps.
REFERENCE = StepModel(base_s=0.0035, prefill_token_s=21e-6, pair_s=1e-9, decode_s=26e-6, kv_token_s=3e-8)

# Of the time to compute a token, what its KV is taken to need to get to a decode worker that has pulled none yet.
_TRANSFER_PART = 0.1

_MIN_STEP_S = 1e-5  # steps are divided by

# Of a worker's sequences, so many wait for what is given back later when it decodes nothing for a while. With fewer
# decode workers prefill too much where they are the bottleneck; with more, prompts wait where prefill workers are.
_WAIT_FOR_STALLED = 0.05


class Pool:
    """A worker that has not run yet has the model of another one in its pool; one that has never prefilled, what that
    takes in `prefillers`."""

    def __init__(
        self,
        states: Sequence[WorkerState],
        slots: Sequence[int],
        fingerprints: dict[str, int],
        prefillers: "Pool | None" = None,
    ) -> None:
        """`slots` are the workers' slots in the prefix index; `fingerprints` number those of all pools."""
        self._states = states
        self._prefillers = prefillers
        self._positions = {state: position for position, state in enumerate(states)}
        self._teacher = next((state for state in states if state.model is not None), None)
        self.rows: Ints = np.array(slots, np.int64)
        self.fingerprint: Ints = np.array(
            [fingerprints.setdefault(state.description.fingerprint, len(fingerprints)) for state in states], np.int64
        )
        max_lens = [state.description.max_model_len for state in states]
        self.max_len: Ints = np.array(max_lens, np.int64)  # tokens of a sequence, prompt and output
        self.workers = (self.rows, self.fingerprint, self.max_len)
        self.most_max_len = max(max_lens, default=0)
        self.total_seqs = 0.0
        self.columns: FloatRows = np.zeros((len(Column), len(states)))
        self.columns[Column.BATCH_TOKENS] = [state.description.max_batch_tokens for state in states]
        for position, state in enumerate(states):
            self._write(state, position)

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, column: Column) -> Floats:
        numbers: Floats = self.columns[column]
        return numbers

    @property
    def typical_model(self) -> StepModel:
        return (self._teacher and self._teacher.model) or REFERENCE

    def worker_id(self, position: int) -> str:
        return self._states[position].worker_id

    def among(self, worker_ids: Iterable[str]) -> Bools:
        """By position: whether it is one of these."""
        wanted = frozenset(worker_ids)
        return np.array([state.worker_id in wanted for state in self._states], np.bool_)

    def refresh(self, state: WorkerState) -> bool:
        """False: the pool must be built anew, as this one has come or gone, or has just learned its speed and others
        are taken for like it."""
        position = self._positions.get(state)
        if (position is not None) != state.usable:
            return False
        if position is not None:
            if self._teacher is None and state.model is not None:
                return False
            self._write(state, position)
        return True

    def _write(self, state: WorkerState, position: int) -> None:
        row, model = state.row(), state.model or self.typical_model
        prefiller = model
        if not model.prefill_token_s:
            prefiller = REFERENCE if self._prefillers is None else self._prefillers.typical_model
        base_s, token_s, pair_s = model.base_s, prefiller.prefill_token_s, prefiller.pair_s
        transfer_token_s = state.transfer_token_s or _TRANSFER_PART * token_s
        wait_s = row.queue_s
        if row.num_waiting_tokens:
            num_steps = math.ceil(row.num_waiting_tokens / self.columns[Column.BATCH_TOKENS, position])
            wait_s += num_steps * base_s + token_s * row.num_waiting_tokens + pair_s * row.num_waiting_pairs
        used = row.num_blocks - row.num_free_blocks
        seq_tokens = used * row.block_size / max(1, row.num_seqs)
        # Noise in the model must not say that one more sequence is free, or one worker gets all.
        newcomer_s = max(model.decode_s, base_s / max(1, row.max_num_seqs))
        room: float = row.num_free_blocks if row.num_seqs < row.seq_limit else -1
        num_blocks = max(1, row.num_blocks)
        free_part = row.num_free_blocks / num_blocks
        pressure = row.num_seqs * (1 - free_part)
        decoding_s = row.num_running * (newcomer_s + model.kv_token_s * seq_tokens)
        self.total_seqs += row.num_seqs - float(self.columns[Column.NUM_SEQS, position])
        self.columns[1:, position] = (
            row.block_size,
            row.num_blocks,
            row.num_seqs,
            row.num_running,
            row.num_free_blocks,
            base_s,
            token_s,
            pair_s,
            model.decode_s,
            model.kv_token_s,
            wait_s,
            max(row.num_seqs, used / num_blocks * row.max_num_seqs),
            row.num_blocks * row.block_size,
            seq_tokens,
            newcomer_s,
            max(_MIN_STEP_S, base_s + decoding_s),
            transfer_token_s,
            transfer_token_s * row.num_pull_tokens,
            room if row.num_seqs else math.inf,  # an empty worker takes what it can hold, with less than the reserve
            row.num_seqs - row.num_running,
            1 / num_blocks,
            free_part,
            pressure,
            _WAIT_FOR_STALLED * pressure * (1 - free_part) / max(MIN_FREE, free_part),
            0.0 if state.prefills else decoding_s,
        )


class WorkerTable:
    """`turn` counts decisions, to spread ties; `now` and `part_ahead` are this one's. `demand` is of this router."""

    def __init__(self) -> None:
        self.turn = 0
        self.now = 0.0
        self.num_own = 0  # requests of this router that its workers have
        self.part_ahead: Floats | None = None  # of each queue, by slot: what goes before this request; None: all
        self.demand = Demand()
        self.dirty: set[WorkerState] = set()
        self._slots: dict[WorkerState, int] = {}
        self._rebuild()

    def add(self, state: WorkerState, slot: int) -> None:
        """Also when a worker's slot in the prefix index is another one now."""
        self._slots[state] = slot
        self._changed = True

    def remove(self, state: WorkerState) -> None:
        del self._slots[state]
        self._changed = True

    def refresh(self) -> None:
        """Bring the pools up to date."""
        dirty = self.dirty
        for state in dirty:
            if self._changed:
                break
            if state in self._slots:
                self._changed = not (self.prefill if state.prefills else self.decode).refresh(state)
        if self._changed:
            self._rebuild()
        dirty.clear()

    def _rebuild(self) -> None:
        fingerprints: dict[str, int] = {}
        self.prefill = self._pool(PREFILL, fingerprints)
        self.decode = self._pool(DECODE, fingerprints, self.prefill)
        self.num_fingerprints = len(fingerprints)
        self.block_sizes = tuple(
            sorted({int(size) for pool in (self.prefill, self.decode) for size in pool[Column.BLOCK_SIZE]})
        )
        self._changed = False

    def _pool(self, role: str, fingerprints: dict[str, int], prefillers: Pool | None = None) -> Pool:
        states = [state for state in self._slots if state.usable and state.description.role == role]
        return Pool(states, [self._slots[state] for state in states], fingerprints, prefillers)
