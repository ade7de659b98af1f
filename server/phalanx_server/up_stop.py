"""How `phalanx up` is asked to stop: by signals, which are noted and looked at where the flow may end.

Owns the signals; refuses to know what is stopped, and how.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Stopped(Exception):
    """A signal asked for the end, and the flow came to a point where it may end."""


@dataclass
class StopRequest:
    """Whether a signal asked for the end. The handler only notes it: raised there, an exception could land in any
    callback of the interpreter that swallows it."""

    made: bool = False
    signals: int = 0

    def check(self) -> None:
        if self.made:
            raise Stopped


@contextmanager
def stopped_by_signals() -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGHUP in the request that this yields."""
    request = StopRequest()

    def stop(_number: int, _frame: object) -> None:
        request.made = True
        request.signals += 1

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
