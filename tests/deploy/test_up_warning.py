"""What `phalanx up` says of nodes on which every tenant's jobs run as root, and of directories that are not there."""

from __future__ import annotations

from pathlib import Path

from phalanx_server.up_command import root_warning
from phalanx_server.up_data import mount_warnings

LOG = Path("/data/logs/agent.log")


def node(name: str, *, own_users: bool, alive: bool = True) -> dict:
    return {"name": name, "own_users": own_users, "alive": alive}


def test_nodes_whose_ranks_run_as_root_are_named() -> None:
    nodes = [node("n0", own_users=False), node("n1", own_users=True), node("n2", own_users=False)]
    warning = root_warning(nodes, LOG)
    assert "as root on n0, n2:" in warning
    assert str(LOG) in warning


def test_nothing_is_said_where_all_have_their_own() -> None:
    assert root_warning([node("n0", own_users=True), node("gone", own_users=False, alive=False)], LOG) == ""


def test_directories_that_jobs_may_mount_and_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    there, absent, file = str(tmp_path), str(tmp_path / "absent"), str(tmp_path / "file")
    assert mount_warnings([there, f"{there}:ro", f"{absent}:ro", file]) == [
        f"--allow-mount: {absent} is not there: until it is, a job that mounts it does not start",
        f"--allow-mount: {file} is not a directory: until it is, a job that mounts it does not start",
    ]
