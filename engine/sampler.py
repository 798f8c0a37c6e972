"""From logits to tokens: a function of (logits, params, seed, position), never of batch mates or worker.

Executors call it with the logits of the rows that sample. Nothing here waits for a GPU before `Choice.read`.

Order, as in vLLM: log probabilities of the model's own distribution; banned tokens and logit_bias; repetition,
presence and frequency penalties; temperature; min_p; top_k; top_p; the draw. A filter keeps every token that ties
with the last one kept, so its result does not depend on how a device sorts.

The draw is the inverse of the cumulative distribution in vocabulary order at a number hashed from seed and position.
Weights are whole numbers there: their sum is exact in any order, hence the same on every device and in every batch.

Memory: beside the logits, two float32 copies of the rows that are drawn on a GPU, and a few times `PART_BYTES`: what
else makes numbers for whole rows (penalties, log probabilities, the draw on a CPU) takes only so many rows at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from engine.executors.base import Sampled, SampleSpec, TokenLogprobs
from engine.request import SamplingParams
from engine.tensors import to_device, to_host

WEIGHT_BITS = 44  # of the most likely token; 2**18 of them still fit into 63 bits
NUCLEUS_SIZE = 1024  # most likely tokens to look among before a whole row is sorted
MIN_TEMPERATURE = 1e-30  # what is smaller may be zero in float32
PART_BYTES = 64 << 20  # of the rows that are worked on at a time, where memory has to be bounded


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of one token a row, and of the most likely alternatives. `top_ids` and `top` are empty where none is wanted."""

    chosen: Tensor  # [rows]
    top_ids: Tensor  # [rows, most]
    top: Tensor  # [rows, most]
    num_top: Sequence[int]

    def read(self, token_ids: Sequence[int]) -> list[TokenLogprobs]:
        rows = zip(token_ids, self.chosen.tolist(), self.num_top, self.top_ids.tolist(), self.top.tolist(), strict=True)
        return [
            TokenLogprobs(token_id, logprob, tuple(zip(ids[:num], values[:num], strict=True)))
            for token_id, logprob, num, ids, values in rows
        ]


@dataclass(frozen=True, slots=True)
class Choice:
    """The tokens of one step's rows: `token_ids` [rows] on the device, the rest on its way to the host."""

    token_ids: Tensor
    host_token_ids: Tensor
    logprob_rows: Sequence[int]
    logprobs: Logprobs | None

    def read(self) -> list[Sampled]:
        """When the device has run what was queued."""
        token_ids: list[int] = self.host_token_ids.tolist()
        if self.logprobs is None:
            return [Sampled(token_id) for token_id in token_ids]
        rows = self.logprob_rows
        found = dict(zip(rows, self.logprobs.read([token_ids[row] for row in rows]), strict=True))
        return [Sampled(token_id, found.get(row)) for row, token_id in enumerate(token_ids)]


def sample(logits: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Choice:
    """Choose the token at the position of every row of `logits` [rows, vocab], which is left as it is."""
    if logits.is_cuda and not any(map(_changes_logits, specs)):
        token_ids = _choose(logits, specs, positions)  # the kernels keep the GPU busy with many rows only
    else:
        vocab = logits.shape[-1]
        parts = _parts([_row_bytes(vocab, len(spec.token_ids) * spec.params.has_penalties) for spec in specs])
        token_ids = torch.cat(
            [_choose(_penalize(logits[part], specs[part]), specs[part], positions[part]) for part in parts]
        )
    asking = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
    logprobs = None
    if asking:
        rows = to_device(asking, logits.device)
        num_top = [specs[row].params.logprobs or 0 for row in asking]
        logprobs = _logprobs(logits, rows, token_ids[rows], num_top)
    return Choice(token_ids, to_host(token_ids), asking, logprobs)


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """What the model thought of each of `next_token_ids`; row i of `logits` [n, vocab] is the position before it."""
    if not next_token_ids:
        return []
    device = logits.device
    rows = torch.arange(len(next_token_ids), device=device)
    found = _logprobs(logits, rows, to_device(next_token_ids, device), [num_top] * len(next_token_ids))
    if logits.is_cuda:
        torch.cuda.current_stream().synchronize()
    return found.read(next_token_ids)


def part_rows(vocab: int, num_seen: int = 0) -> int:
    """How many rows are worked on at a time where memory has to be bounded; penalties look at `num_seen` tokens."""
    return max(1, PART_BYTES // _row_bytes(vocab, num_seen))


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by its arguments, with 53 random bits."""
    digest: int = xxh3_64_intdigest(seed.to_bytes(8, "little") + position.to_bytes(8, "little"))
    return (digest >> 11) * 2.0**-53


def _row_bytes(vocab: int, num_seen: int = 0) -> int:
    """A row in float32, and where the tokens seen are in it."""
    return 4 * vocab + 16 * num_seen


def _parts(row_bytes: Sequence[int]) -> Iterator[slice]:
    """All rows in order, in runs of at most `PART_BYTES` or of one row."""
    start = in_part = 0
    for row, num_bytes in enumerate(row_bytes):
        if row > start and in_part + num_bytes > PART_BYTES:
            yield slice(start, row)
            start, in_part = row, 0
        in_part += num_bytes
    yield slice(start, len(row_bytes))


def _choose(shaped: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Tensor:
    """The token of every row of `shaped`, logits after bans, biases and penalties: int64 [rows]."""
    random_rows = [row for row, spec in enumerate(specs) if not spec.params.greedy]
    if len(random_rows) == len(specs):
        return _draw(shaped.float(), specs, positions)
    token_ids = _argmax(shaped)
    if random_rows:
        rows = to_device(random_rows, shaped.device)
        some, where = [specs[row] for row in random_rows], [positions[row] for row in random_rows]
        token_ids[rows] = _draw(shaped[rows].float(), some, where)
    return token_ids


def _logprobs(logits: Tensor, rows: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> Logprobs:
    """Of `token_ids` [n] in `rows` [n] of `logits`, n at least 1."""
    vocab = logits.shape[-1]
    chosen, top_ids, top = [], [], []
    for part in _parts([_row_bytes(vocab)] * len(token_ids)):
        logprobs = logits[rows[part]].float().log_softmax(-1)
        most_likely = _most_likely(logprobs, min(max(num_top), vocab))
        chosen.append(logprobs.gather(1, token_ids[part].unsqueeze(1)).squeeze(1))
        top_ids.append(most_likely)
        top.append(logprobs.gather(1, most_likely))
    return Logprobs(to_host(torch.cat(chosen)), to_host(torch.cat(top_ids)), to_host(torch.cat(top)), num_top)


def _most_likely(values: Tensor, num: int) -> Tensor:
    """Column indices [rows, num] of the largest float32 `values`, largest first, equal ones by index."""
    if num == 0:
        return torch.empty((len(values), 0), dtype=torch.int64, device=values.device)
    bits = values.contiguous().view(torch.int32)
    # As integers these compare as the floats do.
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    # Unique keys: without them top-k may pick any of equal values, depending on `num`.
    keys.bitwise_left_shift_(32).sub_(torch.arange(values.shape[-1], device=values.device))
    return keys.topk(num, -1).indices


def _argmax(logits: Tensor) -> Tensor:
    if logits.is_cuda:
        from engine.kernels.argmax import argmax

        return argmax(logits)
    return logits.argmax(-1)


def _penalize(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Bans, biases and penalties applied: a new float32 tensor, or `logits` itself where no row asks for any."""
    if not any(_changes_logits(spec) for spec in specs):
        return logits
    logits = logits.to(torch.float32, copy=True)
    _ban(logits, specs)
    _bias(logits, specs)
    _repetition(logits, specs)
    _presence_and_frequency(logits, specs)
    return logits


def _changes_logits(spec: SampleSpec) -> bool:
    return bool(spec.banned_token_ids or spec.params.logit_bias or spec.params.has_penalties)


def _ban(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    banned = [spec.banned_token_ids for spec in specs]
    if any(banned):
        logits[_places(banned, logits.device)] = -torch.inf


def _bias(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    biases = [spec.params.logit_bias for spec in specs]
    if any(biases):
        values = np.fromiter(chain.from_iterable(bias.values() for bias in biases), np.float32)
        logits[_places([tuple(bias) for bias in biases], logits.device)] += to_device(values, logits.device)


def _repetition(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    """Divides the positive and multiplies the negative logits of all tokens seen (Keskar et al. 2019, CTRL)."""
    seen = [spec.token_ids if spec.params.repetition_penalty != 1.0 else () for spec in specs]
    if any(map(len, seen)):
        places = _places(seen, logits.device)
        penalty = _per_row(specs, lambda params: params.repetition_penalty, logits.device)[places[0], 0]
        values = logits[places]
        logits[places] = torch.where(values > 0, values / penalty, values * penalty)  # repeats write the same value


def _presence_and_frequency(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    counts = [
        Counter(spec.token_ids[spec.num_prompt_tokens :])
        if spec.params.presence_penalty or spec.params.frequency_penalty
        else Counter[int]()
        for spec in specs
    ]
    if any(counts):
        device = logits.device
        places = _places([tuple(count) for count in counts], device)
        times = to_device(list(chain.from_iterable(count.values() for count in counts)), device)
        presence = _per_row(specs, lambda params: params.presence_penalty, device)[places[0], 0]
        frequency = _per_row(specs, lambda params: params.frequency_penalty, device)[places[0], 0]
        logits[places] -= presence + frequency * times


def _draw(logits: Tensor, specs: Sequence[SampleSpec], positions: Sequence[int]) -> Tensor:
    """`logits` [rows, vocab] in float32. A row with nothing left to draw from gives its first token."""
    device, vocab = logits.device, logits.shape[-1]
    temperatures = _per_row(specs, lambda params: max(params.temperature, MIN_TEMPERATURE), device)
    largest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = (logits - largest).div_(temperatures).exp_()  # the most likely token's is 1
    numbers = np.array([uniform(spec.seed, at) for spec, at in zip(specs, positions, strict=True)])
    if device.type == "cuda":
        return _draw_on_gpu(weights, specs, to_device(numbers, device))
    _filter(weights, specs)
    cumulative = _whole(weights).cumsum(-1)
    total = cumulative[:, -1:]
    targets = (torch.from_numpy(numbers)[:, None] * total).long()
    # The first token whose cumulative weight exceeds the target; a filtered one adds nothing and is never it.
    found = torch.searchsorted(cumulative, targets.minimum(total - 1), right=True)
    return found.clamp(max=vocab - 1).squeeze(1)


def _draw_on_gpu(weights: Tensor, specs: Sequence[SampleSpec], numbers: Tensor) -> Tensor:
    """The same filters and the same draw, in two kernels."""
    from engine.kernels.select import draw, thresholds

    min_p = to_device(np.array([spec.params.min_p for spec in specs], dtype=np.float32), weights.device)
    top_k = to_device([spec.params.top_k for spec in specs], weights.device)
    top_p = to_device(np.array([spec.params.top_p for spec in specs]), weights.device)
    return draw(weights, thresholds(weights, min_p, top_k, top_p), numbers)


def _filter(weights: Tensor, specs: Sequence[SampleSpec]) -> None:
    """Zero in place what min_p, top_k and top_p exclude, each on what the one before it left."""
    device, vocab = weights.device, weights.shape[-1]
    if any(spec.params.min_p for spec in specs):
        _keep(weights, _per_row(specs, lambda params: params.min_p, device))
    ks = {row: spec.params.top_k for row, spec in enumerate(specs) if 0 < spec.params.top_k < vocab}
    if ks:
        rows = to_device(list(ks), device)
        top = weights[rows].topk(max(ks.values()), -1).values
        thresholds = top.gather(1, to_device([k - 1 for k in ks.values()], device).unsqueeze(1))
        _keep_rows(weights, rows, thresholds)
    ps = {row: spec.params.top_p for row, spec in enumerate(specs) if spec.params.top_p < 1.0}
    if ps:
        rows = to_device(list(ps), device)
        top_p = to_device(np.array([[p] for p in ps.values()]), device)
        _keep_rows(weights, rows, _nucleus(weights[rows], top_p))


def _nucleus(weights: Tensor, top_p: Tensor) -> Tensor:
    """Per row the smallest weight of the smallest set of most likely tokens that reaches `top_p` (Holtzman 2020)."""
    # Sums of whole numbers, so that looking among the largest first gives exactly what sorting everything gives.
    wanted = (_whole(weights).sum(-1, keepdim=True) * top_p).ceil().long().clamp(min=1)
    size = min(NUCLEUS_SIZE, weights.shape[-1])
    largest = weights.topk(size, -1).values
    reached = _whole(largest).cumsum(-1)
    if size < weights.shape[-1] and bool((reached[:, -1:] < wanted).any()):
        largest = weights.sort(-1, descending=True).values
        reached = _whole(largest).cumsum(-1)
    last = torch.searchsorted(reached, wanted).clamp(max=largest.shape[-1] - 1)
    return largest.gather(1, last)


def _keep_rows(weights: Tensor, rows: Tensor, thresholds: Tensor) -> None:
    if len(rows) == len(weights):
        _keep(weights, thresholds)
    else:
        kept = weights[rows]
        _keep(kept, thresholds)
        weights[rows] = kept


def _keep(weights: Tensor, thresholds: Tensor) -> None:
    weights.masked_fill_(weights < thresholds, 0.0)


def _whole(weights: Tensor) -> Tensor:
    return (weights.double() * 2.0**WEIGHT_BITS).long()


def _per_row(specs: Sequence[SampleSpec], value: Callable[[SamplingParams], float], device: torch.device) -> Tensor:
    """[rows, 1], float32"""
    return to_device(np.array([[value(spec.params)] for spec in specs], dtype=np.float32), device)


def _places(columns: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) of every element of ragged `columns`, as index tensors."""
    lengths = [len(each) for each in columns]
    flat = np.fromiter(chain.from_iterable(columns), dtype=np.int64, count=sum(lengths))
    rows = np.repeat(np.arange(len(columns)), lengths)
    return to_device(rows, device), to_device(flat, device)
