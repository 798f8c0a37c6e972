"""What every registry does, over lease files and over a real Redis; then what each store must survive."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis import Redis

from cluster.registry.base import Lease, LeaseStore, Registry, RegistryUnavailable, WorkerRecord
from cluster.registry.file_store import FileLeaseStore
from cluster.registry.open import open_registry
from cluster.registry.redis_store import BATCH, MAX_SCANS, RedisLeaseStore
from cluster.spec import WorkerId
from cluster.spec_errors import SpecError
from cluster.spec_file import parse_spec
from router.membership import Joined, Left, Membership
from tests.cluster.redis_server import RedisServer

TTL = 0.3
INTERVAL = 0.01
Change = Joined | Left
StoreFactory = Callable[[], LeaseStore]

names = itertools.count()


@pytest.fixture(params=["file", "redis"])
def make_store(request: pytest.FixtureRequest, tmp_path: Path) -> StoreFactory:
    if request.param == "file":
        return lambda: FileLeaseStore(tmp_path / "leases")
    url, name = request.getfixturevalue("shared_redis").url, f"test-{next(names)}"
    return lambda: RedisLeaseStore(url, name)


@asynccontextmanager
async def registry_over(store: LeaseStore, ttl: float = TTL) -> AsyncIterator[Registry]:
    registry = Registry(store, ttl=ttl, scan_interval=INTERVAL)
    try:
        yield registry
    finally:
        await registry.aclose()


@asynccontextmanager
async def watching(registry: Registry) -> AsyncIterator[Callable[[], "asyncio.Future[Change]"]]:
    """Gives a function that waits for the next change."""
    membership: Membership = registry
    changes = membership.watch()
    assert isinstance(changes, AsyncGenerator)
    async with contextlib.aclosing(changes):
        yield lambda: asyncio.ensure_future(asyncio.wait_for(anext(changes), 20))


def record(worker_id: str = "decode-0", epoch: int = 1, address: str = "127.0.0.1:7000") -> WorkerRecord:
    return WorkerRecord(WorkerId(worker_id), worker_id.partition("-")[0], address, epoch, "tiny")


def joined(of: WorkerRecord) -> Joined:
    return Joined(of.worker_id, of.role, of.address, of.epoch)


async def test_a_watcher_sees_those_present_then_every_change(make_store: StoreFactory) -> None:
    a, b = record("prefill-0"), record("decode-0")
    async with (
        registry_over(make_store()) as workers,
        registry_over(make_store()) as router,
        workers.register(a),
        watching(router) as change,
    ):
        assert await change() == joined(a)
        async with workers.register(b):
            assert await change() == joined(b)
        assert await change() == Left("decode-0")


async def test_a_lease_is_kept_alive_beyond_its_time_to_live(make_store: StoreFactory) -> None:
    async with (
        registry_over(make_store()) as worker,
        registry_over(make_store()) as router,
        worker.register(record()),
        watching(router) as change,
    ):
        assert await change() == joined(record())
        nothing = change()
        done, _ = await asyncio.wait({nothing}, timeout=2.5 * TTL)
        assert not done
        nothing.cancel()
        await asyncio.gather(nothing, return_exceptions=True)


async def test_a_worker_that_vanished_is_forgotten(make_store: StoreFactory) -> None:
    async with registry_over(make_store()) as router, watching(router) as change:
        await make_store().put(Lease(record(), 0.05))
        assert await change() == joined(record())
        assert await change() == Left("decode-0")


async def test_a_new_life_of_a_worker_replaces_the_old_one(make_store: StoreFactory) -> None:
    old, new = record(epoch=1), record(epoch=2, address="127.0.0.1:7001")
    async with registry_over(make_store(), ttl=20) as router, watching(router) as change:
        await make_store().put(Lease(old, 20))
        assert await change() == joined(old)
        await make_store().put(Lease(new, 20))
        assert await change() == Left("decode-0")
        assert await change() == joined(new)


async def test_the_end_of_an_old_life_does_not_end_the_new_one(make_store: StoreFactory) -> None:
    store = make_store()
    async with registry_over(make_store(), ttl=20) as old:
        async with old.register(record(epoch=1)):
            await store.put(Lease(record(epoch=2), 20))
        assert await store.scan() == [Lease(record(epoch=2), 20)]
    await store.aclose()


async def test_of_two_that_register_one_id_the_later_counts_while_it_lives(
    make_store: StoreFactory, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = record(epoch=1), record(epoch=2, address="127.0.0.1:7001")
    async with (
        registry_over(make_store()) as one,
        registry_over(make_store()) as other,
        registry_over(make_store()) as router,
        one.register(first),
        watching(router) as change,
    ):
        assert await change() == joined(first)
        async with other.register(second):
            assert await change() == Left("decode-0")
            assert await change() == joined(second)
            nothing = change()
            done, _ = await asyncio.wait({nothing}, timeout=2.5 * TTL)
            assert not done
        assert await nothing == Left("decode-0")
        assert await change() == joined(first)
    (said,) = [each.getMessage() for each in caplog.records if each.levelname == "ERROR"]
    assert "another process has started as decode-0, at 127.0.0.1:7001" in said
    assert "--index" in said


async def test_many_workers_and_routers_agree(make_store: StoreFactory) -> None:
    records = [record(f"decode-{index}") for index in range(12)]
    async with contextlib.AsyncExitStack() as exits:
        routers = [await exits.enter_async_context(registry_over(make_store())) for _ in range(2)]
        changes = [await exits.enter_async_context(watching(router)) for router in routers]
        workers = await exits.enter_async_context(registry_over(make_store()))
        async with contextlib.AsyncExitStack() as leases:
            for each in records:
                await leases.enter_async_context(workers.register(each))
            for change in changes:
                assert {await change() for _ in records} == {joined(each) for each in records}
        for change in changes:
            assert {await change() for _ in records} == {Left(each.worker_id) for each in records}


class BrokenStore:
    """A store in memory that can be taken away and emptied."""

    def __init__(self) -> None:
        self.leases: dict[str, Lease] = {}
        self.away = False
        self.asked: asyncio.Queue[None] = asyncio.Queue()

    async def put(self, lease: Lease) -> None:
        self._check()
        self.leases[lease.record.worker_id] = lease

    async def get(self, worker_id: WorkerId) -> Lease | None:
        return self.leases.get(worker_id)

    async def scan(self) -> list[Lease]:
        self._check()
        return list(self.leases.values())

    async def aclose(self) -> None:
        pass

    def _check(self) -> None:
        self.asked.put_nowait(None)
        if self.away:
            raise RegistryUnavailable("away")


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


async def test_an_outage_of_any_length_loses_no_worker() -> None:
    store, time = BrokenStore(), Time()
    registry = Registry(store, ttl=6, scan_interval=0.25, clock=time.clock, sleep=time.sleep)
    await store.put(Lease(record("decode-0"), 6))
    async with watching(registry) as change:
        assert await change() == joined(record("decode-0"))
        store.away = True
        nothing = change()
        for _ in range(1000):
            await store.asked.get()
        store.leases = {"decode-1": Lease(record("decode-1"), 6)}  # it came back without its data
        store.away = False
        assert await nothing == joined(record("decode-1"))
        back = time.now
        await store.put(Lease(record("decode-0"), 6))
        await store.put(Lease(record("decode-2"), 6))
        assert await change() == joined(record("decode-2"))
        assert time.now - back < 6


async def test_a_worker_starts_while_the_store_is_away_and_joins_when_it_is_back() -> None:
    store, time = BrokenStore(), Time()
    store.away = True
    registry = Registry(store, ttl=6, clock=time.clock, sleep=time.sleep)
    async with registry.register(record()):
        assert store.leases == {}
        await store.asked.get()
        store.away = False
        await store.asked.get()
        assert store.leases["decode-0"].record == record()


async def test_malformed_and_foreign_files_are_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FileLeaseStore(tmp_path)
    await store.put(Lease(record(), 20))
    for name, content in (
        ("bad", b"{"),
        ("empty", b""),
        ("binary", b"\xff\xfe"),
        ("list", b"[1]"),
        ("typed", b'{"lease": 1}'),
    ):
        (tmp_path / f"{name}.lease").write_bytes(content)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder.lease").mkdir()
    for _ in range(3):
        assert await store.scan() == [Lease(record(), 20)]
    assert len(caplog.messages) == 5  # each once
    assert "bad.lease" in caplog.text


async def test_a_lease_file_ends_by_its_own_time(tmp_path: Path) -> None:
    time = Time()
    store = FileLeaseStore(tmp_path, wall_clock=time.clock)
    await store.put(Lease(record(), 6))
    time.now = 5.9
    assert await store.scan() == [Lease(record(), 6)]
    time.now = 6
    assert await store.scan() == []


async def test_a_lost_lease_directory_is_an_outage(tmp_path: Path) -> None:
    store = FileLeaseStore(tmp_path / "leases")
    (tmp_path / "leases").rmdir()
    with pytest.raises(RegistryUnavailable):
        await store.scan()
    with pytest.raises(RegistryUnavailable):
        await store.put(Lease(record(), 6))


async def test_a_worker_id_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    store = FileLeaseStore(tmp_path / "leases")
    await store.put(Lease(record("../decode-0"), 20))
    assert len(os.listdir(tmp_path / "leases")) == 1
    assert os.listdir(tmp_path) == ["leases"]


async def test_deployments_on_one_redis_do_not_see_each_other(shared_redis: RedisServer) -> None:
    one, other = RedisLeaseStore(shared_redis.url, "one"), RedisLeaseStore(shared_redis.url, "other")
    await one.put(Lease(record(), 20))
    assert await other.scan() == []
    assert await one.scan() == [Lease(record(), 20)]
    await one.aclose()
    await other.aclose()


async def test_redis_keeps_no_trace_of_ended_leases(own_redis: RedisServer) -> None:
    store = RedisLeaseStore(own_redis.url, "test")
    await store.put(Lease(record(), 20))
    with Redis.from_url(own_redis.url) as client:
        client.delete("baton:test:workers:decode-0")  # as its time to live does
        assert await store.scan() == []
        assert client.keys() == [b"baton:test:changes"]
    await store.aclose()


async def test_all_leases_are_read_where_one_changed_and_else_seldom(own_redis: RedisServer) -> None:
    store, workers = RedisLeaseStore(own_redis.url, "test"), RedisLeaseStore(own_redis.url, "test")
    with Redis.from_url(own_redis.url) as client:

        def num_readings() -> int:
            return client.info("commandstats").get("cmdstat_smembers", {}).get("calls", 0)

        leases = [Lease(record(f"decode-{number:03}"), 20) for number in range(BATCH + 2)]
        for lease in leases:
            await workers.put(lease)
        assert await store.scan() == leases
        for lease in leases:  # renewed as they were
            await workers.put(lease)
        for _ in range(MAX_SCANS - 1):
            assert await store.scan() == leases
        assert num_readings() == 1
        client.delete("baton:test:workers:decode-001")
        del leases[1]
        assert await store.scan() == leases
        assert num_readings() == 2
        for changed in (Lease(record("decode-001"), 20), Lease(record("decode-001"), 20, left=True)):
            await workers.put(changed)
            assert (await store.scan())[1] == changed
        assert num_readings() == 4
    await store.aclose()
    await workers.aclose()


async def test_what_changes_while_leases_are_read_is_seen_by_the_next_scan(
    own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, worker = RedisLeaseStore(own_redis.url, "test"), RedisLeaseStore(own_redis.url, "test")
    read, leases = store._read, [Lease(record("decode-0"), 20), Lease(record("decode-1"), 20)]
    await worker.put(leases[0])

    async def join_behind() -> list[Lease]:
        found = await read()
        await worker.put(leases[1])
        return found

    async def fail() -> list[Lease]:
        raise OSError

    monkeypatch.setattr(store, "_read", join_behind)
    assert await store.scan() == leases[:1]
    monkeypatch.setattr(store, "_read", fail)
    with pytest.raises(RegistryUnavailable):
        await store.scan()
    monkeypatch.setattr(store, "_read", read)
    assert await store.scan() == leases
    await store.aclose()
    await worker.aclose()


async def test_a_malformed_lease_in_redis_is_ignored(own_redis: RedisServer) -> None:
    store = RedisLeaseStore(own_redis.url, "test")
    await store.put(Lease(record(), 20))
    with Redis.from_url(own_redis.url) as client:
        client.sadd("baton:test:workers", "x", b"\xff")
        client.set("baton:test:workers:x", b"\xff{")
    assert await store.scan() == [Lease(record(), 20)]
    await store.aclose()


async def test_a_redis_that_died_and_came_back_empty_loses_no_worker(own_redis: RedisServer) -> None:
    """The worker stays known through the outage, and its lease is there again soon after it."""
    async with (
        registry_over(RedisLeaseStore(own_redis.url, "test", timeout_s=0.2), ttl=1.5) as worker,
        registry_over(RedisLeaseStore(own_redis.url, "test", timeout_s=0.2), ttl=1.5) as router,
        worker.register(record("decode-0")),
        watching(router) as change,
    ):
        assert await change() == joined(record("decode-0"))
        nothing = change()
        own_redis.kill()
        done, _ = await asyncio.wait({nothing}, timeout=0.2)
        assert not done
        own_redis.start()  # in this thread, with which it ends
        async with worker.register(record("decode-1")):
            assert await nothing == joined(record("decode-1"))
        assert await change() == Left("decode-1")


async def test_a_frozen_redis_is_an_outage_not_a_hang(own_redis: RedisServer) -> None:
    store = RedisLeaseStore(own_redis.url, "test", timeout_s=0.1)
    await store.put(Lease(record(), 20))
    own_redis.freeze()
    with pytest.raises(RegistryUnavailable):
        await asyncio.wait_for(store.scan(), 5)
    with pytest.raises(RegistryUnavailable):
        await asyncio.wait_for(store.put(Lease(record(), 20)), 5)
    own_redis.thaw()
    assert await store.scan() == [Lease(record(), 20)]
    await store.aclose()


async def test_the_spec_names_the_registry(tmp_path: Path, shared_redis: RedisServer) -> None:
    fields = {"model": "tiny", "run_dir": str(tmp_path / "run")}
    for line in ("file", f"file:{tmp_path}/elsewhere", shared_redis.url):
        registry = open_registry(parse_spec(fields | {"registry": line, "name": "from-spec"}))
        async with registry.register(record()), watching(registry) as change:
            assert await change() == joined(record())
        await registry.aclose()
    assert (tmp_path / "run" / "workers" / "decode-0.lease").is_file()
    assert (tmp_path / "elsewhere" / "decode-0.lease").is_file()


def test_a_lease_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"registry: 'file:.*cannot be used"):
        open_registry(parse_spec({"model": "tiny", "registry": f"file:{tmp_path}/file/leases"}))


def test_a_wrong_redis_url_is_named() -> None:
    with pytest.raises(SpecError, match=r"registry: 'redis://host:port'"):
        open_registry(parse_spec({"model": "tiny", "registry": "redis://host:port"}))


async def test_a_cancelled_exchange_with_redis_is_cancelled(own_redis: RedisServer) -> None:
    """At whatever await the cancellation arrives: one that is swallowed would keep a heartbeat alive for ever."""
    store = RedisLeaseStore(own_redis.url, "test")
    await store.put(Lease(record(), 20))
    for use, turns in itertools.product((store.scan, lambda: store.put(Lease(record(), 20))), range(60)):
        exchange = asyncio.ensure_future(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        if exchange.done():
            continue
        exchange.cancel()
        await asyncio.wait({exchange})
        assert exchange.cancelled(), turns
    assert await store.scan() == [Lease(record(), 20)]
    await store.aclose()
