"""The HTTP front: an ASGI application that speaks the OpenAI API in front of a Generator.

Owns routing, authentication, request ids and the mapping of failures to answers; `router.server` runs it. Deny by
default: with API keys configured, only liveness and readiness answer without one. Nothing a client sends may end in a
500, and a 500 says nothing.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec
from prometheus_client import exposition
from prometheus_client.registry import Collector

from engine.errors import InvalidRequest
from router.answer import Answerer, Job
from router.bodies import BodyBudget, Share
from router.completions import Arrival, Planner
from router.errors import ApiError, ClientGone, as_api_error
from router.exchange import Exchange, Receive, Scope, Send, WriteBatch
from router.generation import Generator, ModelCard, RouteHints
from router.metrics import Metrics
from router.prompts import PromptEncoder, check_ids
from router.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    decode_body,
    refuse_unsupported,
)
from router.threads import Threads
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 32 * 1024
MAX_INLINE_BYTES = 64 * 1024  # a longer body is decoded, checked and turned into a prompt in threads
MAX_INLINE_IDS = 4096  # written as JSON, with their strings, on the loop
OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
MAX_NAME_BYTES = 256
SUPPLY_BYTES = 1024  # of random bytes
MODEL_PREFIX = "/v1/models/"

Handler = Callable[[Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FrontConfig:
    """`request_timeout_s` runs from a request's arrival to its last token."""

    max_body_bytes: int = 32 * 1024 * 1024
    max_bodies_bytes: int = 512 * 1024 * 1024  # of all long bodies at once, until they are prompts
    body_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    tokenizer_threads: int = 2
    stream_interval: int = 1  # tokens of a choice in one event, after the first
    show_timeline: bool = True  # to clients that ask; it names workers


class RandomBits:
    """secrets.randbits for whole bytes, from a supply: the kernel takes as long for one of them as for many."""

    def __init__(self) -> None:
        self._supply = b""

    def __call__(self, num_bits: int) -> int:
        size = num_bits // 8
        if len(self._supply) < size:
            self._supply = os.urandom(SUPPLY_BYTES)
        drawn, self._supply = self._supply[:size], self._supply[size:]
        return int.from_bytes(drawn, "big")


class Front:
    """One ASGI application. `clock` is monotonic and the Generator's; `draw_bits` gives random seeds and ids; `scrape`
    what to show of all processes in place of this one's metrics."""

    def __init__(
        self,
        generator: Generator,
        card: ModelCard,
        tokenizer: Tokenizer,
        metrics: Metrics,
        config: FrontConfig,
        *,
        status: Callable[[], Mapping[str, Any]] | None = None,
        scrape: Callable[[], Collector] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        draw_bits: Callable[[int], int] | None = None,
    ) -> None:
        self._generator = generator
        self._card = card
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._scrape = scrape or metrics.snapshot
        self._config = config
        self._clock = clock
        self._wall_clock = wall_clock
        self._draw_bits = draw_bits = draw_bits or RandomBits()
        self._started = int(wall_clock())
        self._batch = WriteBatch()
        self._threads = Threads(config.tokenizer_threads)
        self._bodies = BodyBudget(max(config.max_bodies_bytes, config.max_body_bytes), MAX_INLINE_BYTES)
        self._encoder = PromptEncoder(tokenizer, card, self._threads)
        self._planner = Planner(card, tokenizer, self._encoder, draw_bits)
        self._answerer = Answerer(generator, metrics, clock, stream_interval=config.stream_interval)
        self._key_digests: tuple[bytes, ...] = ()
        self.set_api_keys(config.api_keys)
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/completions": ("POST", self._completions),
            "/v1/chat/completions": ("POST", self._chat),
            "/tokenize": ("POST", self._tokenize),
            "/detokenize": ("POST", self._detokenize),
            "/v1/models": ("GET", self._models),
            "/health": ("GET", self._live),
            "/live": ("GET", self._live),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._show_metrics),
            "/version": ("GET", self._version),
        }
        if status is not None:
            self._status = status
            self._routes["/status"] = ("GET", self._show_status)

    def set_api_keys(self, keys: Sequence[str]) -> None:
        """Replace the accepted keys, at any time; none: no authentication. Raises ValueError for an empty key."""
        if not all(keys):
            raise ValueError("an API key must not be empty")
        self._key_digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def close(self) -> None:
        self._threads.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']} is not served")
        exchange = Exchange(scope, receive, send, lambda: f"{self._draw_bits(128):032x}", self._batch)
        route = exchange.path if exchange.path in self._routes else "other"
        try:
            _check_head(scope)
            await self._handle(exchange)
        except ClientGone:
            exchange.status = exchange.status or 499
        except Exception as error:  # the one guard between handlers and the server
            await self._fail(exchange, error)
        self._metrics.responses[route, exchange.status or 499] += 1

    async def _handle(self, exchange: Exchange) -> None:
        path = exchange.path
        if path not in OPEN_PATHS:
            self._tenant(exchange)
        route = ("GET", self._model) if path.startswith(MODEL_PREFIX) else self._routes.get(path)
        if route is None:
            raise ApiError(404, "there is nothing at this path", "not_found_error", code="not_found")
        method, handler = route
        if exchange.method != method and not (exchange.method == "HEAD" and method == "GET"):
            allow = ((b"allow", b"GET, HEAD" if method == "GET" else method.encode()),)
            raise ApiError(405, f"use {method} for this path", code="method_not_allowed", headers=allow)
        await handler(exchange)

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        answer = as_api_error(error)
        if answer.status >= 500:
            unknown = error if answer.status == 500 else None
            log.error("request %s failed: %r", exchange.request_id, error, exc_info=unknown)
        if exchange.status is None:
            await exchange.respond(answer.status, answer.body(), headers=answer.headers)
        else:
            # No [DONE] and no end of the body: the server then cuts the connection, which no client takes for success.
            exchange.write_events(b"data: " + answer.body() + b"\n\n")
            await exchange.flush()

    def _tenant(self, exchange: Exchange) -> str:
        """A name for the key that was sent; empty where none is demanded. Raises ApiError 401."""
        if not self._key_digests:
            return ""
        scheme, _, key = exchange.headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._key_digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong",
                "authentication_error",
                code="invalid_api_key",
                headers=((b"www-authenticate", b"Bearer"),),
            )
        return hmac.new(key.strip(), b"cache salt", hashlib.sha256).hexdigest()[:32]

    def _arrival(self, exchange: Exchange, long: bool) -> Arrival:
        received, tenant = self._clock(), self._tenant(exchange)
        return Arrival(
            request_id=exchange.request_id,
            received=received,
            created=int(self._wall_clock()),
            deadline=received + self._config.request_timeout_s,
            tenant=tenant,
            timeline=self._config.show_timeline and exchange.headers.get(b"x-baton-timeline") == b"1",
            long=long,
            # Names are a key's own: no client takes the turns or the session of another key's.
            hints=RouteHints(
                _name(exchange, b"x-session-id"),
                tenant + _name(exchange, b"x-tenant-id"),
                _limit(exchange, b"x-slo-ttft-ms"),
                _limit(exchange, b"x-slo-tpot-ms"),
            ),
        )

    async def _decoded(self, exchange: Exchange, kind: type[Body], share: Share) -> tuple[Body, bool]:
        """The request's body, and whether it is long."""
        body = await exchange.read_json(self._config.max_body_bytes, self._config.body_timeout_s, share)
        if len(body) <= MAX_INLINE_BYTES:
            return decode_body(body, kind), False
        return await self._threads.run(partial(decode_body, body, kind)), True

    async def _job(self, exchange: Exchange, kind: type[Body], plan: Callable[[Body, Arrival], Awaitable[Job]]) -> Job:
        """What the body asks for; nothing keeps the body itself for as long as that runs."""
        with self._bodies.share() as share:
            body, long = await self._decoded(exchange, kind, share)
            return await plan(body, self._arrival(exchange, long))

    async def _completions(self, exchange: Exchange) -> None:
        await self._answerer.answer(exchange, await self._job(exchange, CompletionBody, self._planner.completion))

    async def _chat(self, exchange: Exchange) -> None:
        await self._answerer.answer(exchange, await self._job(exchange, ChatBody, self._planner.chat))

    async def _tokenize(self, exchange: Exchange) -> None:
        with self._bodies.share() as share:
            answer = await self._token_ids(exchange, share)
        await exchange.respond(200, answer)

    async def _token_ids(self, exchange: Exchange, share: Share) -> bytes:
        body, long = await self._decoded(exchange, TokenizeBody, share)
        self._planner.check_model(body.model)
        refuse_unsupported(body)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids: Sequence[int] = await self._encoder.encode(body.prompt, add_special_tokens=special, param="prompt")
        else:
            special, owner = body.add_special_tokens is True, self._tenant(exchange)
            ids = (await self._encoder.chat(body, add_special_tokens=special, owner=owner, long=long)).token_ids

        def answer() -> bytes:
            strings = [self._tokenizer.token_string(token) for token in ids] if body.return_token_strs else None
            fields = {"count": len(ids), "max_model_len": self._card.max_model_len, "tokens": ids}
            return msgspec.json.encode({**fields, "token_strs": strings})

        return answer() if len(ids) <= MAX_INLINE_IDS else await self._threads.run(answer)

    async def _detokenize(self, exchange: Exchange) -> None:
        with self._bodies.share() as share:
            text = await self._text(exchange, share)
        await exchange.respond(200, msgspec.json.encode({"prompt": text}))

    async def _text(self, exchange: Exchange, share: Share) -> str:
        body, long = await self._decoded(exchange, DetokenizeBody, share)
        self._planner.check_model(body.model)
        if len(body.tokens) > self._card.max_model_len:
            raise InvalidRequest(f"tokens may hold at most {self._card.max_model_len} ids", param="tokens")
        check_ids(body.tokens, self._card.vocab_size, "tokens")
        return await self._encoder.decode(body.tokens, skip_special_tokens=False, long=long)

    async def _models(self, exchange: Exchange) -> None:
        names = (self._card.name, *self._card.aliases)
        body = {"object": "list", "data": [self._describe(name) for name in names]}
        await exchange.respond(200, msgspec.json.encode(body))

    async def _model(self, exchange: Exchange) -> None:
        name = self._planner.check_model(exchange.path.removeprefix(MODEL_PREFIX))
        await exchange.respond(200, msgspec.json.encode(self._describe(name)))

    def _describe(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "baton",
            "root": self._card.name,
            "parent": None,
            "max_model_len": self._card.max_model_len,
        }

    async def _live(self, exchange: Exchange) -> None:
        await exchange.respond(200, b'{"status":"live"}')

    async def _ready(self, exchange: Exchange) -> None:
        if self._generator.ready:
            await exchange.respond(200, b'{"status":"ready"}')
        else:
            await exchange.respond(503, b'{"status":"no workers"}', headers=((b"retry-after", b"1"),))

    async def _show_metrics(self, exchange: Exchange) -> None:
        accept = exchange.headers.get(b"accept", b"").decode("latin-1")
        encode, content_type = exposition.choose_encoder(accept)
        body = await asyncio.to_thread(encode, self._scrape())  # of many workers that takes some ten milliseconds
        await exchange.respond(200, body, content_type=content_type.encode())

    async def _show_status(self, exchange: Exchange) -> None:
        """For operators (`baton status`): needs the key like every other route, and names no address."""
        await exchange.respond(200, msgspec.json.encode(self._status()))

    async def _version(self, exchange: Exchange) -> None:
        try:
            number = version("baton-serve")
        except PackageNotFoundError:
            number = "unknown"
        await exchange.respond(200, msgspec.json.encode({"version": number}))


def _name(exchange: Exchange, header: bytes) -> str:
    """A header's value, of which the router keeps so much; empty where it was not sent."""
    return exchange.headers.get(header, b"")[:MAX_NAME_BYTES].decode("latin-1")


def _limit(exchange: Exchange, header: bytes) -> float | None:
    """Seconds, from a header that has milliseconds; None where it was not sent. Raises ApiError 400."""
    value = exchange.headers.get(header)
    if value is None:
        return None
    try:
        milliseconds = float(value)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds < math.inf:
        name = header.decode()
        raise ApiError(400, f"{name} must be a positive number of milliseconds", param=name, code="invalid_header")
    return milliseconds / 1000.0


def _check_head(scope: Scope) -> None:
    size = len(scope.get("raw_path") or b"") + len(scope.get("query_string", b""))
    if size + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEAD_BYTES:
        message = f"the request's head is larger than {MAX_HEAD_BYTES} bytes"
        raise ApiError(431, message, code="headers_too_large")
