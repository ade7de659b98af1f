"""One rank as its node knows it: its streams while they are open, and what is known of its end.

Owns no rule of how it ends (that is `ranks.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from phalanx_worker.node import logs
from phalanx_worker.node.logs import LogBudget, LogStream
from phalanx_worker.node.offences import Blame
from phalanx_worker.node.reports import ReportSocket
from phalanx_worker.protocol import RankExit

_STRAGGLER_TAIL = "phalanx: ended as a straggler\n"


@dataclass
class RankRecord:
    """One rank: its streams while they are open, and what is known of its end."""

    rank: int
    budget: LogBudget
    streams: list[LogStream]  # stdout, stderr
    reports: ReportSocket
    finished: bool = False
    straggler: bool = False
    exit: RankExit | None = None

    @property
    def tail(self) -> str:
        """Of stderr, and that it was ended as a straggler, which its signal alone would not tell."""
        return (self.streams[1].tail + (_STRAGGLER_TAIL if self.straggler else ""))[-logs.TAIL_BYTES :]

    def end(self, code: int, at: float, blame: Blame, *, before_stop: bool) -> None:
        """It was seen to end with this code (negative: by that signal) at that time; where it failed, `blame` says
        why."""
        failed = code != 0
        self.exit = RankExit(
            rank=self.rank,
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            ended_at=at,
            oom=failed and blame.is_oom,
            fault=blame.fault if failed else "",
            final=failed and blame.is_final,
            tail=self.tail,
            reason=blame.reason(self.rank) if failed else "",
            before_stop=before_stop,
        )

    def unseen(self, blame: Blame) -> RankExit:
        """Its guardian died, so nobody saw how it ended."""
        return RankExit(rank=self.rank, oom=blame.is_oom, finished=self.finished, reason=blame.reason(self.rank))

    def close(self) -> None:
        self.reports.close()
        for stream in self.streams:
            stream.close()


def pipe(uid: int | None, far_ends: list[int]) -> tuple[int, int]:
    """A pipe for a rank's output, owned by its user so that it may open /dev/stdout."""
    near, far = os.pipe()
    far_ends.append(far)
    if uid is not None:
        os.fchown(far, uid, uid)
    return near, far
