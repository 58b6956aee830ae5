"""Batches made ahead in threads, so that a GPU does not wait for them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Self, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Calls `make` for the numbers to come before they are asked for.

    Since a batch is a function of its number, what is asked for is the same with any number of threads, and after a
    resume at any step. NumPy and PyTorch let go of the interpreter's lock where the work is done.

    Args:
        make: from a number to its batch; called from several threads at once.
        num_threads: 0 makes each batch when it is asked for.
        one_core_each: keep PyTorch in each of the threads to one core; else each may use all.
    """

    def __init__(self, make: Callable[[int], T], num_threads: int, *, one_core_each: bool = False) -> None:
        self.make = make
        self.num_threads = num_threads
        self.one_core_each = one_core_each
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[int, Future[T]] = {}

    def __enter__(self) -> Self:
        if self.num_threads:
            # Said in a thread, it holds for that thread.
            begin = partial(torch.set_num_threads, 1) if self.one_core_each else None
            self._pool = ThreadPoolExecutor(self.num_threads, "batch", initializer=begin)
        return self

    def __exit__(self, *error: object) -> None:
        self._coming.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            if self.one_core_each:
                # It holds for threads to come as well, to which the caller's own number is given back.
                torch.set_num_threads(torch.get_num_threads())

    def forget(self) -> None:
        """Make again what was made ahead: `make` gives other batches from now on."""
        self._coming = {}

    def __getitem__(self, number: int) -> T:
        """The batch of a number; what making it raises is raised here."""
        if self._pool is None:
            return self.make(number)
        wanted = range(number, number + 1 + self.num_threads)
        # A number that is asked for out of turn leaves those before it behind.
        self._coming = {step: self._coming.get(step) or self._pool.submit(self.make, step) for step in wanted}
        return self._coming[number].result()
