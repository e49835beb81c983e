"""Many visitors, one worker: equal shares, a queue with a limit, and whoever leaves leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref

import pytest

from serving.engine import Busy, Engine


@pytest.fixture
def engine():
    found = Engine(n_active=2, n_waiting=3)
    yield found
    found.close()
    assert found.n_jobs == 0 and "engine" not in {thread.name for thread in threading.enumerate()}


def steps(n: int, seconds: float = 0.0, seen: list | None = None):
    """Work of n steps, which notes its beginning and its end."""
    try:
        for i in range(n):
            if seen is not None and i == 0:
                seen.append("began")
            time.sleep(seconds)
            yield i
    finally:
        if seen is not None:
            seen.append("ended")


async def results(engine: Engine, work) -> list:
    with engine.run(work) as job:
        return [item async for item in job]


async def until(is_true) -> None:
    async with asyncio.timeout(20):
        while not is_true():
            await asyncio.sleep(0.002)


def test_each_gets_what_its_work_yields_in_order(engine):
    async def run():
        return await asyncio.gather(*(results(engine, steps(n)) for n in (0, 1, 7, 30)))

    assert asyncio.run(run()) == [list(range(n)) for n in (0, 1, 7, 30)]


def test_an_error_ends_its_own_work_alone(engine):
    def fails():
        yield 1
        raise ValueError("no")

    async def run():
        other = asyncio.create_task(results(engine, steps(20, 0.001)))
        seen = []
        with pytest.raises(ValueError, match="no"), engine.run(fails()) as job:
            async for item in job:
                seen.append(item)
        assert seen == [1] and await other == list(range(20))

    asyncio.run(run())


def test_an_error_that_was_seen_holds_nothing_of_its_work(engine):
    """Its traceback has the frames of what it ended, and with them a cache: who keeps it keeps the memory."""

    class Cache:
        pass

    alive = []

    def fails():
        cache = Cache()
        alive.append(weakref.ref(cache))
        yield 1
        raise MemoryError

    async def run():
        with contextlib.suppress(MemoryError):
            await results(engine, fails())
        await results(engine, steps(1))  # the worker has gone on

    asyncio.run(run())
    gc.collect()
    assert alive[0]() is None


def test_two_share_the_time_and_the_faster_gets_further(engine):
    async def run():
        with engine.run(steps(1000, 0.03)) as slow, engine.run(steps(30, 0.001)) as fast:
            n_fast = len([item async for item in fast])
            return n_fast, slow._items.qsize(), slow.seconds - fast.seconds

    n_fast, n_slow, more = asyncio.run(run())
    assert n_fast == 30 and 1 <= n_slow < 20  # turn by turn it would be 30
    assert more < 0.5  # seconds, at most a step


def test_one_that_comes_late_does_not_get_the_time_that_others_had(engine):
    async def run():
        with engine.run(steps(1000, 0.001)) as first:
            await until(lambda: first._items.qsize() > 50)
            before = first._items.qsize()
            await results(engine, steps(20, 0.001))
            return first._items.qsize() - before

    assert asyncio.run(run()) >= 4


def test_no_more_than_the_active_ones_begin_and_a_full_queue_refuses(engine):
    async def run():
        seen = [[] for _ in range(6)]
        jobs = [engine.run(steps(1000, 0.001, seen[i])) for i in range(5)]
        for job in jobs:
            job.__enter__()
        with pytest.raises(Busy), engine.run(steps(1, 0, seen[5])):
            pass
        await until(lambda: seen[1])
        await asyncio.sleep(0.02)
        assert [len(s) for s in seen] == [1, 1, 0, 0, 0, 0]
        jobs[0].__exit__(None, None, None)  # an active one leaves, the next one begins
        await until(lambda: seen[2])
        assert seen[0] == ["began", "ended"] and seen[3] == []
        jobs[3].__exit__(None, None, None)  # and one that waits makes place for another
        await until(lambda: engine.n_jobs == 3)
        assert seen[3] == []
        for i in (1, 2, 4):
            jobs[i].__exit__(None, None, None)
        assert await results(engine, steps(2)) == [0, 1]

    asyncio.run(run())


def test_whoever_leaves_ends_the_work(engine):
    async def run():
        seen = []
        with engine.run(steps(1_000_000, 0.001, seen)) as job:
            async for item in job:
                if item == 3:
                    break
        await until(lambda: engine.n_jobs == 0)
        assert seen == ["began", "ended"]
        task = asyncio.create_task(results(engine, steps(1_000_000, 0.001, seen)))
        await until(lambda: len(seen) == 3)
        task.cancel()  # as a server does with the handler of a closed connection
        await until(lambda: engine.n_jobs == 0)
        assert seen == ["began", "ended"] * 2

    asyncio.run(run())


def test_cancelling_a_visitor_ends_all_of_his_and_nothing_else(engine):
    async def run():
        with (
            engine.run(steps(10_000, 0.001), "me") as one,
            engine.run(steps(40, 0.001), "other") as other,
            engine.run(steps(10_000, 0.001), "me") as waiting,
        ):
            engine.cancel("me")
            got = [[item async for item in job] for job in (one, waiting, other)]
            assert len(got[0]) < 100 and got[1] == [] and got[2] == list(range(40))

    asyncio.run(run())


def test_an_errand_is_done_between_turns_by_the_worker(engine):
    async def run():
        threads, seen = [], []
        engine.soon(lambda: threads.append(threading.current_thread().name))
        await until(lambda: threads)
        with engine.run(steps(10_000, 0.001, seen)) as job:
            await until(lambda: seen)
            engine.soon(lambda: threads.append(threading.current_thread().name))
            await until(lambda: len(threads) == 2)
            assert not job.is_cancelled
        assert threads == ["engine"] * 2

    asyncio.run(run())


def test_closing_ends_everything():
    async def run():
        engine, seen = Engine(1, 5), []
        with engine.run(steps(10_000, 0.001, seen)) as one, engine.run(steps(5)) as two:
            await until(lambda: seen)
            engine.close()
            assert [item async for item in two] == [] and len([item async for item in one]) < 10_000
        with pytest.raises(Busy), engine.run(steps(1)):
            pass
        assert seen == ["began", "ended"]

    asyncio.run(run())


def test_a_visitor_whose_loop_has_ended_stops_nothing(engine):
    blocks = []  # kept, so that leaving them is not what ends the work

    async def leave():
        blocks.append(engine.run(steps(10_000, 0.001)))
        blocks[0].__enter__()

    asyncio.run(leave())
    assert asyncio.run(results(engine, steps(5))) == list(range(5))
    asyncio.run(until(lambda: engine.n_jobs == 0))
