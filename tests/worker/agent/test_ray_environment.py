"""Finding the local Ray cluster by the file it writes, without importing Ray."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from phalanx_worker.agent.ray_environment import LOOPBACK_SETTINGS, prepare, read_ray_file


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))


def write(path: Path, pid: int) -> None:
    path.write_text(json.dumps({"address": "127.0.0.1:4711", "token_path": "/data/ray-token", "pid": pid}))


def test_the_file_of_a_running_cluster_gives_address_and_token(tmp_path: Path) -> None:
    write(tmp_path / "ray.json", os.getpid())
    assert read_ray_file(tmp_path / "ray.json") == "127.0.0.1:4711"
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN_PATH"]) == ("token", "/data/ray-token")


def test_the_file_of_a_cluster_that_was_killed_does_not_count(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    write(tmp_path / "ray.json", ended.pid)
    with pytest.raises(TimeoutError, match="is it up"):
        read_ray_file(tmp_path / "ray.json", timeout_s=0.1)


def test_the_file_of_another_users_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    write(tmp_path / "ray.json", 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", refuse)
        assert read_ray_file(tmp_path / "ray.json") == "127.0.0.1:4711", "its process may be there all the same"
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(PermissionError, match="not yours"):
            read_ray_file(tmp_path / "ray.json")


def test_only_a_cluster_on_loopback_gets_its_settings() -> None:
    before = dict(os.environ)
    prepare("10.0.0.1:6379")
    assert dict(os.environ) == before
    prepare("127.0.0.1:6379")
    assert os.environ.items() >= LOOPBACK_SETTINGS.items()
