"""Training data: rows of `WINDOW` token ids, whole documents and dialogues one after the other, and which are learnt.

Documents come once, as one array; dialogues are made without end, shard by shard, each from its own seed, by
processes beside the training.
"""

import multiprocessing
import os
import random
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.demo_model import corpus
from benchmarks.demo_model.dialogues import Dialogues
from benchmarks.demo_model.tokenizer import BEGIN, END, ROLES, render

SEED = 20261124
WINDOW = 2048
SHARD_ROWS = 256
DIALOGUES_AT_ONCE = 2000
HELD_OUT_IN = 25  # one document in so many
LEARNT = 1 << 15  # set in a token that the model learns to predict; ids are far below

Rows = NDArray[np.uint16]  # [num_rows, WINDOW]


def document_rows(content: dict[str, Any], tokenizer: Tokenizer, *, held_out: bool) -> Rows:
    """Every document once, one after the other, cut where a window ends; all of it is learnt."""
    chosen = [each for each in content["documents"] if (zlib.crc32(each.encode()) % HELD_OUT_IN == 0) is held_out]
    random.Random(SEED).shuffle(chosen)
    begin, end = (tokenizer.token_to_id(each) for each in (BEGIN, END))
    encodings = tokenizer.encode_batch(chosen, add_special_tokens=False)
    ids = np.concatenate([np.array([begin, *encoding.ids, end], np.uint16) for encoding in encodings])
    num_rows = len(ids) // WINDOW
    return np.where(ids == begin, ids, ids | LEARNT)[: num_rows * WINDOW].reshape(num_rows, WINDOW)


def dialogue_rows(
    dialogues: Dialogues, tokenizer: Tokenizer, shard: int, num_rows: int, *, held_out: bool = False
) -> Rows:
    """Dialogues of a shard; learnt is what the assistant says, and that it ends."""
    rng = random.Random(f"{SEED}/{shard}/{held_out}")
    end = tokenizer.token_to_id(END)
    assert end is not None
    rows: list[Rows] = []
    packed = _packed(_dialogue_pieces(dialogues, tokenizer, rng, held_out), end)
    while len(rows) < num_rows:
        rows.append(next(packed))
    return np.stack(rows)


class ShardStream:
    """Dialogue rows in the order of their shards, made ahead by `num_processes` processes."""

    def __init__(self, corpus_file: Path, tokenizer_file: Path, num_processes: int) -> None:
        self._pool = ProcessPoolExecutor(
            num_processes,
            multiprocessing.get_context("spawn"),
            initializer=_load,
            initargs=(corpus_file, tokenizer_file),
        )
        self._next = 0
        self._ahead: deque[Future[Rows]] = deque()
        self._rows: Rows = np.empty((0, WINDOW), np.uint16)
        for _ in range(2 * num_processes):
            self._order()

    def take(self, num_rows: int) -> Rows:
        while len(self._rows) < num_rows:
            self._rows = np.concatenate([self._rows, self._ahead.popleft().result()])
            self._order()
        taken, self._rows = self._rows[:num_rows], self._rows[num_rows:]
        return taken

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _order(self) -> None:
        self._ahead.append(self._pool.submit(_shard, self._next))
        self._next += 1


_made: list[tuple[Dialogues, Tokenizer]] = []  # what a process of the pool loaded, once


def _load(corpus_file: Path, tokenizer_file: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _made.append((Dialogues(corpus.load(corpus_file)), Tokenizer.from_file(str(tokenizer_file))))


def _shard(number: int) -> Rows:
    return dialogue_rows(*_made[0], number, SHARD_ROWS)


def _dialogue_pieces(
    dialogues: Dialogues, tokenizer: Tokenizer, rng: random.Random, held_out: bool
) -> Iterator[NDArray[np.uint16]]:
    begins, end = tokenizer.token_to_id(ROLES["assistant"]), tokenizer.token_to_id(END)
    while True:
        made = [dialogues.make(rng, held_out=held_out) for _ in range(DIALOGUES_AT_ONCE)]
        texts = [render(each.messages, each.tools) for each in made]
        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
            piece = np.array(encoding.ids, np.uint16)
            # Between an assistant token and the next end token, that one included.
            turn = np.cumsum(piece == end) - (piece == end)
            said = np.zeros(len(piece), bool)
            for start in np.flatnonzero(piece == begins):
                said[start + 1 :] |= turn[start + 1 :] == turn[start]
            yield np.where(said, piece | LEARNT, piece)


def _packed(pieces: Iterable[NDArray[np.uint16]], fill: int) -> Iterator[Rows]:
    """Whole pieces, as many as fit in a window; those longer than one are left out, and so is the last window."""
    row = np.full(WINDOW, fill, np.uint16)
    used = 0
    for piece in pieces:
        if len(piece) > WINDOW:
            continue
        if used + len(piece) > WINDOW:
            yield row
            row, used = np.full(WINDOW, fill, np.uint16), 0
        row[used : used + len(piece)] = piece
        used += len(piece)
