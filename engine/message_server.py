"""The server's end of message streams: accepts connections, checks the token, hands each stream to its service.

Made by the rims of workers. A stream lives as long as its service's coroutine runs, and ends with it.
"""

import asyncio
import hmac
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from engine.auth import challenge_response, check_bind
from engine.message_stream import MAX_MESSAGE_BYTES, MessageStream, StreamLost

CHALLENGE_BYTES = 32
PROOF_BYTES = 32
HANDSHAKE_S = 5.0
MAX_HANDSHAKES = 128  # under way; then the oldest has to go
MAX_STREAMS = 512  # after it; both together below the usual limit of open files
BACKLOG = 1024
STOP_GRACE_S = 1.0  # for what was sent to be written

Serve = Callable[[MessageStream], Awaitable[None]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Service:
    parse: Callable[[bytes], Any]
    serve: Serve


class MessageServer:
    """`start`, then `stop`. Others reach it at `address`."""

    def __init__(self, host: str, port: int = 0, *, token: str, advertised_host: str = "") -> None:
        """Binds the port, 0 for a free one. Raises ValueError when it would be open to others without a token."""
        check_bind(host, token)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        self._token = token
        self._services: dict[str, _Service] = {}
        self._streams: dict[MessageStream, asyncio.Task[None]] = {}
        self._handshakes: dict[MessageStream, None] = {}  # of those, the oldest first
        self._stopping = False
        self._server: asyncio.Server | None = None
        name, bound = advertised_host or host, self._listener.getsockname()[1]
        self.address = f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"

    def register(self, service: str, parse: Callable[[bytes], Any], serve: Serve) -> None:
        """`serve` runs for each stream that asks for this service; `parse` reads what comes on it."""
        self._services[service] = _Service(parse, serve)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: MessageStream(bytes, self._accept), sock=self._listener, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """Cancels every service and ends its stream; what was sent before has a moment to be written."""
        self._stopping = True  # for what was accepted already and is handed over only now
        if self._server is not None:
            self._server.close()
        self._listener.close()
        streams = dict(self._streams)
        for task in streams.values():
            task.cancel()
        ended = [asyncio.create_task(stream.wait_over()) for stream in streams]
        if ended:
            await asyncio.wait(ended, timeout=STOP_GRACE_S)
        for stream in streams:
            stream.abort()
        await asyncio.gather(*ended, *streams.values(), return_exceptions=True)

    def _accept(self, stream: MessageStream) -> None:
        if self._stopping:
            stream.abort()
            return
        if len(self._handshakes) >= MAX_HANDSHAKES:
            oldest = next(iter(self._handshakes))
            del self._handshakes[oldest]
            oldest.abort(StreamLost("too many others came"))
        self._handshakes[stream] = None
        task = self._streams[stream] = asyncio.get_running_loop().create_task(self._serve(stream))
        task.add_done_callback(lambda _task: self._streams.pop(stream))

    async def _serve(self, stream: MessageStream) -> None:
        try:
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    service = await self._greet(stream)
            finally:
                self._handshakes.pop(stream, None)
            if service is not None:
                await service.serve(stream)
        except (StreamLost, TimeoutError) as error:
            log.info("a stream from %s was lost: %r", stream.peer, error)
        except Exception:  # the guard at this boundary: it costs one stream
            log.exception("a stream's service failed")
        finally:
            stream.close()

    async def _greet(self, stream: MessageStream) -> _Service | None:
        """What the client asked for; None when it may not have it, and was told why."""
        challenge = os.urandom(CHALLENGE_BYTES)
        stream.send_bytes(challenge)
        proof = await stream.read() or b""
        digest, name = proof[:PROOF_BYTES], proof[PROOF_BYTES:]
        if not hmac.compare_digest(digest, challenge_response(self._token, challenge + name)):
            log.warning("%s does not know the deployment's token", stream.peer)
            stream.send_bytes(b"the deployment's token is missing or wrong")
            return None
        service = self._services.get(name.decode(errors="replace"))
        if service is None:
            stream.send_bytes(b"there is no such service here")
            return None
        if len(self._streams) - len(self._handshakes) >= MAX_STREAMS:
            stream.send_bytes(b"too many streams are open here")
            return None
        stream.parse, stream.max_bytes = service.parse, MAX_MESSAGE_BYTES
        stream.send_bytes(b"")
        return service
