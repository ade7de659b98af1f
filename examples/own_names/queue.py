"""The user's own module `queue`: a bounded buffer, with the standard library's names for those who need them."""

from _queue import Empty, SimpleQueue
from collections import deque

NAME = "the user's queue"


class Full(Exception):
    """The buffer holds `maxsize` items."""


class Queue:
    def __init__(self, maxsize: int = 0) -> None:
        self.maxsize = maxsize
        self.items: deque = deque()

    def put(self, item: object) -> None:
        if self.maxsize and len(self.items) >= self.maxsize:
            raise Full
        self.items.append(item)

    def get(self) -> object:
        if not self.items:
            raise Empty
        return self.items.popleft()


__all__ = ["NAME", "Empty", "Full", "Queue", "SimpleQueue"]
