"""Files of a group on their way to the server: outputs between the end of its last rank and the end of the group, and
traces while its ranks run.

Owns how long that may take, what is tried again, and what the user is told of files that did not arrive. Whoever calls
may cut it short by cancelling: what is left then is told as well.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable

from phalanx_worker.node import outputs
from phalanx_worker.node.answers import Delivery
from phalanx_worker.node.outputs import Collected, OutputFile, Source
from phalanx_worker.node.ranks import Group
from phalanx_worker.node.threads import to_its_end
from phalanx_worker.node.transfers import CutOff, NotLive, OutputRef, ProfileRef, Transfers

BUDGET_S = 600.0  # while the server is there; the GPUs are held meanwhile
TOGETHER = 4
_FAULTS_BORNE = 6  # over one file, while reports get through
_CUTS_BORNE = 40  # likewise: a server that has too much to do hangs up
_PAUSE_S = (0.25, 5.0)

_NO_TIME = "the time for it was over"
_CHANGED = "a file changed, or could not be read"
_REFUSED = "the server did not take a file"
_FAULTY = "the server failed over a file again and again"
_CUT = "the connection broke off again and again: is the server overloaded, or the file larger than it takes?"
_GONE = "the server takes no outputs of this attempt any more"


async def deliver_outputs(group: Group, transfers: Transfers, *, own_users: bool) -> None:
    """Collect what the ranks of `group`, which have all ended, have left, and bring it to the server."""
    uid = group.order.desired.tenant_uid if own_users else None
    launch = group.order.desired.launch
    source = Source(group.places.output, group.places.work, launch.outputs, uid)
    collected = await to_its_end(outputs.collect, source, threading.Event())
    if sentence := collected.left_out_sentence():
        group.note("note", {"message": sentence})
    if sentence := _unmatched_sentence(group, collected):
        group.note("note", {"message": sentence})
    if collected.files:
        sending = Sending(group, transfers, collected.files, uid)
        try:
            await sending.run()
        finally:
            if sentence := sending.lost_sentence():
                group.note("note", {"message": sentence})


def _unmatched_sentence(group: Group, collected: Collected) -> str:
    """Of a gang on several nodes that of rank 0 tells: elsewhere ranks mostly leave nothing. Whoever failed knows why
    there is nothing."""
    order = group.order
    if order.group.group_rank != 0 or any(end.exit_code != 0 for end in group.exits):
        return ""
    return collected.unmatched_sentence(f" on {order.group.node}" if len(order.desired.groups) > 1 else "")


class Sending:
    """The files of one group; `run` ends when all are delivered or given up."""

    def __init__(
        self,
        group: Group,
        transfers: Transfers,
        files: list[OutputFile],
        uid: int | None,
        *,
        refer: Callable[[OutputFile, str], OutputRef | ProfileRef] | None = None,
    ):
        """`refer` says, of a file and its SHA-256, which it is for the server: an output, unless it says otherwise."""
        self._group = group
        self._refer = refer or self._output
        self._transfers = transfers
        self._uid = uid
        self._waiting = deque(files)
        self._missing = set(files)
        self._why = ""  # the first reason why a file was given up
        self._now = asyncio.get_running_loop().time
        self._deadline = self._now() + BUDGET_S
        self._away_counted_to = self._now()

    async def run(self) -> None:
        self._transfers.waiting_bytes += _size_bytes(self._missing)
        try:
            async with asyncio.TaskGroup() as senders:
                for _ in range(min(TOGETHER, len(self._waiting))):
                    senders.create_task(self._send_waiting())
        finally:
            self._transfers.waiting_bytes -= _size_bytes(self._missing)

    def lost_sentence(self) -> str:
        """For the user; "" if nothing was lost."""
        if not self._missing:
            return ""
        lost_bytes = _size_bytes(self._missing)
        examples = ", ".join(sorted(file.path for file in self._missing)[:3])
        count = len(self._missing)
        return (
            f"{count:,} output file{'s' if count > 1 else ''} ({lost_bytes:,} bytes) could not be delivered, "
            f"for example {examples[:300]}: {self.lost_reason}."
        )

    @property
    def lost_reason(self) -> str:
        """Why something was lost; "" if nothing was."""
        return (self._why or _NO_TIME) if self._missing else ""

    def _output(self, file: OutputFile, digest: str) -> OutputRef:
        return OutputRef(*self._group.key, self._group.order.group.group_rank, file.path, digest, file.bytes)

    async def _send_waiting(self) -> None:
        while self._waiting:
            file = self._waiting.popleft()
            try:
                await self._send(file)
            except NotLive:
                self._waiting.clear()
                self._give_up(_GONE)
            except OSError:
                self._give_up(_CHANGED)

    async def _send(self, file: OutputFile) -> None:
        """Until it is taken or given up. Raises NotLive, OSError."""
        descriptor = outputs.open_file(file, self._uid)  # not in a thread: cancelled, it would leave it open
        try:
            digest = await to_its_end(outputs.sha256, descriptor, file.bytes, threading.Event())
            if await self._put(self._refer(file, digest), descriptor):
                self._missing.discard(file)
                self._transfers.waiting_bytes -= file.bytes
        finally:
            os.close(descriptor)

    async def _put(self, ref: OutputRef | ProfileRef, descriptor: int) -> bool:
        faults = cuts = tries = 0
        while not self._is_over:
            began_at = self._now()
            try:
                outcome = await self._try(ref, descriptor)
            except CutOff:
                outcome, cuts = Delivery.AWAY, cuts + (not self._transfers.link.is_away)
            if outcome is Delivery.TAKEN:
                return True
            if outcome is Delivery.REJECTED:
                return self._give_up(_REFUSED)
            faults += outcome is Delivery.FAULT and not self._transfers.link.is_away
            if faults >= _FAULTS_BORNE:
                return self._give_up(_FAULTY)
            if cuts >= _CUTS_BORNE:
                return self._give_up(_CUT)
            first, longest = _PAUSE_S
            await asyncio.sleep(min(longest, first * 2 ** min(tries, 8)) * random.uniform(0.8, 1.2))
            tries += 1
            self._count_away(began_at)
        self._waiting.clear()
        return self._give_up(_NO_TIME)

    async def _try(self, ref: OutputRef | ProfileRef, descriptor: int) -> Delivery:
        """Raises as `put_file` does."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._transfers.put_file(ref, descriptor)
        except TimeoutError:
            return Delivery.AWAY

    @property
    def _is_over(self) -> bool:
        return self._now() >= self._deadline or self._transfers.link.outage.is_over

    def _count_away(self, since: float) -> None:
        """Time in which the server was away is not used up; how much that may be is for the outage's fence to say."""
        now = self._now()
        if self._transfers.link.is_away:
            self._deadline += now - max(since, self._away_counted_to)
        self._away_counted_to = now

    def _give_up(self, why: str) -> bool:
        self._why = self._why or why
        return False


def _size_bytes(files: Iterable[OutputFile]) -> int:
    return sum(file.bytes for file in files)
