"""Which bytes go from which source rank's blocks into one sink rank's blocks. Pure arithmetic.

A plan is made once for each pair of worker and rank when a link is made, then asked for every piece that arrives.
It covers any tensor and pipeline split on each side, replicated kv heads (one replica sends) and block sizes that
are multiples of one another. Invariant: the shares of a plan cover every (layer, kv head) of the sink exactly once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.kv.layout import ITEM_SIZES, KvLayout


@dataclass(frozen=True, slots=True)
class Share:
    """A box of layers x kv heads that one source rank sends, numbered as in each rank's own memory."""

    source_rank: int
    source_layer: int
    sink_layer: int
    num_layers: int
    source_head: int
    sink_head: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`count` rows of `size` bytes; row i starts `i * stride` after the offset. Offsets are within the block.

    Blocks are numbered by position in the sequence, not by id: the sink's block 0 holds token 0.
    """

    source_rank: int
    source_block: int
    source_offset: int
    sink_block: int
    sink_offset: int
    size: int
    count: int = 1
    source_stride: int = 0
    sink_stride: int = 0


@dataclass(frozen=True, slots=True)
class TransferPlan:
    sources: tuple[KvLayout, ...]
    sink: KvLayout
    shares: tuple[Share, ...]

    def needs(self, source_rank: int, layers: range) -> bool:
        """Whether the sink wants anything of these layers (numbered as in the source rank's memory)."""
        return any(self._overlapping(source_rank, layers))

    def first_block(self, source_rank: int, num_held_tokens: int) -> int:
        """The first source block with a token that the sink does not hold."""
        return num_held_tokens // self.sources[source_rank].block_size

    def direct_offset(self, source_rank: int, layers: range) -> int | None:
        """Where in the sink's block these layers of a source block go as one run; None when they are scattered."""
        source = self.sources[source_rank]
        if source.block_size != self.sink.block_size:
            return None
        for share, overlap in self._overlapping(source_rank, layers):
            whole_layers = share.num_heads == source.num_kv_heads == self.sink.num_kv_heads
            if whole_layers and overlap == layers:
                return (share.sink_layer + layers.start - share.source_layer) * self.sink.layer_bytes
        return None

    def copies(
        self, source_rank: int, layers: range, blocks: range, num_tokens: int, num_held_tokens: int
    ) -> Iterator[Copy]:
        """The copies that bring these pieces of a source rank into the sink's blocks, and no byte more.

        `layers` and `blocks` say what is final, in the source's numbering. Of a sequence of `num_tokens` tokens
        the sink holds the first `num_held_tokens`, a multiple of its block size. Slots of the last sink block that
        lie behind the last token may be written or not.
        """
        assert num_held_tokens % self.sink.block_size == 0, (num_held_tokens, self.sink.block_size)
        end = self.sink.num_blocks_for(num_tokens) * self.sink.block_size
        for block in blocks:
            for source_slot, sink_block, sink_slot, num_slots in self._slot_runs(
                source_rank, block, num_held_tokens, end
            ):
                for share, overlap in self._overlapping(source_rank, layers):
                    yield from self._box_copies(share, overlap, block, source_slot, sink_block, sink_slot, num_slots)

    def _overlapping(self, source_rank: int, layers: range) -> Iterator[tuple[Share, range]]:
        for share in self.shares:
            start = max(layers.start, share.source_layer)
            stop = min(layers.stop, share.source_layer + share.num_layers)
            if share.source_rank == source_rank and start < stop:
                yield share, range(start, stop)

    def _slot_runs(self, source_rank: int, block: int, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Runs of slots as (source slot, sink block, sink slot, number) for the positions in [start, end)."""
        source_size, sink_size = self.sources[source_rank].block_size, self.sink.block_size
        first = block * source_size
        position = max(first, start)
        while position < min(first + source_size, end):
            sink_block, sink_slot = divmod(position, sink_size)
            num_slots = min(sink_size - sink_slot, min(first + source_size, end) - position)
            yield position - first, sink_block, sink_slot, num_slots
            position += num_slots

    def _box_copies(
        self, share: Share, layers: range, block: int, source_slot: int, sink_block: int, sink_slot: int, num_slots: int
    ) -> Iterator[Copy]:
        """Longest runs first: whole layers, then the heads of a layer's keys or values, then the slots of a head."""
        source, sink = self.sources[share.source_rank], self.sink
        slot_bytes = sink.head_dim * ITEM_SIZES[sink.dtype]
        sink_layer = share.sink_layer + layers.start - share.source_layer
        source_offset = (
            layers.start * source.layer_bytes + share.source_head * source.head_bytes + source_slot * slot_bytes
        )
        sink_offset = sink_layer * sink.layer_bytes + share.sink_head * sink.head_bytes + sink_slot * slot_bytes

        def copy(skip: int, size: int, count: int, source_stride: int, sink_stride: int) -> Copy:
            return Copy(
                source_rank=share.source_rank,
                source_block=block,
                source_offset=source_offset + skip * source.head_bytes,
                sink_block=sink_block,
                sink_offset=sink_offset + skip * sink.head_bytes,
                size=size,
                count=count,
                source_stride=source_stride if count > 1 else 0,
                sink_stride=sink_stride if count > 1 else 0,
            )

        whole_heads = num_slots == source.block_size == sink.block_size
        whole_layers = share.num_heads == source.num_kv_heads == sink.num_kv_heads
        rows = 2 * len(layers)  # keys and values of each layer
        if whole_heads and whole_layers:
            yield copy(0, len(layers) * sink.layer_bytes, 1, 0, 0)
        elif whole_heads:
            size = share.num_heads * sink.head_bytes
            yield copy(0, size, rows, source.layer_bytes // 2, sink.layer_bytes // 2)
        elif whole_layers:
            yield copy(0, num_slots * slot_bytes, rows * share.num_heads, source.head_bytes, sink.head_bytes)
        else:
            for head in range(share.num_heads):
                yield copy(head, num_slots * slot_bytes, rows, source.layer_bytes // 2, sink.layer_bytes // 2)


def plan_transfer(sources: Sequence[KvLayout], sink: KvLayout) -> TransferPlan:
    """Raise ValueError naming the field when the sources cannot fill the sink."""
    for source in sources:
        for field in ("head_dim", "dtype"):
            ours, theirs = getattr(sink, field), getattr(source, field)
            if ours != theirs:
                raise ValueError(f"{field}: source has {theirs}, sink has {ours}")
        small, large = sorted((source.block_size, sink.block_size))
        if large % small:
            raise ValueError(f"block_size: {source.block_size} and {sink.block_size} are not multiples of one another")
    owners = [[_owner(sources, sink, layer, head) for head in _heads(sink)] for layer in _layers(sink)]
    return TransferPlan(tuple(sources), sink, tuple(_shares(sources, sink, owners)))


def _layers(layout: KvLayout) -> range:
    return range(layout.first_layer, layout.first_layer + layout.num_layers)


def _heads(layout: KvLayout) -> range:
    return range(layout.first_kv_head, layout.first_kv_head + layout.num_kv_heads)


def _owner(sources: Sequence[KvLayout], sink: KvLayout, layer: int, head: int) -> int:
    """The source rank that sends a (layer, head) of the model: of several replicas the first."""
    having_layer = [rank for rank, source in enumerate(sources) if layer in _layers(source)]
    if not having_layer:
        raise ValueError(f"num_layers: no source has layer {layer}, sink needs {_layers(sink)}")
    for rank in having_layer:
        if head in _heads(sources[rank]):
            return rank
    raise ValueError(f"num_kv_heads: no source has kv head {head} of layer {layer}, sink needs {_heads(sink)}")


def _shares(sources: Sequence[KvLayout], sink: KvLayout, owners: list[list[int]]) -> Iterator[Share]:
    """Cut the sink's layers x heads into boxes of one owner: runs of heads, over as many layers as look the same."""
    layer = 0
    while layer < sink.num_layers:
        end = layer + 1
        while end < sink.num_layers and owners[end] == owners[layer]:
            end += 1
        head = 0
        while head < sink.num_kv_heads:
            rank = owners[layer][head]
            stop = head + 1
            while stop < sink.num_kv_heads and owners[layer][stop] == rank:
                stop += 1
            yield Share(
                source_rank=rank,
                source_layer=sink.first_layer + layer - sources[rank].first_layer,
                sink_layer=layer,
                num_layers=end - layer,
                source_head=sink.first_kv_head + head - sources[rank].first_kv_head,
                sink_head=head,
                num_heads=stop - head,
            )
            head = stop
        layer = end
