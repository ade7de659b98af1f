"""The embedded PostgreSQL survives what happens to it on a laptop."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
import psutil
import pytest
from phalanx_server.store.embedded import SOCKET_NAME, EmbeddedPostgres, PostgresFailed
from phalanx_server.store.engine import driver_dsn
from phalanx_server.store.unix_access import let_pass, may_search

SMALL = {"shared_buffers": "16MB", "io_method": "sync"}


async def query(url: str, statement: str):
    connection = await asyncpg.connect(driver_dsn(url))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.fixture
def home():
    """A private directory. Not tmp_path: any other pytest that starts changes the mode of the directories above that,
    and with it their ACL's mask."""
    directory = Path(tempfile.mkdtemp(prefix="phx-home-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def server(home):
    server = EmbeddedPostgres(home / "data", settings=SMALL)
    yield server
    server.stop()


async def test_data_survives_stop_kill_and_restart(server):
    url = server.start()
    assert server.start() == url, "starting a running server finds it"
    await query(url, "CREATE TABLE kept AS SELECT 42 AS n")
    first = server.pid()
    server.stop()
    assert server.pid() is None
    server.start()
    second = server.pid()
    assert second is not None and second != first
    os.kill(second, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(second)] if psutil.pid_exists(second) else [], timeout=10)
    assert await query(server.start(), "SELECT n FROM kept") == 42
    assert await query(url, "SHOW synchronous_commit") == "on"
    assert await query(url, "SHOW fsync") == "on"


def test_a_killed_server_that_is_still_a_zombie_is_replaced(server):
    """Nobody has reaped it yet, so its pid lives; here somebody else has got it."""
    server.start()
    pid = server.pid()
    lock = server._socket_dir() / f"{SOCKET_NAME}.lock"
    said = lock.read_text()
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    for file in (lock, server.data_dir / "postmaster.pid"):
        file.write_text(said.replace(str(pid), str(os.getpid()), 1))
    server.start()
    assert server.pid() not in (None, pid)


def test_a_ctrl_c_in_the_terminal_does_not_reach_its_programs(server, home):
    """It reaches every process of the terminal's group: initdb would end with half a database."""
    script = f"""
import signal
from pathlib import Path
from phalanx_server.store.embedded import SOCKET_NAME, EmbeddedPostgres, PostgresFailed
signal.signal(signal.SIGINT, lambda *_: print("noted"))
EmbeddedPostgres(Path({str(home / "data")!r}), settings={SMALL!r}).start()
"""
    terminal = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (home / "data" / "base").exists():  # initdb is at work
        assert terminal.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(terminal.pid, signal.SIGINT)
    assert terminal.wait(60) == 0
    assert asyncio.run(query(server.start(), "SELECT 1")) == 1


def test_nobody_else_gets_in(server, home):
    server.start()
    assert stat.S_IMODE((home / "data").stat().st_mode) == 0o700
    assert not home.stat().st_mode & stat.S_IRWXO, "others still may not enter the directory above"


async def test_a_pid_file_that_names_some_other_process_is_no_running_server(server):
    server.start()
    server.stop()
    pid_file = server.data_dir / "postmaster.pid"
    pid_file.write_text(f"{os.getpid()}\n{server.data_dir}\n")
    assert server.pid() is None
    assert await query(server.start(), "SELECT 1") == 1


def test_a_path_too_long_for_a_socket_still_works(home):
    server = EmbeddedPostgres(home / ("long" * 30), settings=SMALL)
    try:
        assert asyncio.run(query(server.start(), "SELECT 1")) == 1
        socket_dir = Path(asyncio.run(query(server.url(), "SHOW unix_socket_directories")))
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
    finally:
        server.stop()
    socket_dir.rmdir()


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PostgresFailed, match="neither empty nor"):
        EmbeddedPostgres(tmp_path).start()


def test_data_of_another_major_version_is_refused(tmp_path):
    (tmp_path / "PG_VERSION").write_text("16\n")
    with pytest.raises(PostgresFailed, match="made by PostgreSQL 16"):
        EmbeddedPostgres(tmp_path).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may act for another user")
def test_one_user_is_let_through_a_private_directory_and_nobody_else(tmp_path):
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    stranger, guest = 54321, 54322
    assert let_pass(private, guest, guest)[0] == private
    assert may_search(private, guest, guest)
    assert not may_search(private, stranger, stranger)
    assert let_pass(private, guest, guest) == []
    assert let_pass(private, stranger, stranger)[0] == private
    assert may_search(private, guest, guest)
    listing = os.spawnlp(os.P_WAIT, "setpriv", "setpriv", f"--reuid={guest}", "--clear-groups", "ls", str(private))
    assert listing != 0, "passing through is not listing"
