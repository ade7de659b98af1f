"""Profiles that are asked of the ranks of this node: passed on, waited for, and their traces brought to the server.

Owns how long a rank has for its first step and then for its trace, what is believed of what it says (it may say
anything), and that each request that came here ends: with a trace that the server has, with a reason, or with its
group. Knows neither torch nor what a trace holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from phalanx_worker.node.outputs import OutputFile
from phalanx_worker.node.ranks import Group
from phalanx_worker.node.transfers import ProfileRef, Transfers
from phalanx_worker.node.uploads import Sending
from phalanx_worker.protocol import Mark, ProfileRequest

log = logging.getLogger("phalanx.node.profiles")

FIRST_STEP_S = 600.0  # for the optimizer step that a request waits for
RECORDED_S = 420.0  # from then to the trace: a rank gives up by itself after 120 s, and may be long in writing
TRACE_MAX_BYTES = 2 << 30  # as on the server
_GONE = "the rank has ended, or does not listen"
_NOT_OURS = "its command is not a plain `python script.py` of the node's Python, so its steps cannot be seen"
_NO_STEP = f"it has finished no optimizer step for {FIRST_STEP_S:.0f} s"
_NO_TRACE = f"nothing was heard of it for {RECORDED_S:.0f} s after it began to record"
_TOO_LARGE = f"its trace is larger than {TRACE_MAX_BYTES:,} bytes: ask for fewer steps"
_FAULT = "the node failed to deliver it; its log says why"


@dataclass
class Asked:
    """One request to one rank. `sending` once its trace is there; `over` once nothing more is to be heard of it."""

    group: Group
    profile_id: str
    rank: int
    timer: asyncio.TimerHandle | None = None
    is_recording: bool = False
    sending: asyncio.Task[None] | None = None
    over: bool = False

    @property
    def file(self) -> str:
        """Its name, in the group's directory for temporary files."""
        return f"phalanx-{self.profile_id}-{self.rank}.json.gz"


class Profiles:
    """Of all groups of a node. Each method may be called again with the same arguments."""

    def __init__(self, transfers: Transfers, *, own_users: bool, first_step_s: float = FIRST_STEP_S):
        self._recorded_s = RECORDED_S
        self._transfers = transfers
        self._own_users = own_users
        self._first_step_s = first_step_s
        self._asked: dict[tuple[str, int], dict[tuple[str, int], Asked]] = {}  # by group; by profile and rank

    def ask(self, group: Group, request: ProfileRequest) -> None:
        """Ask those of its ranks that are of `group` for a trace."""
        known = self._asked.setdefault(group.key, {})
        for rank in sorted(set(request.ranks) & group.ranks):
            if (request.profile_id, rank) not in known:
                asked = known[request.profile_id, rank] = Asked(group, request.profile_id, rank)
                self._ask(asked, request.steps)

    def heard(self, group: Group, mark: Mark) -> None:
        """What a rank says of a profile. What was not asked of it, or is over, is not listened to."""
        asked = self._asked.get(group.key, {}).get((str(mark.data.get("id")), mark.rank))
        if asked is None or asked.over:
            return
        state = mark.data.get("state")
        if state in ("written", "failed") and asked.timer is not None:
            asked.timer.cancel()
        asked.over = state in ("written", "failed")
        if state == "recording" and not asked.is_recording:  # said again it has no more time
            asked.is_recording = True
            self._wait(asked, self._recorded_s, _NO_TRACE)
        if state == "written":
            self._take(asked, mark.data.get("bytes"))

    async def settle(self, group: Group) -> None:
        """Wait for what is on its way; cancelled, it is given up."""
        sending = [each.sending for each in self._asked.get(group.key, {}).values() if each.sending is not None]
        if sending:
            await asyncio.gather(*sending)

    async def forget(self, group: Group) -> None:
        tasks = []
        for asked in self._asked.pop(group.key, {}).values():
            if asked.timer is not None:
                asked.timer.cancel()
            if asked.sending is not None:
                asked.sending.cancel()
                tasks.append(asked.sending)
        await asyncio.gather(*tasks, return_exceptions=True)

    # -------------------------------------------------------------- one rank

    def _ask(self, asked: Asked, steps: int) -> None:
        if not asked.group.launch.is_ours:
            return self._fail(asked, _NOT_OURS)
        message = {"t": "profile", "id": asked.profile_id, "steps": steps, "until": time.time() + self._first_step_s}
        if not asked.group.tell(asked.rank, {**message, "file": f"{asked.group.places.tmp}/{asked.file}"}):
            return self._fail(asked, _GONE)
        self._wait(asked, self._first_step_s, _NO_STEP)

    def _wait(self, asked: Asked, seconds: float, reason: str) -> None:
        """For the next word; without one it has failed for `reason`."""
        if asked.timer is not None:
            asked.timer.cancel()
        asked.timer = asyncio.get_running_loop().call_later(seconds, self._fail, asked, reason)

    def _fail(self, asked: Asked, reason: str) -> None:
        asked.over = True
        asked.group.say(asked.rank, "profile", {"id": asked.profile_id, "state": "failed", "reason": reason})

    def _take(self, asked: Asked, size_bytes: Any) -> None:
        if not isinstance(size_bytes, int) or not 0 <= size_bytes <= TRACE_MAX_BYTES:
            return self._fail(asked, _TOO_LARGE)
        asked.sending = asyncio.create_task(self._send(asked, size_bytes))

    async def _send(self, asked: Asked, size_bytes: int) -> None:
        """Bring the trace to the server, which says itself that it is there; else say why it is not."""
        group = asked.group
        uid = group.order.desired.tenant_uid if self._own_users else None

        def refer(file: OutputFile, digest: str) -> ProfileRef:
            return ProfileRef(*group.key, asked.profile_id, asked.rank, digest, file.bytes)

        file = OutputFile(group.places.tmp, asked.file, size_bytes)
        sending = Sending(group, self._transfers, [file], uid, refer=refer)
        try:
            await sending.run()
            reason = sending.lost_reason
        except Exception:
            log.exception("the trace of rank %d of %s is not delivered", asked.rank, group.key[0])
            reason = _FAULT
        finally:
            _remove(group.places.tmp, asked.file)
        if reason:
            self._fail(asked, reason)


def _remove(directory: str, name: str) -> None:
    """The directory is the job's: nothing is followed that it may have put in its place."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.unlink(name, dir_fd=descriptor)
        finally:
            os.close(descriptor)
