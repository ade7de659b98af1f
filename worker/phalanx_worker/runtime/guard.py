"""The guardian: parent of all ranks of one group, and of everything they leave behind.

Owns the forks of the ranks, their exit statuses, SIGTERM-then-SIGKILL, and the certainty that nothing of the group is
left: it adopts orphans, so "no child remains" means that no process of the group remains. Hosts the rendezvous store
of group 0 for as long as the runner wants. Dies with everything below it when the runner's end of its socket closes.
Holds the lease of a runner that hangs, and so can fence nothing itself: without a ping for `fence_s` its ranks end.
Ends stragglers where a job asks for it: ranks that do nothing for `straggler_s` after another was done. Standard
library only, but for the store; knows nothing of jobs.

Runner to guardian: `rank` (with stdout, stderr, report socket), `ping` {fence_s}, `stop` {grace_s}, `kill`.
Guardian to runner: `started` {ranks}, `exit` {rank, status, at, straggler}, `ended`, and with a message `note`,
`fenced` (all are ended because of the lease), `failed`, `refused` (nothing was started; a sentence for the user).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NoReturn

from phalanx_worker.runtime import channel, confine, linux, mounts, rank, spec
from phalanx_worker.runtime.lease import Lease
from phalanx_worker.runtime.stragglers import Stragglers

_KILL_AGAIN_S = 0.02
_UNREACHED = (ProcessLookupError, PermissionError)  # gone; or another's, by sudo: it is waited for
_REASON_MULTITHREADED = "the guardian has {} threads, and a fork would copy only one"


def run(connection: socket.socket, spec_fd: int, listener_fd: int | None, *, startup: frozenset[str]) -> NoReturn:
    """Serve one group to its end; never returns."""
    guardian = Guardian(connection, spec.read(spec_fd), listener_fd, startup)
    os.close(spec_fd)
    try:
        guardian.start()
        guardian.serve()
    except (BrokenPipeError, ConnectionResetError):
        guardian.give_up()
    except mounts.Refused as refusal:
        guardian.refuse(str(refusal))
    except Exception as error:
        with contextlib.suppress(OSError):
            channel.send(connection, {"op": "failed", "message": f"{type(error).__name__}: {error}"})
        guardian.give_up()
    os._exit(0)


class Guardian:
    def __init__(
        self, connection: socket.socket, group: spec.GroupSpec, listener_fd: int | None, startup: frozenset[str]
    ):
        self._connection = connection
        self._group = group
        self._listener_fd = listener_fd
        self._startup = startup
        self._pids: dict[int, int] = {}  # pid of a live rank -> rank
        self._stopping = False
        self._kill_at: float | None = None  # monotonic; from then on everything left is killed, again and again
        self._ended = False
        self._lease = Lease(group.fence_s)
        self._stragglers = Stragglers(group.straggler_s)
        self._ended_stragglers: set[int] = set()  # pids
        self._store: Any = None
        self._wake_read, self._wake_write = socket.socketpair()

    def start(self) -> None:
        os.setsid()
        linux.adopt_orphans()
        # Blocked, not ignored: a SIGTERM that meets a rank before it has set its own signals up waits for that.
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
        self._watch_children()
        mounts.enter(self._group)
        started = [self._start_next() for _ in self._group.ranks]
        channel.send(self._connection, {"op": "started", "guardian_pid": os.getpid(), "ranks": started})
        self._host_store()

    def serve(self) -> None:
        """Until everything is gone and, where the store is hosted here, the runner needs it no more."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._wake_read, select.POLLIN)
        while not self._ended or self._store is not None:
            ready = {fd for fd, _ in poll.poll(self._wait_ms())}
            if self._wake_read.fileno() in ready:
                self._wake_read.recv(4096)
            if self._connection.fileno() in ready and not self._obey():
                return self.give_up()
            self._settle()
            if not self._ended:
                self._watch()
        self._kill_all()

    def give_up(self) -> None:
        """Nobody waits for the end any more: clear everything away that the runner would have cleared."""
        self._kill_all()
        confine.remove(self._group.cgroup)

    def refuse(self, message: str) -> None:
        """Say why nothing is started; the runner's messages are read so that it does not fail over them."""
        channel.send(self._connection, {"op": "refused", "message": message})
        while (received := channel.receive(self._connection)) is not None:
            for fd in received[1]:
                os.close(fd)

    def _kill_all(self) -> None:
        """Kill everything below, until nothing is left."""
        while not self._reap():
            self._kill_descendants()
            time.sleep(_KILL_AGAIN_S)

    # -------------------------------------------------------------- starting

    def _watch_children(self) -> None:
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only so that the wakeup socket is written to

    def _start_next(self) -> dict[str, Any]:
        if not select.select([self._connection], [], [], self._group.fence_s)[0]:
            raise BrokenPipeError  # the runner hangs
        received = channel.receive(self._connection)
        if received is None:
            raise BrokenPipeError
        message, (stdout, stderr, report) = received
        index = message["index"]
        if linux.thread_count() != 1 and self._group.program.kind != "exec":
            raise RuntimeError(_REASON_MULTITHREADED.format(linux.thread_count()))
        guardian_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            fds = rank.RankFds(stdout=stdout, stderr=stderr, report=report)
            rank.enter(
                self._group,
                self._group.ranks[index],
                fds,
                guardian_pid=guardian_pid,
                own_fds=self._own_fds(),
                startup=self._startup,
            )
        for fd in (stdout, stderr, report):
            os.close(fd)
        number = self._group.ranks[index].rank
        self._pids[pid] = number
        return {"rank": number, "pid": pid, "at": time.time()}

    def _own_fds(self) -> list[int]:
        fds = [self._connection.fileno(), self._wake_read.fileno(), self._wake_write.fileno()]
        return fds if self._listener_fd is None else [*fds, self._listener_fd]

    def _host_store(self) -> None:
        """The store's threads start here: no fork after this."""
        store = self._group.store
        if store is None or self._listener_fd is None or "torch" not in sys.modules:
            return
        from torch._C._distributed_c10d import TCPStore  # loaded in the warm process already

        confine.bound_own_memory()
        self._store = TCPStore(
            store.host,
            store.port,
            store.world_size,
            is_master=True,
            timeout=timedelta(seconds=30),
            wait_for_workers=False,
            master_listen_fd=self._listener_fd,
        )

    # -------------------------------------------------------------- watching

    def _obey(self) -> bool:
        """Carry out one message; False when the runner is gone."""
        received = channel.receive(self._connection)
        if received is None:
            return False
        message = received[0]
        if message["op"] == "ping":
            self._lease.renew(float(message["fence_s"]))
        elif message["op"] == "stop":
            self._stop(float(message["grace_s"]))
        elif message["op"] == "kill":
            self._kill_at = time.monotonic()
        return True

    def _stop(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        self._kill_at = deadline if self._kill_at is None else min(self._kill_at, deadline)
        if self._stopping:
            return
        self._stopping = True
        for pid in self._pids:
            self._terminate(pid)

    def _terminate(self, pid: int) -> None:
        if self._group.program.shell:  # a shell passes nothing on: signal what it started as well
            with contextlib.suppress(*_UNREACHED):  # not yet in its own session: then it has started nothing
                os.killpg(pid, signal.SIGTERM)
                return
        with contextlib.suppress(*_UNREACHED):
            os.kill(pid, signal.SIGTERM)

    def _settle(self) -> None:
        if self._ended:
            return
        alone = self._reap()
        if alone:
            self._ended = True
            mounts.give_shm_back(self._group)
            channel.send(self._connection, {"op": "ended"})
        elif self._must_kill():
            self._kill_descendants()

    def _watch(self) -> None:
        """End the ranks of a runner that hangs, and ranks that hang themselves while others are done."""
        now = time.monotonic()
        if self._lease.is_over(now) and not self._must_kill():
            self._kill_at = now
            self._kill_descendants()
            self._tell({"op": "fenced", "message": f"the runner hung for {self._lease.fence_s:.0f} s: ranks ended"})
        if self._stopping or not self._stragglers.is_due(now):
            return
        for pid in self._stragglers.look(now, linux.cpu_ticks(self._pids)):
            self._end_straggler(pid)

    def _end_straggler(self, pid: int) -> None:
        """SIGTERM; at the next look, if that changed nothing, SIGKILL."""
        if pid in self._ended_stragglers:
            return self._kill([pid, *linux.descendants(pid)])
        self._ended_stragglers.add(pid)
        waited = f"{self._group.straggler_s:.0f} s"
        message = f"rank {self._pids[pid]} was ended as a straggler: it did nothing for {waited} after others were done"
        self._tell({"op": "note", "message": message})
        self._terminate(pid)

    def _must_kill(self) -> bool:
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            return True
        lets_children_finish = self._stopping and self._group.program.shell
        return not self._pids and not lets_children_finish

    def _wait_ms(self) -> float | None:
        if self._ended:
            return None
        if self._must_kill():
            return _KILL_AGAIN_S * 1000
        due = [self._lease.look_at, self._kill_at, None if self._stopping else self._stragglers.look_at]
        return max(0.0, min(at for at in due if at is not None) - time.monotonic()) * 1000 + 1

    def _reap(self) -> bool:
        """Collect every process that ended; True when no child is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            number = self._pids.pop(pid, None)
            if number is not None:
                straggler = pid in self._ended_stragglers
                self._tell({"op": "exit", "rank": number, "status": status, "at": time.time(), "straggler": straggler})
                if status == 0:
                    self._stragglers.begin(time.monotonic())

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen as end of file by the loop
            channel.send(self._connection, message)

    def _kill_descendants(self) -> None:
        confine.end(self._group.cgroup)
        self._kill(linux.descendants(os.getpid()))

    @staticmethod
    def _kill(pids: Iterable[int]) -> None:
        for pid in pids:
            with contextlib.suppress(*_UNREACHED):
                os.kill(pid, signal.SIGKILL)
