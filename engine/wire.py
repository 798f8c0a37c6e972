"""Requests and tokens to and from the messages of protos/worker.proto. Used by router and workers; no torch.

What arrives is checked where it is used: `Engine.submit` refuses a request that does not fit, so nothing here
trusts a size or an id.
"""

from collections.abc import Iterable, Iterator
from itertools import starmap
from struct import Struct
from typing import cast

from engine.executors.base import TokenLogprobs
from engine.kv.block_hash import bytes_to_tokens, token_bytes
from engine.request import FinishReason, Request, RequestId, SamplingParams
from engine.scheduler import EngineLoad
from engine.step_model import StepModel
from protos import worker_pb2 as pb

LoneToken = tuple[int, int, int]  # handle, index, token id

_LONE_TOKEN = Struct("<QII")
LONE_TOKEN_BYTES = _LONE_TOKEN.size

_FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PB: dict[int, FinishReason] = {number: reason for reason, number in _FINISH_TO_PB.items()}


def finish_to_pb(reason: FinishReason | None) -> pb.FinishReason:
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _FINISH_TO_PB[reason]


def finish_from_pb(number: int) -> FinishReason | None:
    return _FINISH_FROM_PB.get(number)


def params_to_pb(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
    )


def params_from_pb(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def submit_to_pb(request: Request, handle: int, timeout_ms: int, offer: bytes = b"") -> pb.Submit:
    """Raises ValueError, TypeError or OverflowError for a number that its field does not hold."""
    return pb.Submit(
        handle=handle,
        request_id=request.id,
        token_ids=token_bytes(request.token_ids),
        num_prompt_tokens=request.num_prompt_tokens,
        params=params_to_pb(request.params),
        seed=request.seed,
        priority=request.priority,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        adapter=request.adapter,
        timeout_ms=timeout_ms,
        offer=offer,
    )


def request_from_pb(message: pb.Submit, request_id: RequestId) -> Request:
    """`request_id`: unique in the worker, unlike the message's, which names the request in all its attempts."""
    return Request(
        id=request_id,
        token_ids=bytes_to_tokens(message.token_ids),
        num_prompt_tokens=message.num_prompt_tokens,
        params=params_from_pb(message.params),
        seed=message.seed,
        priority=message.priority,
        tenant=message.tenant,
        cache_salt=message.cache_salt,
        adapter=message.adapter,
    )


def lone_tokens_to_bytes(tokens: Iterable[LoneToken]) -> bytes:
    """Frame.tokens."""
    return b"".join(starmap(_LONE_TOKEN.pack, tokens))


def lone_tokens_from_bytes(data: bytes) -> Iterator[LoneToken]:
    """Raises ValueError for bytes that are no such tokens."""
    if len(data) % _LONE_TOKEN.size:
        raise ValueError(f"{len(data)} bytes are no tokens of {_LONE_TOKEN.size}")
    return cast("Iterator[LoneToken]", _LONE_TOKEN.iter_unpack(data))


def logprobs_to_pb(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_pb(message: pb.TokenLogprobs) -> TokenLogprobs:
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=False))
    return TokenLogprobs(message.token_id, message.logprob, top)


def load_to_pb(load: EngineLoad, model: StepModel | None) -> pb.Load:
    """The engine's part of a report; `model`: None while the worker does not know how long its steps take."""
    message = pb.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_free_blocks=load.num_free_blocks,
        num_waiting_tokens=load.num_waiting_tokens,
    )
    if model is not None:
        message.model.CopyFrom(model_to_pb(model))
        if load.num_queued_steps:
            queue_s = model.seconds(load.queued) + (load.num_queued_steps - 1) * model.base_s
            message.queue_us = round(queue_s * 1e6)
    return message


def model_to_pb(model: StepModel) -> pb.StepModel:
    return pb.StepModel(
        base_s=model.base_s,
        prefill_token_s=model.prefill_token_s,
        pair_s=model.pair_s,
        decode_s=model.decode_s,
        kv_token_s=model.kv_token_s,
    )


def model_from_pb(message: pb.StepModel) -> StepModel:
    return StepModel(message.base_s, message.prefill_token_s, message.pair_s, message.decode_s, message.kv_token_s)
