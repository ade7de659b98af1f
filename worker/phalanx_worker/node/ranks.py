"""The ranks of one group on this node, from start to the last of them gone.

Owns the conversation with the group's guardian, the ranks' pipes and report sockets, and the record of how each ended.
Knows neither the server nor the agent: what happens is told through `GroupEvents`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from phalanx.units import duration_text

from phalanx_worker.node import logs, offences, processes
from phalanx_worker.node.command import Launch
from phalanx_worker.node.environment import Places
from phalanx_worker.node.isolation import Confinement
from phalanx_worker.node.logs import LogBudget, LogStream
from phalanx_worker.node.offences import Blame, Offence
from phalanx_worker.node.orders import GroupOrder, StartFailed
from phalanx_worker.node.pace import Pace
from phalanx_worker.node.records import RankRecord, pipe
from phalanx_worker.node.reports import ReportSocket
from phalanx_worker.node.warm import WarmProcess
from phalanx_worker.protocol import Health, LogChunk, Mark, MetricPoint, RankExit, RankStart
from phalanx_worker.runtime import channel, spec

log = logging.getLogger("phalanx.node.ranks")

START_TIMEOUT_S = 60.0
_STREAMS_END_S = 2.0
_ABANDONED_S = 10.0
_COLLECT_S = 5.0  # at least, for outputs of a group that is being stopped


@dataclass(frozen=True)
class GroupEvents:
    """`put` takes everything for the server; `changed` is called after each change of `Group.state` or exits;
    `collect` brings the files that the ranks of a group left to the server; `flush` waits (briefly) until what was put
    is delivered; `profile` sees what ranks say of profiles."""

    put: Callable[[LogChunk | MetricPoint | Mark], None]
    changed: Callable[[], None]
    collect: Callable[[Group], Awaitable[None]]
    flush: Callable[[], Any]
    profile: Callable[[Group, Mark], None]


class Group:
    """One started group. `state`: `running`, `failing` (a rank failed, others run), `ended` (nothing is left)."""

    def __init__(
        self, order: GroupOrder, places: Places, launch: Launch, confinement: Confinement, events: GroupEvents
    ):
        self.order = order
        self.places = places
        self.launch = launch
        self.confinement = confinement
        self.state = "running"
        self.first_failed_rank: int | None = None
        self.starts: list[RankStart] = []
        self.guardian_pid = 0
        self.blame = Blame()
        self.health = order.desired.launch.health or Health()
        self.pace = Pace(self.health)
        self.uid: int | None = None
        self.delivered = False  # it has ended, and all that it left behind has reached the server
        self.ended = asyncio.Event()
        self._events = events
        self._stopping = False
        self._killed = False  # by whoever wants nothing more of it
        self._heard_all = False
        self._stop_at = math.inf  # in the loop's time: when the grace of a stop is over
        self._collecting: asyncio.Timeout | None = None
        self._collecting_since = math.inf
        self._records: dict[int, RankRecord] = {}
        self._connection, self._guardian_end = channel.pair()
        self._connection.setblocking(False)
        self._watcher: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, int]:
        return (self.order.attempt_id, self.order.epoch)

    @property
    def ranks(self) -> set[int]:
        return set(self._records)

    @property
    def exits(self) -> list[RankExit]:
        return [record.exit for record in self._records.values() if record.exit is not None]

    # -------------------------------------------------------------- starting

    async def start(self, warm: WarmProcess, group_spec: spec.GroupSpec, listener: socket.socket | None) -> None:
        """Fork the group. Raises StartFailed, with nothing left behind."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start(warm, group_spec, listener)
        except TimeoutError:
            await self._abandon()
            raise StartFailed(f"the ranks were not started in {duration_text(START_TIMEOUT_S)}") from None
        except BaseException:
            await self._abandon()
            raise
        self._watcher = asyncio.create_task(self._watch())

    async def _start(self, warm: WarmProcess, group_spec: spec.GroupSpec, listener: socket.socket | None) -> None:
        spec_fd, self.uid = spec.write(group_spec), group_spec.uid
        try:
            extra = [listener.fileno()] if listener is not None else []
            await warm.fork_guardian(self._guardian_end, [spec_fd, *extra])
        finally:
            os.close(spec_fd)
            self._guardian_end.close()
        for index, rank in enumerate(group_spec.ranks):
            await self._send_rank(index, rank.rank, group_spec.uid)
        message = await self._receive()
        if message is not None and message["op"] == "refused":
            raise StartFailed(message["message"])
        if message is None or message["op"] != "started":
            reason = "the guardian died" if message is None else message.get("message", "")
            raise StartFailed(f"the ranks could not be forked: {reason}")
        self.guardian_pid = message["guardian_pid"]
        self.starts = [self._rank_start(started) for started in message["ranks"]]

    async def _send_rank(self, index: int, rank: int, uid: int | None) -> None:
        """Make a rank's pipes and socket and hand the far ends over."""
        far_ends: list[int] = []
        try:
            stdout_fd, far = pipe(uid, far_ends)
            stderr_fd, far_stderr = pipe(uid, far_ends)
            ours, theirs = channel.pair()
            far_ends.append(theirs.detach())
            self._records[rank] = self._record(rank, stdout_fd, stderr_fd, ours)
            while True:
                try:
                    return channel.send(self._connection, {"index": index}, [far, far_stderr, far_ends[-1]])
                except BlockingIOError:  # the guardian has not come up yet
                    await asyncio.sleep(0.002)
        except OSError as error:
            raise StartFailed(f"rank {rank} could not be started: {error}") from error
        finally:
            for fd in far_ends:
                os.close(fd)

    def _record(self, rank: int, stdout_fd: int, stderr_fd: int, reports: socket.socket) -> RankRecord:
        budget = LogBudget(self.order.desired.launch.log_limit_bytes)
        streams = [
            LogStream(fd, budget, self._emitter(rank, name))
            for fd, name in [(stdout_fd, "stdout"), (stderr_fd, "stderr")]
        ]
        report_socket = ReportSocket(reports, self.key, rank, self._take_report, self._on_mark)
        return RankRecord(rank=rank, budget=budget, streams=streams, reports=report_socket)

    def _emitter(self, rank: int, stream: str) -> logs.EmitChunk:
        def emit(offset: int, data: str, at: float) -> None:
            self._events.put(LogChunk(*self.key, rank=rank, stream=stream, offset=offset, data=data, at=at))

        return emit

    def _rank_start(self, started: dict[str, Any]) -> RankStart:
        return RankStart(
            rank=started["rank"],
            node=self.order.group.node,
            pid=started["pid"],
            started_at=started["at"],
            warm=self.launch.warm,
            cold_reason=self.launch.cold_reason,
        )

    async def _abandon(self) -> None:
        """Give everything up."""
        await self._abandon_guardian()
        for record in self._records.values():
            record.close()

    async def _abandon_guardian(self) -> None:
        """A guardian that exists kills what it started, and is waited for."""
        self._guardian_end.close()
        with contextlib.suppress(OSError):  # it is gone already
            self._connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ABANDONED_S):
                while await self._receive() is not None:
                    pass
        self._connection.close()

    def changed(self) -> None:
        """Something that others look at is different now."""
        self._events.changed()

    # -------------------------------------------------------------- ending

    def stop(self, grace_s: float) -> None:
        """SIGTERM now, SIGKILL to what is left after `grace_s`; a later call can only shorten the grace."""
        self._stopping = True
        if self.first_failed_rank is None:  # else the agent ends the others of its gang: its own outputs have time
            self._stop_at = min(self._stop_at, asyncio.get_running_loop().time() + grace_s)
            self._cut_collecting(max(self._stop_at, self._collecting_since + _COLLECT_S))
        for record in self._records.values():
            record.reports.tell_stop()
        self._tell({"op": "stop", "grace_s": grace_s})

    def kill(self) -> None:
        """End it now, because it was asked for: its ranks have not failed, and nothing is collected."""
        self._stopping = self._killed = True
        self._cut_collecting(0.0)
        self._tell({"op": "kill"})

    def fail(self, offence: Offence) -> None:
        """End it now because of what it did: a mark says so, and its exits. Nothing where none of it runs or shall."""
        if self._killed or self._collecting_since < math.inf:
            return
        if self.blame.offence is None:
            self.blame.offence = offence
            rank = self.order.group.first_rank if offence.rank is None else offence.rank
            message = f"rank {rank} {offence.reason}: the ranks on this node were ended"
            kind = "oom" if offence.fault == "oom" else "note"
            self._events.put(Mark(*self.key, rank, kind, time.time(), {**offence.data, "message": message}))
        self._tell({"op": "kill"})

    def look_for_oom(self, suspect: Callable[[], int | None]) -> None:
        """Whether the kernel has ended a process of it for want of memory; `suspect` names its rank."""
        if self.blame.offence is not None or not (where := self.confinement.oom()):
            return
        limit_bytes = self.order.memory_limit_bytes if where == "group" else 0
        self.fail(offences.out_of_memory(self.order, limit_bytes, rank=suspect()))

    def ping(self, fence_s: float) -> None:
        """Renew the guardian's lease; without, it ends the ranks by itself."""
        self._tell({"op": "ping", "fence_s": fence_s})

    def note(self, kind: str, data: dict[str, Any]) -> None:
        self.say(self.order.group.first_rank, kind, data)

    def say(self, rank: int, kind: str, data: dict[str, Any]) -> None:
        """A mark of the node's own, in the name of a rank."""
        self._events.put(Mark(*self.key, rank=rank, kind=kind, at=time.time(), data=data))

    def tell(self, rank: int, message: dict[str, Any]) -> bool:
        """Say something to a rank; whether it could be."""
        return self._records[rank].exit is None and self._records[rank].reports.tell(message)

    async def dismiss(self) -> None:
        """Let the guardian go, which may still host the store; ranks that still run are killed."""
        if self._watcher is not None and not self.ended.is_set():
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._abandon()
        await asyncio.to_thread(self.confinement.release)

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            channel.send(self._connection, message)

    # -------------------------------------------------------------- watching

    async def _watch(self) -> None:
        try:
            await self._follow()
        except Exception:  # whatever it is: a group that never ended would hold its GPUs for ever
            log.exception("following %s failed; its ranks are ended", self.order.attempt_id)
            with contextlib.suppress(Exception):
                await self._abandon_guardian()
            await asyncio.to_thread(self._sweep)
        await self._end()

    async def _follow(self) -> None:
        """Until nothing is left of the group."""
        while (message := await self._receive()) is not None and message["op"] != "ended":
            if message["op"] == "exit":
                self._take_exit(message["rank"], message["status"], message["at"], straggler=message["straggler"])
            elif message["op"] in ("note", "fenced"):
                self._stopping = self._stopping or message["op"] == "fenced"
                self._killed = self._killed or message["op"] == "fenced"
                self.note("note", {"message": message["message"]})
            elif message["op"] == "failed":
                self.note("note", {"message": f"the node's guardian of these ranks failed: {message['message']}"})
        if message is None:
            await asyncio.to_thread(self._sweep)

    def _sweep(self) -> None:
        """The guardian died without its word that nothing is left: find what is, by session and by environment."""
        sessions = {start.pid for start in self.starts}
        processes.sweep(self.order.attempt_id, self.order.group.group_rank, sessions)

    async def _receive(self) -> dict[str, Any] | None:
        while True:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._connection, 65536)
            except ConnectionResetError:  # it ended with a message of ours unread; what it said comes after this error
                continue
            except OSError:
                return None
            return channel.parse(data) if data else None

    def _hear(self, rank: int) -> None:
        """What this rank said before it failed; and all others, the first time: it may have failed for their sake."""
        others = [] if self._heard_all else [each for each in self._records.values() if each.rank != rank]
        self._heard_all = True
        for record in (self._records[rank], *others):
            record.reports.drain()

    def _take_exit(self, rank: int, status: int, at: float, *, straggler: bool) -> None:
        code = os.waitstatus_to_exitcode(status)
        record = self._records[rank]
        for stream in record.streams:
            stream.drain()
        record.straggler = straggler
        if code != 0:
            self.look_for_oom(lambda: rank)
            self._hear(rank)
            self.blame.take_verdict(rank)
        record.end(code, at, self.blame, before_stop=not self._stopping)
        if code != 0 and self.first_failed_rank is None and not self._stopping:
            self.first_failed_rank = self.blame.culprit(rank)
            self.state = "failing"
        self._events.changed()

    async def _end(self) -> None:
        """Nothing runs any more: take what it said and left, let it reach the server if it can, then say so in any
        case. Until then the attempt counts as live, and the server takes outputs of no other."""
        try:
            await self._take_last()
        except Exception:
            log.exception("the last output of %s is lost", self.order.attempt_id)
        finally:
            for record in self._records.values():
                record.exit = record.exit or record.unseen(self.blame)
            self.state = "ended"
            self.ended.set()
            self._events.changed()
            await asyncio.to_thread(self.confinement.release)

    async def _take_last(self) -> None:
        streams = [stream for record in self._records.values() for stream in record.streams]
        await logs.finish(streams, _STREAMS_END_S)
        for record in self._records.values():
            record.close()
            self._settle_exit(record)
        if not self._killed:
            await self._collect()
        await self._events.flush()

    async def _collect(self) -> None:
        now = self._collecting_since = asyncio.get_running_loop().time()
        until = None if self._stop_at == math.inf else max(self._stop_at, now + _COLLECT_S)
        try:
            async with asyncio.timeout_at(until) as self._collecting:
                await self._events.collect(self)
        except TimeoutError:
            log.info("collecting the outputs of %s was cut short", self.order.attempt_id)
        except Exception:  # whatever it is: the group ends without them
            log.exception("the outputs of %s could not be collected", self.order.attempt_id)
            self.note("note", {"message": "The node failed to collect output files; its log says why."})
        finally:
            self._collecting = None

    def _cut_collecting(self, at: float) -> None:
        if self._collecting is not None and not self._collecting.expired():
            self._collecting.reschedule(at)

    @property
    def is_going(self) -> bool:
        """Do its ranks run, and shall they?"""
        return self.state == "running" and not self._stopping

    def _settle_exit(self, record: RankRecord) -> None:
        """The exit as it is reported: with the whole tail of stderr, and what was dropped of its logs."""
        record.exit = replace(record.exit or record.unseen(self.blame), tail=record.tail, finished=record.finished)
        if record.budget.dropped_bytes:
            data = {"what": "logs", "count": 1, "bytes": record.budget.dropped_bytes}
            self._events.put(Mark(*self.key, rank=record.rank, kind="dropped", at=time.time(), data=data))

    def _on_mark(self, mark: Mark) -> None:
        if mark.kind == "finished":
            self._records[mark.rank].finished = True
            self.pace.finish()
        elif mark.kind in ("checkpoint", "alive"):
            self.pace.moved(time.monotonic())
        elif mark.kind == "health" and mark.data.get("action") in ("restart", "stop"):
            self.blame.verdicts[mark.rank] = offences.own_check(mark.data, may_be_unfit=self._may_be_unfit)
        elif mark.kind == "profile":
            self._events.profile(self, mark)

    @property
    def _may_be_unfit(self) -> bool:
        """May a preflight have found fault? Only where one was ordered, and before the program shows itself."""
        return self.health.preflight_factor > 0 and not self.pace.steps

    def _take_report(self, report: MetricPoint | Mark) -> None:
        if isinstance(report, MetricPoint) and report.step is not None:
            self.pace.step(report.rank, report.step, time.monotonic())
        self._events.put(report)
