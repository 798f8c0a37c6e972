import asyncio
import itertools
import random
from types import SimpleNamespace

import pytest

from engine.request import FinishReason
from router.stream import TokenStream


def stream(max_tokens: int = 100) -> TokenStream:
    return TokenStream(max_tokens, 0.0, lambda: 1.0)


@pytest.mark.parametrize("seed", range(20))
async def test_pieces_in_any_order_and_overlap_come_out_once_and_in_order(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(1000) for _ in range(30)]
    cuts = sorted({0, 30, *rng.sample(range(30), 8)})
    pieces = list(itertools.pairwise(cuts)) + [(start, start + 3) for start in rng.sample(range(27), 5)]
    rng.shuffle(pieces)
    under_test = stream()
    received = []
    for start, end in pieces:
        under_test.accept(start, tokens[start:end], [], None)
        if rng.random() < 0.5 and len(under_test.token_ids) > len(received):
            received += (await anext(under_test)).token_ids
    assert under_test.accept(30, [7], [], FinishReason.STOP)
    delta = await anext(under_test)
    assert received + delta.token_ids == [*tokens, 7]
    assert delta.finish_reason is FinishReason.STOP
    with pytest.raises(StopAsyncIteration):
        await anext(under_test)


async def test_what_arrived_before_an_error_is_delivered_before_it():
    under_test = stream()
    under_test.accept(0, [1, 2], [], None)
    under_test.fail(ValueError("broken"))
    assert (await anext(under_test)).token_ids == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        await anext(under_test)


async def test_early_pieces_of_an_attempt_that_is_over_are_not_used():
    under_test = stream()
    under_test.accept(1, [99], [], None)
    under_test.discard_early()
    under_test.accept(0, [1], [], None)
    assert under_test.token_ids == [1]


async def test_a_finish_without_tokens_is_delivered():
    under_test = stream()
    under_test.finish(FinishReason.LENGTH)
    delta = await anext(under_test)
    assert (delta.token_ids, delta.finish_reason) == ([], FinishReason.LENGTH)


async def test_closing_runs_the_callback_and_ends_the_iteration():
    under_test, closed = stream(), []
    under_test.on_close(lambda: closed.append(True))
    under_test.accept(0, [1], [], None)
    await under_test.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(under_test)
    assert closed == [True]


async def test_any_number_of_early_tokens_waits_for_the_first():
    under_test = stream(5000)
    for index in range(1, 3000):
        under_test.accept(index, [index], [], None)
    under_test.accept(0, [0], [], None)
    assert (await anext(under_test)).token_ids == list(range(3000))


async def test_what_is_forwarded_is_taken_where_it_arrives():
    under_test, taken = stream(), []

    def take(delta):
        taken.append(delta.token_ids)
        return delta.finish_reason is None

    under_test.accept(0, [1], [], None)
    forwarding = asyncio.create_task(under_test.forward(take))
    await asyncio.sleep(0)
    under_test.accept(1, [2, 3], [], None)
    under_test.accept(3, [4], [], FinishReason.STOP)
    assert taken == [[1], [2, 3], [4]]  # before any task has run again
    await forwarding


async def test_a_consumer_without_room_gets_the_rest_together():
    under_test, taken = stream(), []

    def take(delta):
        taken.append(delta.token_ids)
        return False

    forwarding = asyncio.create_task(under_test.forward(take))
    await asyncio.sleep(0)
    for index in range(4):
        under_test.accept(index, [index], [], None)
    await forwarding
    await under_test.forward(take)
    assert taken == [[0], [1, 2, 3]]


async def test_a_consumer_that_fails_does_not_fail_the_worker_that_sent_the_token():
    under_test = stream()

    def take(_delta):
        raise ValueError("broken")

    forwarding = asyncio.create_task(under_test.forward(take))
    await asyncio.sleep(0)
    assert not under_test.accept(0, [1], [], None)
    with pytest.raises(ValueError, match="broken"):
        await forwarding


async def test_an_error_ends_the_forwarding():
    under_test = stream()
    forwarding = asyncio.create_task(under_test.forward(lambda _delta: True))
    await asyncio.sleep(0)
    under_test.fail(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await forwarding


class Taker:
    """Notes what it is given; has room for `room` pieces."""

    def __init__(self, room: int = 1000) -> None:
        self.taken: list[list[int] | int] = []
        self._room = room
        self.lone = SimpleNamespace(take=self._note)

    def take(self, delta) -> bool:
        return self._note(delta.token_ids)

    def _note(self, what: list[int] | int) -> bool:
        self.taken.append(what)
        return len(self.taken) < self._room


async def test_lone_tokens_after_the_first_go_the_short_way():
    under_test, taker = stream(), Taker()
    forwarding = asyncio.create_task(under_test.forward(taker.take, taker.lone))
    await asyncio.sleep(0)
    for index in range(3):
        assert not under_test.accept_token(index, 10 + index)
    assert not under_test.accept_token(1, 11), "a token that is known"
    assert not under_test.accept_token(4, 14), "one that is early"
    assert not under_test.accept_token(3, 13)
    assert not under_test.accept_token(5, 15)
    assert under_test.accept(6, [16], [], FinishReason.STOP)
    await forwarding
    assert taker.taken == [[10], 11, 12, [13, 14], 15, [16]]
    assert under_test.token_ids == [10, 11, 12, 13, 14, 15, 16]


async def test_without_a_short_way_lone_tokens_come_as_deltas():
    under_test, taker = stream(), Taker()
    forwarding = asyncio.create_task(under_test.forward(taker.take))
    await asyncio.sleep(0)
    for index in range(3):
        under_test.accept_token(index, index)
    assert taker.taken == [[0], [1], [2]]
    forwarding.cancel()


@pytest.mark.parametrize("room", [1, 2, 3])
async def test_lone_tokens_that_are_not_taken_come_together(room):
    under_test, taker = stream(), Taker(room)
    forwarding = asyncio.create_task(under_test.forward(taker.take, taker.lone))
    await asyncio.sleep(0)
    for index in range(5):
        under_test.accept_token(index, index)
    await forwarding
    await under_test.forward(taker.take, taker.lone)
    assert taker.taken == [*[[0], 1, 2][:room], list(range(room, 5))]


async def test_lone_tokens_around_a_cancelled_consumer_go_to_it_or_to_the_next():
    under_test, first, second = stream(), Taker(), Taker(1)
    forwarding = asyncio.create_task(under_test.forward(first.take, first.lone))
    await asyncio.sleep(0)
    under_test.accept_token(0, 0)
    forwarding.cancel()
    under_test.accept_token(1, 1)
    await asyncio.wait({forwarding})
    under_test.accept_token(2, 2)
    await under_test.forward(second.take, second.lone)
    assert (first.taken, second.taken) == ([[0], 1], [[2]])


async def test_a_consumer_that_fails_at_a_lone_token_does_not_fail_the_worker():
    under_test, taker = stream(), Taker()

    def fail(_token_id):
        raise ValueError("broken")

    forwarding = asyncio.create_task(under_test.forward(taker.take, SimpleNamespace(take=fail)))
    await asyncio.sleep(0)
    for index in range(3):
        assert not under_test.accept_token(index, index)
    with pytest.raises(ValueError, match="broken"):
        await forwarding


@pytest.mark.parametrize("room", [1, 2, 1000])
async def test_a_consumer_may_take_several_tokens_at_once_after_the_first(room):
    under_test, taker = stream(), Taker(room)
    forwarding = asyncio.create_task(under_test.forward(taker.take, taker.lone, interval=3))
    await asyncio.sleep(0)
    for index in range(6):
        assert not under_test.accept_token(index, index)
    under_test.accept(6, [6, 7], [], None)
    under_test.accept(8, [8], [], FinishReason.STOP)
    await forwarding
    if room < 1000:
        await under_test.forward(taker.take, taker.lone, interval=3)
    whole = [[0], [1, 2, 3], [4, 5, 6, 7], [8]]
    assert taker.taken == {1: [[0], list(range(1, 9))], 2: [[0], [1, 2, 3], [4, 5, 6, 7, 8]], 1000: whole}[room]


async def test_tokens_that_wait_for_others_come_before_the_error():
    under_test, taker = stream(), Taker()
    forwarding = asyncio.create_task(under_test.forward(taker.take, interval=4))
    await asyncio.sleep(0)
    for index in range(3):
        under_test.accept_token(index, index)
    under_test.fail(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await forwarding
    assert taker.taken == [[0], [1, 2]]


async def test_nothing_waits_for_a_consumer_that_wants_every_token_again():
    under_test, taker = stream(), Taker()
    forwarding = asyncio.create_task(under_test.forward(taker.take, interval=4))
    await asyncio.sleep(0)
    for index in range(2):
        under_test.accept_token(index, index)
    forwarding.cancel()
    await asyncio.wait({forwarding})
    again = asyncio.create_task(under_test.forward(taker.take, taker.lone))
    await asyncio.sleep(0)
    under_test.accept_token(2, 2)
    assert taker.taken == [[0], [1], 2]
    again.cancel()


def test_every_token_comes_once_and_in_order_whatever_the_interval_and_the_arrivals():
    async def one(rng: random.Random) -> None:
        num, interval = rng.randrange(1, 40), rng.randrange(1, 6)
        under_test, taken = stream(100), []

        def take(delta) -> bool:
            taken.extend(delta.token_ids)
            return rng.random() < 0.8

        def take_lone(token_id: int) -> bool:
            assert interval == 1
            taken.append(token_id)
            return rng.random() < 0.8

        async def consume() -> None:
            while len(taken) < num:
                await under_test.forward(take, SimpleNamespace(take=take_lone), interval=interval)

        consumer = asyncio.create_task(consume())
        while not under_test._ended:
            if rng.random() < 0.3:
                await asyncio.sleep(0)
            index = min(num - 1, max(0, len(under_test.token_ids) + rng.choice((-1, 0, 0, 0, 0, 1))))
            count = rng.choice((1, 1, 1, 2))
            if index + count >= num:
                under_test.accept(index, list(range(index, num)), [], FinishReason.LENGTH)
            elif count == 1:
                under_test.accept_token(index, index)
            else:
                under_test.accept(index, [index, index + 1], [], None)
        await asyncio.wait_for(consumer, 5)
        assert taken == list(range(num))

    for seed in range(300):
        asyncio.run(one(random.Random(seed)))
