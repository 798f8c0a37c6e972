"""What both ends of a link share: one stream of messages between a sink and a source (protos/transfer.proto).

Used by SourceLink and SinkLink.
"""

from itertools import pairwise

from engine.kv.layout import KvLayout
from protos import transfer_pb2 as pb

SERVICE = "kv-link"


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
