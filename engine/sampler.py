"""From logits to tokens: a function of (logits, params, seed, position), never of batch mates or worker.

Executors call it with the logits of the rows that sample. Order, as in vLLM: log probabilities of the model's own
distribution; banned tokens and logit_bias; repetition, presence and frequency penalties; temperature; min_p; top_k;
top_p; the draw. A filter keeps every token that ties with the last one kept, so its result does not depend on how
a device sorts.

The draw is the inverse of the cumulative distribution in vocabulary order at a number hashed from seed and position.
Weights are whole numbers there: their sum is exact in any order, hence the same on every device and in every batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from engine.executors.base import Sampled, SampleSpec, TokenLogprobs
from engine.request import SamplingParams

WEIGHT_BITS = 44  # of the most likely token; 2**18 of them still fit into 63 bits
NUCLEUS_SIZE = 1024  # most likely tokens to look among before a whole row is sorted
MIN_TEMPERATURE = 1e-30  # what is smaller may be zero in float32
LOGPROB_ROWS = 32  # prompt positions at a time: bounds the memory for a large vocabulary


def sample(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
    """Choose the next token of every row of `logits` [num_rows, vocab]; `logits` is left as it is."""
    shaped = _penalize(logits, specs)
    random_rows = [row for row, spec in enumerate(specs) if not spec.params.greedy]
    if not random_rows:
        token_ids: list[int] = shaped.argmax(-1).tolist()
    elif len(random_rows) == len(specs):
        token_ids = _draw(shaped.float(), specs)
    else:
        token_ids = shaped.argmax(-1).tolist()
        drawn = _draw(shaped[random_rows].float(), [specs[row] for row in random_rows])
        for row, token_id in zip(random_rows, drawn, strict=True):
            token_ids[row] = token_id
    rows = [row for row, spec in enumerate(specs) if spec.params.logprobs is not None]
    if not rows:
        return [Sampled(token_id) for token_id in token_ids]
    found = _logprobs(
        logits[rows] if len(rows) < len(specs) else logits,
        [token_ids[row] for row in rows],
        [specs[row].params.logprobs or 0 for row in rows],
    )
    logprobs = dict(zip(rows, found, strict=True))
    return [Sampled(token_id, logprobs.get(row)) for row, token_id in enumerate(token_ids)]


def prompt_logprobs(logits: Tensor, next_token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """What the model thought of each of `next_token_ids`; row i of `logits` [n, vocab] is the position before it."""
    found: list[TokenLogprobs] = []
    for start in range(0, len(next_token_ids), LOGPROB_ROWS):
        token_ids = next_token_ids[start : start + LOGPROB_ROWS]
        found += _logprobs(logits[start : start + len(token_ids)], token_ids, [num_top] * len(token_ids))
    return found


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by its arguments, with 53 random bits."""
    digest: int = xxh3_64_intdigest(seed.to_bytes(8, "little") + position.to_bytes(8, "little"))
    return (digest >> 11) * 2.0**-53


def _logprobs(logits: Tensor, token_ids: Sequence[int], num_top: Sequence[int]) -> list[TokenLogprobs]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, _column(token_ids, logits.device)).squeeze(1).tolist()
    most = min(max(num_top), logits.shape[-1])
    if most == 0:
        return [TokenLogprobs(*pair) for pair in zip(token_ids, chosen, strict=True)]
    top_ids = _most_likely(logprobs, most)
    top = zip(top_ids.tolist(), logprobs.gather(1, top_ids).tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids[:num], values[:num], strict=True)))
        for token_id, logprob, num, (ids, values) in zip(token_ids, chosen, num_top, top, strict=True)
    ]


def _most_likely(values: Tensor, num: int) -> Tensor:
    """Column indices [rows, num] of the largest float32 `values`, largest first, equal ones by index."""
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers these compare as the floats do
    columns = torch.arange(values.shape[-1], device=values.device)
    # Unique keys: without them top-k may pick any of equal values, depending on `num`.
    keys = (ordered.long() << 32) - columns
    return keys.topk(num, -1).indices


def _penalize(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """Bans, biases and penalties applied: a new float32 tensor, or `logits` itself where no row asks for any."""
    if not any(_changes_logits(spec) for spec in specs):
        return logits
    logits = logits.float().clone()
    _ban(logits, specs)
    _bias(logits, specs)
    _repetition(logits, specs)
    _presence_and_frequency(logits, specs)
    return logits


def _changes_logits(spec: SampleSpec) -> bool:
    params = spec.params
    return bool(
        spec.banned_token_ids
        or params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


def _ban(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    banned = [spec.banned_token_ids for spec in specs]
    if any(banned):
        logits[_places(banned, logits.device)] = -torch.inf


def _bias(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    biases = [spec.params.logit_bias for spec in specs]
    if any(biases):
        values = list(chain.from_iterable(bias.values() for bias in biases))
        logits[_places([tuple(bias) for bias in biases], logits.device)] += torch.tensor(values, device=logits.device)


def _repetition(logits: Tensor, specs: Sequence[SampleSpec]) -> None:
    """Divides the positive and multiplies the negative logits of all tokens seen (Keskar et al. 2019, CTRL)."""
    seen = [spec.token_ids if spec.params.repetition_penalty != 1.0 else () for spec in specs]
    if any(map(len, seen)):
        places = _places(seen, logits.device)
        penalty = torch.tensor([spec.params.repetition_penalty for spec in specs], device=logits.device)[places[0]]
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
        times = torch.tensor(list(chain.from_iterable(count.values() for count in counts)), device=device)
        presence = torch.tensor([spec.params.presence_penalty for spec in specs], device=device)[places[0]]
        frequency = torch.tensor([spec.params.frequency_penalty for spec in specs], device=device)[places[0]]
        logits[places] -= presence + frequency * times


def _draw(logits: Tensor, specs: Sequence[SampleSpec]) -> list[int]:
    """`logits` [rows, vocab] in float32. A row with nothing left to draw from gives its first token."""
    device, vocab = logits.device, logits.shape[-1]
    temperatures = _per_row(specs, lambda params: max(params.temperature, MIN_TEMPERATURE), device)
    largest = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = ((logits - largest) / temperatures).exp_()  # the most likely token's is 1
    _filter(weights, specs)
    cumulative = _whole(weights).cumsum(-1)
    total = cumulative[:, -1:]
    numbers = torch.tensor([[uniform(spec.seed, len(spec.token_ids))] for spec in specs], dtype=torch.float64)
    targets = (numbers.to(device) * total).long()
    # The first token whose cumulative weight exceeds the target; a filtered one adds nothing and is never it.
    found = torch.searchsorted(cumulative, targets.minimum(total - 1), right=True)
    token_ids: list[int] = found.clamp(max=vocab - 1).squeeze(1).tolist()
    return token_ids


def _filter(weights: Tensor, specs: Sequence[SampleSpec]) -> None:
    """Zero in place what min_p, top_k and top_p exclude, each on what the one before it left."""
    device, vocab = weights.device, weights.shape[-1]
    if any(spec.params.min_p for spec in specs):
        _keep(weights, _per_row(specs, lambda params: params.min_p, device))
    rows = [row for row, spec in enumerate(specs) if 0 < spec.params.top_k < vocab]
    if rows:
        ks = [specs[row].params.top_k for row in rows]
        top = weights[rows].topk(max(ks), -1).values
        thresholds = top.gather(1, _column([k - 1 for k in ks], device))
        _keep_rows(weights, rows, thresholds)
    rows = [row for row, spec in enumerate(specs) if spec.params.top_p < 1.0]
    if rows:
        top_p = torch.tensor([[specs[row].params.top_p] for row in rows], dtype=torch.float64, device=device)
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


def _keep_rows(weights: Tensor, rows: list[int], thresholds: Tensor) -> None:
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
    return torch.tensor([[value(spec.params)] for spec in specs], dtype=torch.float32, device=device)


def _column(indices: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(indices, device=device).unsqueeze(1)


def _places(columns: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(row, column) of every element of ragged `columns`, as index tensors."""
    lengths = [len(each) for each in columns]
    flat = np.fromiter(chain.from_iterable(columns), dtype=np.int64, count=sum(lengths))
    rows = np.repeat(np.arange(len(columns)), lengths)
    return torch.from_numpy(rows).to(device), torch.from_numpy(flat).to(device)
