"""Directories of attempts on a node: made before the ranks start, removed when the attempt is forgotten.

Owns `<data>/attempts` and each attempt's directory for temporary files, which lies in the system's (its path must be
short: Unix sockets in TMPDIR have 107 bytes). Never removes a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from phalanx_worker.node.environment import Places
from phalanx_worker.node.orders import GroupOrder, StartFailed

_MKDIR_TIMEOUT_S = 30.0


class Workspace:
    """The directories of one node. `checkpoint_root` may be a path, a URL, or None for one inside `data_dir`."""

    def __init__(self, data_dir: Path, checkpoint_root: str | None):
        self._attempts = data_dir / "attempts"
        self._checkpoint_root = checkpoint_root or str(data_dir / "checkpoints")
        self._attempts.mkdir(parents=True, exist_ok=True, mode=0o755)

    def prepare(self, order: GroupOrder, uid: int | None) -> Places:
        """Make every directory, owned by the ranks' user. Raises StartFailed where storage refuses."""
        places = self.places(order)
        private = [places.work, places.home, places.tmp, places.output]
        try:
            _make_new(Path(places.root), None, mode=0o755)
            for path in private:
                _make_new(Path(path), uid, mode=0o700)
            if "://" not in places.checkpoints:
                _make_checkpoints(
                    Path(places.checkpoints), uid, chosen_by_job=bool(order.desired.launch.checkpoint_url)
                )
        except (OSError, subprocess.SubprocessError, StartFailed) as error:
            self.remove(places)
            raise StartFailed(f"cannot make the directories of the attempt: {error}") from error
        return places

    def remove(self, places: Places) -> None:
        for path in (places.root, places.tmp):
            _remove_tree(path)

    def leftovers(self) -> list[str]:
        """`<attempt id>-<group rank>` of each group that an earlier runner of this node left directories of."""
        return sorted(entry.name for entry in self._attempts.iterdir())

    def clear(self) -> None:
        for entry in self._attempts.iterdir():
            _remove_tree(entry)
            _remove_tree(_tmp_path(entry.name))

    def places(self, order: GroupOrder) -> Places:
        """Where the directories are, made or not."""
        name = f"{order.attempt_id}-{order.group.group_rank}"
        root = self._attempts / name
        own = order.desired.launch.checkpoint_url
        base = _local(own or self._checkpoint_root)
        job = base if own else f"{base.rstrip('/')}/{order.desired.job_id}"
        return Places(
            root=str(root),
            work=str(root / "work"),
            home=str(root / "home"),
            tmp=str(_tmp_path(name)),
            output=str(root / "output"),
            checkpoints=job,
        )


def _local(path_or_url: str) -> str:
    return path_or_url.removeprefix("file://")


def _tmp_path(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"phx-{name[-20:]}"


def _remove_tree(path: str | Path) -> None:
    """Whatever a job has made of it: the library's way gives up on directories nested a thousand deep."""
    with contextlib.suppress(RecursionError):
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        subprocess.run(["/bin/rm", "-rf", "--", str(path)], check=False, capture_output=True)


def _make_new(path: Path, uid: int | None, *, mode: int) -> None:
    """A new empty directory, whatever was there before; a link there is an error and is not followed."""
    try:
        path.mkdir(mode=mode)
    except FileExistsError:
        shutil.rmtree(path)
        path.mkdir(mode=mode)
    if uid is not None:
        os.chown(path, uid, uid)


def _make_shared(path: Path, uid: int | None) -> None:
    """A directory that attempts of one job share, perhaps with other nodes, which may make it at the same moment.

    Closed to others where tenants have their own users. Its parent may be the job's own, who may put a link in its
    place: no link is followed.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        path.mkdir(mode=0o755 if uid is None else 0o700)
    except FileExistsError:
        return
    if uid is not None:
        os.chown(path, uid, uid, follow_symlinks=False)


def _make_checkpoints(path: Path, uid: int | None, *, chosen_by_job: bool) -> None:
    """A job may name any path: it is made with no more rights than the job's own user has."""
    if uid is None or not chosen_by_job:
        return _make_shared(path, uid)
    command = ["/bin/mkdir", "-p", "--", str(path)]
    made = subprocess.run(
        command,
        user=uid,
        group=uid,
        extra_groups=[],
        env={},
        cwd="/",
        timeout=_MKDIR_TIMEOUT_S,
        check=False,
        capture_output=True,
    )
    if made.returncode != 0:
        raise StartFailed(
            f"the job's user may not make checkpoint.url {path}: {made.stderr.decode(errors='replace')[-200:]}"
        )
