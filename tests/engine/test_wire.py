"""What goes over the wire comes back the same."""

import random

import pytest

from engine.executors.base import TokenLogprobs
from engine.request import FinishReason, Request, RequestId, SamplingParams
from engine.wire import (
    finish_from_pb,
    finish_to_pb,
    logprobs_from_pb,
    logprobs_to_pb,
    lone_tokens_from_bytes,
    lone_tokens_to_bytes,
    params_from_pb,
    params_to_pb,
    request_from_pb,
    submit_to_pb,
)
from protos import worker_pb2 as pb


def test_sampling_parameters_survive_the_wire_exactly() -> None:
    params = SamplingParams(
        max_tokens=7,
        min_tokens=3,
        temperature=0.7,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=-0.3,
        frequency_penalty=0.2,
        logit_bias={5: -1.5, 9: 0.1},
        stop_token_ids=(1, 2),
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=4,
    )
    again = pb.SamplingParams.FromString(params_to_pb(params).SerializeToString())
    assert params_from_pb(again) == params


def test_logprobs_that_were_not_asked_for_stay_not_asked_for() -> None:
    params = params_from_pb(params_to_pb(SamplingParams()))
    assert params.logprobs is None
    assert params.prompt_logprobs is None


def test_a_request_survives_the_wire_under_the_workers_own_name() -> None:
    rng = random.Random(3)
    request = Request(
        id=RequestId("chat-1"),
        token_ids=tuple(rng.randrange(1 << 20) for _ in range(1000)),
        num_prompt_tokens=990,
        params=SamplingParams(temperature=0.3),
        seed=(1 << 64) - 1,
        priority=-5,
        cache_salt="tenant",
        adapter="fr",
    )
    message = pb.Submit.FromString(submit_to_pb(request, 8, 1500, b"offer").SerializeToString())
    again = request_from_pb(message, request.id)
    assert again == request
    assert (message.handle, message.timeout_ms, message.offer) == (8, 1500, b"offer")


def test_finish_reasons_and_logprobs_map_both_ways() -> None:
    for reason in (None, *FinishReason):
        assert finish_from_pb(finish_to_pb(reason)) == reason
    logprobs = TokenLogprobs(5, -0.5, ((5, -0.5), (7, -1.25)))
    assert logprobs_from_pb(logprobs_to_pb(logprobs)) == logprobs


def test_lone_tokens_survive_their_bytes_and_other_bytes_are_refused() -> None:
    tokens = [(1, 2, 3), ((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1)]
    data = lone_tokens_to_bytes(tokens)
    assert list(lone_tokens_from_bytes(data)) == tokens
    assert list(lone_tokens_from_bytes(b"")) == []
    with pytest.raises(ValueError, match="31 bytes"):
        lone_tokens_from_bytes(data[:-1])
