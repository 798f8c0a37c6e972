"""The lines of offline batch files: from a JSON line to a job, from its end to a JSON line. Pure.

A plain line holds `prompt` (text or token ids) or `messages`, an optional `id`, and any sampling fields. A line in
OpenAI's batch format holds `custom_id`, `url` and `body`. Both keep their id; a plain line without one gets its
number in the file, from 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from baton.outputs import Conversation, Job, RequestOutput
from engine.errors import InvalidRequest
from engine.request import SamplingParams
from router.schema import ChatBody, CompletionBody, decode_body, refuse_unsupported

CHAT_URL = "/v1/chat/completions"
COMPLETION_URL = "/v1/completions"


class _Envelope(msgspec.Struct):
    """What tells the formats apart, and whose line it is."""

    id: str | int | None = None
    custom_id: str | None = None
    url: str | None = None
    body: msgspec.Raw = msgspec.Raw()  # empty: a plain line


class _Messages(msgspec.Struct):
    messages: list[dict[str, Any]]


class _Prompt(msgspec.Struct):
    prompt: str | list[int]


@dataclass(frozen=True, slots=True)
class Task:
    """One line. `url` is set for a line in batch format, `job` holds the reason when the line is no job."""

    id: str | int
    url: str | None
    job: Job | InvalidRequest


def parse_line(line: bytes, number: int, defaults: SamplingParams) -> Task:
    """The task of the `number`-th line; fields of the line go before `defaults`."""
    try:
        envelope = decode_body(line, _Envelope)
    except InvalidRequest as error:
        return Task(number, None, error)
    identity = envelope.custom_id if envelope.custom_id is not None else envelope.id
    task_id = number if identity is None else identity
    body = bytes(envelope.body)
    url = (envelope.url or "") if body else None
    try:
        job: Job | InvalidRequest = _plain_job(line, defaults) if url is None else _batch_job(url, body, defaults)
    except InvalidRequest as error:
        job = error
    return Task(task_id, url, job)


def _plain_job(line: bytes, defaults: SamplingParams) -> Job:
    fields = decode_body(line, dict[str, Any])
    if ("prompt" in fields) == ("messages" in fields):
        raise InvalidRequest("a line needs either prompt or messages", param="prompt")
    given = {name: value for name, value in fields.items() if name not in ("id", "custom_id", "prompt", "messages")}
    if "messages" in fields:
        return Job(Conversation(decode_body(line, _Messages).messages), _params(defaults, given))
    return Job(decode_body(line, _Prompt).prompt, _params(defaults, given))


def _batch_job(url: str, body: bytes, defaults: SamplingParams) -> Job:
    if url == CHAT_URL:
        chat = decode_body(body, ChatBody)
        refuse_unsupported(chat)
        given = _given(chat)
        if chat.max_completion_tokens is not None:
            given["max_tokens"] = chat.max_completion_tokens
        return Job(Conversation(chat.messages), _params(defaults, given))
    if url == COMPLETION_URL:
        completion = decode_body(body, CompletionBody)
        refuse_unsupported(completion)
        prompt = decode_body(body, _Prompt).prompt  # one prompt a line: its output has one body
        return Job(prompt, _params(defaults, _given(completion)))
    raise InvalidRequest(f"url must be {COMPLETION_URL} or {CHAT_URL}, not {url!r}", param="url")


def _given(body: ChatBody | CompletionBody) -> dict[str, Any]:
    if body.logprobs:
        raise InvalidRequest("logprobs is not available in the batch format; use plain lines", param="logprobs")
    names = (name for name in SamplingParams.__struct_fields__ if name != "logprobs")
    given = {name: value for name in names if (value := getattr(body, name, None)) is not None}
    return given | ({"top_k": 0} if given.get("top_k") == -1 else {})


def _params(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    fields = msgspec.structs.asdict(defaults) | given
    if isinstance(fields["stop"], str):
        fields["stop"] = (fields["stop"],)
    try:
        return msgspec.convert(fields, SamplingParams, str_keys=True)
    except msgspec.ValidationError as error:
        what, _, place = str(error).replace("`", "").partition(" - at $.")
        raise InvalidRequest(f"{place}: {what}" if place else what, param=place or None) from None


def done_line(task: Task, output: RequestOutput, model: str, created: int) -> bytes:
    num_output = sum(len(completion.token_ids) for completion in output.outputs)
    num_prompt = len(output.prompt_token_ids)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_output, "total_tokens": num_prompt + num_output}
    if task.url is None:
        record: dict[str, Any] = {"id": task.id, "choices": output.outputs, "usage": usage}
        if output.prompt_logprobs is not None:
            record["prompt_logprobs"] = output.prompt_logprobs
        return msgspec.json.encode(record) + b"\n"
    chat = task.url == CHAT_URL
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{task.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {
                "index": completion.index,
                **(
                    {"message": {"role": "assistant", "content": completion.text}}
                    if chat
                    else {"text": completion.text}
                ),
                "logprobs": None,
                "finish_reason": completion.finish_reason,
            }
            for completion in output.outputs
        ],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": f"batch_req_{task.id}", "body": body}
    return _batch_line(task, response, None)


def _said(text: str, chat: bool) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}} if chat else {"text": text}


def failed_line(task: Task, error: Exception) -> bytes:
    invalid = isinstance(error, InvalidRequest)
    fields = {
        "message": str(error),
        "type": "invalid_request_error" if invalid else "server_error",
        "param": error.param if isinstance(error, InvalidRequest) else None,
        "code": error.code if isinstance(error, InvalidRequest) else None,
    }
    if task.url is None:
        return msgspec.json.encode({"id": task.id, "error": fields}) + b"\n"
    return _batch_line(task, None, fields)


def _batch_line(task: Task, response: Mapping[str, Any] | None, error: Mapping[str, Any] | None) -> bytes:
    record = {"id": f"batch_req_{task.id}", "custom_id": task.id, "response": response, "error": error}
    return msgspec.json.encode(record) + b"\n"


def recorded_id(line: bytes) -> str | int:
    """The id of an output line. Raises InvalidRequest for a line that is not whole."""
    envelope = decode_body(line, _Envelope)
    identity = envelope.custom_id if envelope.custom_id is not None else envelope.id
    if identity is None:
        raise InvalidRequest("a line without id is not an output of baton generate")
    return identity
