from dataclasses import replace
from time import monotonic

import pytest

from engine.kv.layout import KvLayout
from kv_transfer.source import SourceConfig
from protos import transfer_pb2 as pb
from tests.kv_transfer.pair import FIRST_TOKEN, GROUPS, LAYOUT, TRANSPORTS, Pair, pair, tokens, until


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_transport_moves_every_token(transport: str) -> None:
    async with pair(transport) as p:
        lease_id, offer, blocks = p.open(30)
        task = p.pull(offer, 30)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        pulled = await task
        assert (pulled.first_token, pulled.finished, pulled.transport) == (FIRST_TOKEN, False, transport)
        assert (pulled.num_blocks, pulled.num_bytes) == (8, 8 * LAYOUT.block_bytes)
        assert pulled.copy_seconds > 0
        assert pulled.exposed_seconds >= 0
        p.check(blocks, 30)
        assert p.untouched(p.sink_blocks(30))
        await p.until_released()
        assert p.released == [(lease_id, blocks)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_pieces_travel_while_prefill_computes(transport: str) -> None:
    """Chunk by chunk and group by group: what was announced is in place before anything else is computed."""
    async with pair(transport) as p:
        lease_id, offer, blocks = p.open(18)
        task = p.pull(offer, 18)
        sink_blocks = p.sink_blocks(18)
        group_bytes = [GROUPS[0] * LAYOUT.layer_bytes, (GROUPS[1] - GROUPS[0]) * LAYOUT.layer_bytes]
        starts = [0, group_bytes[0]]
        for num_final in (2, 4):
            for group in range(2):
                p.source.announce(lease_id, group, num_final)
                for index in range(num_final):
                    window = slice(starts[group], starts[group] + group_bytes[group])
                    expected = bytes(p.source_memory.block(blocks[index])[window])
                    await _equal(p, sink_blocks[index], window, expected)
        assert not task.done()
        p.source.finish(lease_id, FIRST_TOKEN, True)
        pulled = await task
        assert pulled.finished
        p.check(blocks, 18)


async def _equal(p: Pair, block: int, window: slice, expected: bytes) -> None:
    await until(lambda: bytes(p.sink_memory.block(block)[window]) == expected)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_only_missing_blocks_travel(transport: str) -> None:
    async with pair(transport) as p:
        lease_id, offer, blocks = p.open(30, num_final=5)
        task = p.pull(offer, 30, held=12)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        pulled = await task
        assert (pulled.num_blocks, pulled.num_bytes) == (5, 5 * LAYOUT.block_bytes)
        p.check(blocks, 30, held=12)
        assert p.untouched(p.sink_blocks(30, 12))


async def test_a_sink_that_holds_everything_pulls_only_the_token() -> None:
    async with pair() as p:
        lease_id, offer, _ = p.open(16)
        task = p.pull(offer, 16, held=16)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        pulled = await task
        assert (pulled.first_token, pulled.num_bytes, pulled.num_blocks) == (FIRST_TOKEN, 0, 0)
        assert p.untouched()
        await p.until_released()


async def test_a_token_that_comes_after_everything_was_announced_ends_the_pull() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(16, num_final=4)
        task = p.pull(offer, 16)
        await _equal(p, p.sink_blocks(16)[3], slice(0, LAYOUT.block_bytes), bytes(p.source_memory.block(blocks[3])))
        assert not task.done()
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await task).num_bytes == 4 * LAYOUT.block_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("source_size", "sink_size"), [(4, 8), (8, 4), (2, 8), (8, 2)])
async def test_block_sizes_may_differ(transport: str, source_size: int, sink_size: int) -> None:
    layout, sink_layout = replace(LAYOUT, block_size=source_size), replace(LAYOUT, block_size=sink_size)
    async with pair(transport, layout=layout, sink_layout=sink_layout) as p:
        for num_tokens in (1, 9, 31):
            for held in {0, sink_size, 2 * sink_size}:
                if held > num_tokens:
                    continue
                lease_id, offer, blocks = p.open(num_tokens)
                task = p.pull(offer, num_tokens, held)
                p.source.announce(lease_id, 0, num_tokens // source_size)
                p.source.finish(lease_id, FIRST_TOKEN, False)
                await task
                p.check(blocks, num_tokens, held)


async def test_a_sink_of_fewer_heads_and_layers_takes_its_own() -> None:
    whole = KvLayout(4, 4, 8, 4, "float32")
    part = KvLayout(2, 2, 8, 4, "float32", first_layer=2, first_kv_head=2)
    async with pair(layout=whole, sink_layout=part, groups=(1, 2, 4)) as p:
        lease_id, offer, blocks = p.open(10)
        task = p.pull(offer, 10)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await task).num_bytes == 3 * 2 * whole.layer_bytes, "layers that it lacks did not travel"
        theirs, ours = tokens(p.source_memory), tokens(p.sink_memory)
        for theirs_id, ours_id in zip(blocks, p.sink_blocks(10), strict=True):
            assert (ours[ours_id] == theirs[theirs_id, 2:4, :, 2:4]).all()


async def test_many_pulls_share_one_link() -> None:
    async with pair("tcp") as p:
        opened = [p.open(4, name=f"r{i}") for i in range(16)]
        tasks = [p.pull(offer, 4, blocks=[i]) for i, (_, offer, _) in enumerate(opened)]
        for lease_id, _, _ in opened:
            p.source.finish(lease_id, FIRST_TOKEN, False)
        for task in tasks:
            await task
        for i, (_, _, blocks) in enumerate(opened):
            assert bytes(p.sink_memory.block(i)) == bytes(p.source_memory.block(blocks[0]))
        await p.until_released(16)
        assert len(p.source._links) == 1


async def test_the_time_of_a_link_that_pulls_share_is_counted_once() -> None:
    async with pair("tcp") as p:
        opened = [p.open(40, name=f"r{i}") for i in range(2)]
        tasks = [p.pull(offer, 40, blocks=range(32 * i, 32 * i + 10)) for i, (_, offer, _) in enumerate(opened)]
        started = monotonic()
        for lease_id, _, _ in opened:
            p.source.finish(lease_id, FIRST_TOKEN, False)
        pulls = [await task for task in tasks]
        elapsed = monotonic() - started
        link_seconds = sum(pull.link_seconds for pull in pulls)
        assert max(pull.copy_seconds for pull in pulls) <= link_seconds <= elapsed
        await p.until_released(2)


async def test_large_prompts_are_announced_in_pieces_and_interleave() -> None:
    config = SourceConfig(announce_bytes=2 * LAYOUT.layer_bytes)
    async with pair(source_config=config) as p:
        first, offer_1, blocks_1 = p.open(40, name="a")
        second, offer_2, _ = p.open(4, name="b")
        task_1, task_2 = p.pull(offer_1, 40), p.pull(offer_2, 4, blocks=[63])
        p.source.finish(first, 1, False)
        p.source.finish(second, 2, False)
        assert ((await task_1).first_token, (await task_2).first_token) == (1, 2)
        p.check(blocks_1, 40)


async def test_auto_prefers_shared_memory_on_one_host() -> None:
    async with pair("auto") as p:
        lease_id, offer, _ = p.open(4)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await p.pull(offer, 4)).transport == "shared_memory"


async def test_auto_falls_back_to_tcp_where_the_memory_cannot_be_mapped() -> None:
    async with pair("auto") as p:
        p.source._transports["shared_memory"]._key = b"x" * 32  # as if another process had that id here
        lease_id, offer, blocks = p.open(4)
        p.source.finish(lease_id, FIRST_TOKEN, False)
        assert (await p.pull(offer, 4)).transport == "tcp"
        p.check(blocks, 4)


async def test_the_number_of_leases_is_bounded() -> None:
    async with pair(source_config=SourceConfig(max_leases=2)) as p:
        lease_id, _, _ = p.open(4)
        p.open(4)
        assert p.source.open("r", [0], 4) is None
        p.source.abort(lease_id, "enough")
        assert [lease_id for lease_id, _ in p.released] == [lease_id]
        assert p.source.open("r", [0], 4) is not None


async def test_the_offer_says_what_is_offered() -> None:
    async with pair() as p:
        lease_id, offer, blocks = p.open(18)
        offered = pb.KvOffer.FromString(offer)
        assert (offered.lease_id, list(offered.block_ids), offered.num_tokens) == (lease_id, blocks, 18)
        assert (offered.epoch, list(offered.layer_groups)) == ("1", list(GROUPS))
