"""The gRPC side of a link: one bidirectional stream between a sink and a source (protos/transfer.proto).

Used by SourceLink and SinkLink. The service has one method, so its handler and stub are written out here.
"""

from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import grpc

from engine import auth
from engine.kv.layout import KvLayout
from protos import transfer_pb2 as pb

SERVICE = "baton.transfer.KvTransfer"
METHOD = "Link"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.use_local_subchannel_pool", 1),  # a link that was made again gets a connection of its own
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def link_handler(serve: Callable[[grpc.aio.ServicerContext], Awaitable[None]]) -> grpc.GenericRpcHandler:
    async def link(_requests: Any, context: grpc.aio.ServicerContext) -> None:
        await serve(context)

    method = grpc.stream_stream_rpc_method_handler(
        link,
        request_deserializer=pb.SinkMessage.FromString,
        response_serializer=pb.SourceMessage.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})


def open_link(channel: grpc.aio.Channel, token: str) -> grpc.aio.StreamStreamCall:
    method: grpc.aio.StreamStreamMultiCallable = channel.stream_stream(
        f"/{SERVICE}/{METHOD}",
        request_serializer=pb.SinkMessage.SerializeToString,
        response_deserializer=pb.SourceMessage.FromString,
    )
    return method(metadata=auth.metadata(token))


def layout_to_message(layout: KvLayout) -> pb.KvLayout:
    return pb.KvLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        dtype=layout.dtype,
        first_layer=layout.first_layer,
        first_kv_head=layout.first_kv_head,
    )


def layout_from_message(message: pb.KvLayout) -> KvLayout:
    """Raise ValueError when the message is no layout."""
    return KvLayout(
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        dtype=message.dtype,
        first_layer=message.first_layer,
        first_kv_head=message.first_kv_head,
    )


def layer_ranges(layer_groups: tuple[int, ...], layout: KvLayout) -> tuple[range, ...]:
    """The layers of each group, from their exclusive ends. Raise ValueError when they do not tile the layout."""
    groups = tuple(range(start, stop) for start, stop in pairwise((0, *layer_groups)))
    if not groups or any(not group for group in groups) or groups[-1].stop != layout.num_layers:
        raise ValueError(f"layer_groups must ascend to {layout.num_layers}, not {layer_groups[:8]}")
    return groups
