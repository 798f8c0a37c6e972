"""What both roles' servers share: who the worker is, and its gRPC server on the internal plane."""

from dataclasses import dataclass
from typing import Any

import grpc

from engine.auth import TokenInterceptor, check_bind
from engine.engine import Engine
from engine.wire import CHANNEL_OPTIONS
from protos import worker_pb2 as pb

STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """How a worker presents itself and where it may be reached."""

    worker_id: str
    epoch: str  # random, new with every process
    model: str  # served model name
    bind_host: str = "127.0.0.1"
    advertise_host: str = ""  # where others reach it; the bind host when empty
    port: int = 0  # 0: any free one
    token: str = ""


class InternalServer:
    """A grpc.aio server that demands the deployment's token. Register services, `start`, `stop`."""

    def __init__(self, identity: WorkerIdentity) -> None:
        """Binds the port. Raises ValueError when it would be open to other machines without a token."""
        check_bind(identity.bind_host, identity.token)
        self.grpc: Any = grpc.aio.server(
            interceptors=[TokenInterceptor(identity.token)],
            options=[
                *CHANNEL_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        port = self.grpc.add_insecure_port(_join(identity.bind_host, identity.port))
        self.address = _join(identity.advertise_host or identity.bind_host, port)

    async def start(self) -> None:
        await self.grpc.start()

    async def stop(self) -> None:
        await self.grpc.stop(STOP_GRACE_S)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def describe(
    identity: WorkerIdentity, role: str, fingerprint: str, engine: Engine, max_num_seqs: int
) -> pb.Description:
    """What a router learns of a worker when it attaches."""
    executor = engine.executor
    return pb.Description(
        worker_id=identity.worker_id,
        role=role,
        model=identity.model,
        fingerprint=fingerprint,
        block_size=executor.layout.block_size,
        num_blocks=engine.kv.num_blocks,
        max_model_len=executor.max_model_len,
        max_num_seqs=max_num_seqs,
        vocab_size=executor.vocab_size,
        kv_bytes_per_token=executor.layout.block_bytes // executor.layout.block_size,
    )
