"""How much the API does at once, in threads of its own.

FastAPI runs sync functions in a pool of 40 threads that the whole api-server shares: as many calls that wait
for a hung MLflow would block Airflow's pages too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread

from post_training.api.json_body import JsonRoute
from post_training.errors import BusyError

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """Runs blocking calls, so many at once.

    :param count: number of calls at once.
    :param patience_seconds: how long a call may wait for its turn.
    """

    def __init__(self, count: int, patience_seconds: float = 20.0) -> None:
        self._count = count
        self._patience_seconds = patience_seconds
        self._turns = anyio.Semaphore(count)
        self._limiter = anyio.CapacityLimiter(count)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in a thread and return what it returns.

        :raises BusyError: if the call did not get its turn in time.
        """
        try:
            with anyio.fail_after(self._patience_seconds):
                await self._turns.acquire()
        except TimeoutError:
            raise BusyError(f"{self._count} calls of this kind are under way and do not end") from None
        try:
            return await anyio.to_thread.run_sync(partial(function, *args, **kwargs), limiter=self._limiter)
        finally:
            self._turns.release()

    def threaded(self, endpoint: Callable[..., T]) -> Callable[..., Awaitable[T]]:
        """Return a coroutine function of the same parameters that runs a sync endpoint in these threads."""
        if iscoroutinefunction(endpoint):  # a router that is included makes its routes anew
            return endpoint

        @wraps(endpoint)
        async def run(**arguments: Any) -> T:
            return await self.run(endpoint, **arguments)

        return run


def threaded_routes(threads: Threads) -> type[JsonRoute]:
    """Return the class of routes whose sync endpoints run in these threads."""

    class ThreadedRoute(JsonRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            super().__init__(path, threads.threaded(endpoint), **options)

    return ThreadedRoute


class Places:
    """Counts what lasts long and needs no thread; used from the event loop alone.

    :param count: how many there may be at once.
    :param of_one_user: how many of them may be one user's.
    """

    def __init__(self, count: int, of_one_user: int) -> None:
        self._count = count
        self._of_one_user = of_one_user
        self._taken: Counter[str] = Counter()

    @contextmanager
    def one(self, user_name: str) -> Iterator[None]:
        """Hold a place.

        :raises BusyError: if all are taken, or all that this user may have.
        """
        if self._taken.total() >= self._count:
            raise BusyError(f"{self._count} clients follow logs, which is as many as may")
        if self._taken[user_name] >= self._of_one_user:
            raise BusyError(
                f"{self._of_one_user} clients of {user_name} follow logs: that is one user's share"
            )
        self._taken[user_name] += 1
        try:
            yield
        finally:
            self._taken -= Counter([user_name])  # which drops a user who has none left


@dataclass(frozen=True)
class Capacity:
    """How much at once.

    :param calls: of the calls to MLflow and Airflow's database; MLflow stalls for a minute where more clients
        call it at once than its pool has connections, 15 by default. Published clients
        give up after 60 s.
    :param log_readers: of the reading of logs, which takes processor time.
    :param followers: of the clients that follow a log.
    """

    calls: Threads = field(default_factory=lambda: Threads(8, patience_seconds=45.0))
    log_readers: Threads = field(default_factory=lambda: Threads(2))
    followers: Places = field(default_factory=lambda: Places(100, of_one_user=20))
