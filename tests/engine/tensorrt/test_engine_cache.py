"""Engines on disk: what is trusted, what is built again, and that processes do not build the same twice."""

import json
import multiprocessing
import os
import signal
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from engine.executors.tensorrt.engine_cache import (
    MAGIC,
    EngineCache,
    EngineFileError,
    EngineKey,
    read_engine,
    write_engine,
)

PLAN = bytes(range(256)) * 300
KEY = EngineKey(
    model_hash="6d0f",
    graph="77aa",
    first_layer=0,
    end_layer=8,
    dtype="bfloat16",
    quantization="",
    tokens=(1, 512, 2048),
    past=(1, 1024, 8192),
    library="tensorrt_rtx",
    version="1.7.1",
    capability="8.9",
    gpu="",
    refittable=False,
    workspace=None,
)
OTHER_VALUES: dict[str, Any] = {
    "tokens": (1, 512, 4096),
    "past": (1, 1, 8192),
    "refittable": True,
    "workspace": 1 << 30,
}


class Builder:
    """Counts how often it is asked."""

    def __init__(self, plan: bytes = PLAN) -> None:
        self.plan, self.num_builds = plan, 0

    def __call__(self) -> bytes:
        self.num_builds += 1
        return self.plan


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_an_engine_is_built_once_and_read_as_it_was_written(cache: EngineCache) -> None:
    builder = Builder()
    path = cache.get(KEY, builder)
    assert cache.get(KEY, builder) == path
    assert builder.num_builds == 1
    key, plan = read_engine(path)
    assert (key, bytes(plan)) == (KEY, PLAN)


@pytest.mark.parametrize("name", [field.name for field in fields(EngineKey)])
def test_every_part_of_the_key_tells_engines_apart(cache: EngineCache, name: str) -> None:
    value = getattr(KEY, name)
    other = replace(KEY, **{name: OTHER_VALUES[name] if name in OTHER_VALUES else value * 2 + type(value)("1")})
    builder = Builder()
    assert cache.get(KEY, builder) != cache.get(other, builder)
    assert builder.num_builds == 2


def test_a_file_of_another_key_under_this_name_is_built_again(cache: EngineCache) -> None:
    write_engine(cache.path(KEY), replace(KEY, version="1.6.0"), b"of another version")
    builder = Builder()
    assert bytes(read_engine(cache.get(KEY, builder)).plan) == PLAN
    assert builder.num_builds == 1


@pytest.mark.parametrize("size", [0, 5, len(MAGIC), len(MAGIC) + 3, 100, 700, 1024, 40_000, -1])
def test_a_file_that_is_cut_off_is_built_again(cache: EngineCache, size: int) -> None:
    path = cache.get(KEY, Builder())
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(EngineFileError):
        read_engine(path)
    cache.get(KEY, builder := Builder())
    assert (builder.num_builds, path.read_bytes()) == (1, whole)


def test_a_flipped_bit_anywhere_that_counts_is_found(cache: EngineCache) -> None:
    path = cache.get(KEY, Builder())
    whole = path.read_bytes()
    padding = range(
        len(MAGIC) + 4 + int.from_bytes(whole[len(MAGIC) : len(MAGIC) + 4], "little"), len(whole) - len(PLAN)
    )
    for place in [*range(0, padding.start, 7), *range(padding.stop, len(whole), 9973), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        cache.get(KEY, builder := Builder())
        assert (place, builder.num_builds) == (place, 1)
        assert path.read_bytes() == whole


def test_more_than_was_written_is_not_trusted(cache: EngineCache) -> None:
    path = cache.get(KEY, Builder())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(EngineFileError, match="cut off"):
        read_engine(path)


def test_a_header_of_another_version_of_baton_is_not_guessed_at(cache: EngineCache) -> None:
    path = cache.path(KEY)
    header = json.dumps({"key": {"model_hash": "6d0f"}, "plan_bytes": 0}).encode()
    path.write_bytes(MAGIC + len(header).to_bytes(4, "little") + header)
    with pytest.raises(EngineFileError, match="another version of Baton"):
        read_engine(path)


def test_a_failed_build_leaves_nothing_behind(cache: EngineCache) -> None:
    def fail() -> bytes:
        raise ValueError("no kernel fits")

    with pytest.raises(ValueError, match="no kernel fits"):
        cache.get(KEY, fail)
    assert [path.suffix for path in cache.directory.iterdir()] == [".lock"]
    cache.get(KEY, builder := Builder())
    assert builder.num_builds == 1


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = cache.path(KEY)
    path.write_bytes(b"stale")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cache.get(KEY, Builder())
    assert path.read_bytes() == b"stale"
    assert list(cache.directory.glob("*.tmp")) == []


def test_what_a_reader_has_mapped_stays_when_the_file_is_replaced(cache: EngineCache) -> None:
    path = cache.get(KEY, Builder())
    plan = read_engine(path).plan
    write_engine(path, KEY, b"another")
    assert bytes(plan) == PLAN


def test_temporary_files_of_dead_writers_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    dead, live = tmp_path / "dead.engine.tmp", tmp_path / "live.engine.tmp"
    dead.touch()
    live.touch()
    with held_lock(tmp_path / "live.engine"):
        EngineCache(tmp_path)
        assert (dead.exists(), live.exists()) == (False, True)
    EngineCache(tmp_path)
    assert not live.exists()


def test_an_engine_that_can_do_more_serves_who_asks_for_less(cache: EngineCache) -> None:
    richer = replace(KEY, refittable=True, workspace=1 << 30)
    assert cache.find(KEY) is None
    path = cache.get(richer, Builder())
    assert cache.find(KEY) == cache.find(richer) == path
    assert cache.find(replace(KEY, workspace=1 << 29)) is None
    assert cache.find(replace(KEY, model_hash="another")) is None
    own = cache.get(KEY, Builder())
    assert (cache.find(KEY), cache.find(richer)) == (own, path)
    own.write_bytes(own.read_bytes()[:-1])
    assert cache.find(KEY) == path
    path.write_bytes(b"neither")
    assert cache.find(KEY) is None


def held_lock(path: Path) -> Any:
    from engine.executors.tensorrt.locked_files import locked

    return locked(path)


def build_in_process(directory: Path, barrier: Any, counted: Any, waited: Any) -> None:
    def build() -> bytes:
        with counted.get_lock():
            counted.value += 1
        waited.wait(20)  # until the other process has been told to wait
        return PLAN

    barrier.wait()
    EngineCache(directory).get(KEY, build, waiting=waited.set)


def test_two_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, counted, waited = context.Barrier(2), context.Value("i", 0), context.Event()
    arguments = (tmp_path, barrier, counted, waited)
    processes = [context.Process(target=build_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (counted.value, waited.is_set()) == (1, True)
    assert bytes(read_engine(EngineCache(tmp_path).path(KEY)).plan) == PLAN


def die_while_building(directory: Path) -> None:
    def build() -> bytes:
        cache.path(KEY).with_name(KEY.file_name + ".tmp").write_bytes(PLAN[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
        return PLAN

    cache = EngineCache(directory)
    cache.get(KEY, build)


def test_a_builder_that_dies_is_followed_by_the_next(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=die_while_building, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    cache = EngineCache(tmp_path)
    assert list(tmp_path.glob("*.tmp")) == []
    assert bytes(read_engine(cache.get(KEY, Builder())).plan) == PLAN


def test_threads_wait_for_each_other_too(cache: EngineCache) -> None:
    waited, builder = threading.Event(), Builder()

    def slow() -> bytes:
        waited.wait(20)
        return builder()

    first = threading.Thread(target=cache.get, args=(KEY, slow))
    with held_lock(cache.path(KEY)):
        first.start()
        second = threading.Thread(target=cache.get, args=(KEY, builder), kwargs={"waiting": waited.set})
        second.start()
        assert waited.wait(20)
    first.join(20)
    second.join(20)
    assert builder.num_builds == 1
