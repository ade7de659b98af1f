"""The data directory of `phalanx up`: made, held, and the secrets in it.

Owns who may read what in there, and the words for a directory that cannot be used, there or by jobs.
"""

import fcntl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

INVALID = 2  # exit code for a mistake in the command line

console = Console(stderr=True, highlight=False)


def data_directory(path: Path) -> Path:
    """The directory, made if it is not there; SystemExit where it cannot be."""
    try:
        directory = path.expanduser().resolve()
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of nobody
        why = "it is a file" if isinstance(error, FileExistsError) else getattr(error, "strerror", None) or error
        said = f"phalanx up: --data {path} cannot be used ({why}); choose another directory"
        console.print(said, soft_wrap=True, markup=False)
        raise SystemExit(INVALID) from None
    return directory


def make_directories(data: Path) -> None:
    """Its parts, closed to others but for those that ranks of any tenant's user must reach."""
    for name in ("nodes", "checkpoints"):  # ranks run under their tenants' users and reach their own parts of these
        (data / name).mkdir(parents=True, exist_ok=True)
    for name in ("logs", "storage", "ray"):  # other tenants' logs and code, and Ray's token
        (data / name).mkdir(exist_ok=True)
        (data / name).chmod(0o700)


@contextmanager
def exclusive(data: Path) -> Iterator[None]:
    """Hold the data directory: two `up` on one directory would fight over its database."""
    with (data / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(
                f"phalanx up: {data} is in use by another `phalanx up`; stop it or choose another --data"
            ) from None
        yield


def keep_secret(path: Path, text: str) -> str:
    """Write `text` to a file that only its owner reads."""
    path.touch(mode=0o600)
    path.chmod(0o600)  # it may have been there
    path.write_text(text + "\n")
    return text


def kept_secret(path: Path) -> str:
    """What an earlier start kept there; empty where nothing is left of it."""
    return path.read_text().strip() if path.exists() else ""


def mount_warnings(allowed: Iterable[str]) -> list[str]:
    """What to say of directories that jobs may mount, as `--allow-mount` has them, where they cannot."""
    said = []
    for text in allowed:
        path = Path(text.partition(":")[0])
        if not path.is_dir():
            what = "not a directory" if path.exists() else "not there"
            said.append(f"--allow-mount: {path} is {what}: until it is, a job that mounts it does not start")
    return said
