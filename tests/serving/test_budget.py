"""The limit of bytes that requests hold at the same time."""

import asyncio

from mindvlm.serving.budget import ByteBudget, Share


def test_a_share_waits_for_room_and_the_oldest_never_does():
    async def work():
        budget, order = ByteBudget(10), []

        async def read(name: str, sizes: list[int], ends: asyncio.Event):
            with Share(budget) as share:
                for size in sizes:
                    await share.take(size)
                    order.append((name, size))
                await ends.wait()

        ends = [asyncio.Event() for _ in range(3)]
        tasks = [
            asyncio.create_task(read(*one))
            for one in (("a", [6, 9], ends[0]), ("b", [4, 3], ends[1]), ("c", [1], ends[2]))
        ]
        await asyncio.sleep(0.01)
        # the oldest exceeds the limit, so that those that hold a part do not wait for each other
        assert order == [("a", 6), ("a", 9)] and budget.used == 15
        waiting = list(budget.shares)[1:]
        assert [share.is_waiting for share in waiting] == [True, True]
        ends[0].set()
        await asyncio.sleep(0.01)
        assert order[2:] == [("b", 4), ("b", 3), ("c", 1)] and budget.used == 8
        tasks[1].cancel()
        ends[2].set()
        await asyncio.wait(tasks)
        assert budget.used == 0 and not budget.shares

    asyncio.run(work())
