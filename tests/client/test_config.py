"""Which server and token are used, and that a token stays with its server."""

from __future__ import annotations

from pathlib import Path

import pytest
from phalanx import config
from phalanx.config import Login, resolve
from phalanx.errors import ConfigError

STORED = Login("http://stored.test", "phx_stored")


def test_argument_before_environment_before_file(monkeypatch: pytest.MonkeyPatch) -> None:
    config.save(STORED)
    assert resolve() == STORED
    monkeypatch.setenv("PHALANX_URL", "http://env.test/")
    monkeypatch.setenv("PHALANX_TOKEN", "phx_env")
    assert resolve() == Login("http://env.test", "phx_env")
    assert resolve("http://arg.test", "phx_arg") == Login("http://arg.test", "phx_arg")


def test_a_stored_token_is_not_sent_to_another_server() -> None:
    config.save(STORED)
    assert resolve("http://other.test").token is None
    assert resolve("http://stored.test/").token == "phx_stored"


def test_the_file_is_private_from_the_start_and_is_replaced_whole() -> None:
    path = config.save(STORED)
    config.save(Login("http://new.test", None))
    assert config.load() == Login("http://new.test", None)
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"url": 7}', '{"url": "nonsense"}'])
def test_a_broken_file_says_what_to_do(text: str) -> None:
    path = config.save(STORED)
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config.json cannot be read .*: remove it and run `phalanx login"):
        resolve()


@pytest.mark.parametrize("url", ["nonsense", "ftp://a", "http://", "https:///x", "http://h:abc", "http://[::1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is no server address"):
        resolve(url)


@pytest.mark.parametrize("text", ["phx_x\n", " phx_x ", "\tphx_x\r\n"])
def test_white_space_around_a_token_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PHALANX_TOKEN", text)
    assert resolve("http://a.test") == resolve("http://a.test", text) == Login("http://a.test", "phx_x")
    assert resolve("http://a.test\n", "phx_x").url == "http://a.test"


@pytest.mark.parametrize("text", ["phx_seçret", "phx_secret\nX-Admin: 1", "phx secret", "phx_secret\x00"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(ConfigError, match="characters that no token has") as raised:
        resolve("http://a.test", text)
    assert "cret" not in str(raised.value)


def test_a_directory_that_cannot_be_written_says_what_to_do(own_home: Path) -> None:
    (own_home / "config").write_text("a file where a directory should be")
    with pytest.raises(ConfigError, match=r"config.json cannot be written \(Not a directory\): set XDG_CONFIG_HOME"):
        config.save(STORED)


def test_the_last_job_is_kept_by_server() -> None:
    config.remember_job("http://a", "job_1")
    config.remember_job("http://b", "job_2")
    config.remember_job("http://a", "job_3")
    assert (config.last_job("http://a"), config.last_job("http://b"), config.last_job("http://c")) == (
        "job_3",
        "job_2",
        None,
    )
    config.state_path().write_text("{")
    assert config.last_job("http://a") is None


def test_the_proxy_of_the_environment_is_not_for_this_machine() -> None:
    assert [config.is_local(f"http://{host}:1") for host in ("127.0.0.1", "localhost", "[::1]")] == [True] * 3
    assert not config.is_local("http://phalanx.example")
