"""A limit of the bytes that requests hold at the same time."""

import asyncio

from mindvlm.serving.errors import ApiError


class ByteBudget:
    """Bytes that requests may hold together; see `Share`.

    Args:
        total: the limit, which only the oldest request exceeds.

    Attributes:
        shares: those of all requests, the oldest first.
    """

    def __init__(self, total: int):
        self.total, self.used = total, 0
        self.shares: dict[Share, None] = {}
        self.freed = asyncio.Event()


class Share:
    """The bytes of one request, which are given back at the end of the block.

    The oldest request never waits, so that requests that hold a part of their bytes do not wait for each other.

    Attributes:
        is_waiting: whether the request waits for bytes.
    """

    def __init__(self, budget: ByteBudget):
        self.budget, self.num_bytes, self.is_waiting = budget, 0, False

    def __enter__(self) -> "Share":
        self.budget.shares[self] = None
        return self

    def __exit__(self, *error) -> None:
        del self.budget.shares[self]
        self.budget.used -= self.num_bytes
        self.budget.freed.set()

    async def take(self, num_bytes: int) -> None:
        """Waits until there is room for more bytes, and holds them."""
        budget = self.budget
        while budget.used + num_bytes > budget.total and next(iter(budget.shares)) is not self:
            self.is_waiting = True
            budget.freed.clear()
            await budget.freed.wait()
        self.is_waiting = False
        self.num_bytes += num_bytes
        budget.used += num_bytes


def busy(problem: str) -> ApiError:
    """Returns the error for a request that may succeed later."""
    headers = {"Retry-After": "2", "Connection": "close"}
    return ApiError(503, f"{problem}; try again later", code="busy", headers=headers)
