"""Which server to talk to, and as whom. It owns the config file `~/.config/phalanx/config.json` (mode 0600, as it holds
a token) and the order of precedence: argument, environment, file. It refuses to know HTTP.

A stored token is only ever sent to the server it was stored for.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from phalanx.errors import ConfigError

HOW_TO = "run `phalanx login URL`, or set PHALANX_URL and PHALANX_TOKEN"


@dataclass(frozen=True)
class Login:
    """A server and the token to show it."""

    url: str
    token: str | None = None


def config_path() -> Path:
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "phalanx" / "config.json"


def state_path() -> Path:
    """Where the CLI remembers the job that it submitted last, by server."""
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(home).expanduser() / "phalanx" / "last-jobs.json"


def resolve(url: str | None = None, token: str | None = None) -> Login:
    """The login to use; ConfigError says what to do where there is none."""
    stored = load()
    chosen = url or os.environ.get("PHALANX_URL") or (stored.url if stored else None)
    if not chosen:
        raise ConfigError(f"no server is configured: {HOW_TO}")
    chosen = checked_url(chosen)
    own = stored.token if stored and stored.url == chosen else None
    return Login(chosen, checked_token(token or os.environ.get("PHALANX_TOKEN") or own))


def checked_url(url: str) -> str:
    """The URL without a trailing slash; ConfigError unless it is http or https with a host."""
    url = url.strip()
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # half an IPv6 address, or a port that is no number
        fits = False
    if not fits:
        raise ConfigError(f"{url!r} is no server address: expected something like http://127.0.0.1:8321")
    return url.rstrip("/")


def checked_token(token: str | None) -> str | None:
    """The token without white space around it; ConfigError, which never quotes it, where no header can carry it."""
    text = str(token or "").strip()
    if not all("!" <= character <= "~" for character in text):
        raise ConfigError(
            "the token has characters that no token has: give the text that starts with phx_, and no more"
        )
    return text or None


def is_local(url: str) -> bool:
    """Whether the server is on this machine."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def load() -> Login | None:
    """What `phalanx login` stored; None where it never ran."""
    path = config_path()
    try:
        stored = json.loads(path.read_text())
        return Login(checked_url(stored["url"]), stored.get("token"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove it and {HOW_TO}") from None


def save(login: Login) -> Path:
    """Store a login for later; nobody else can read it. ConfigError where it cannot be written."""
    path = config_path()
    try:
        write_private(path, json.dumps({"url": login.url, "token": login.token}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): set XDG_CONFIG_HOME to another directory, "
            "or PHALANX_URL and PHALANX_TOKEN in its place"
        ) from None
    return path


def write_private(path: Path, text: str) -> None:
    """Replace a file in one step; it is never readable by others, not even while it is written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600 by mkstemp
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remember_job(url: str, job_id: str) -> None:
    """Make a job what `@last` means for this server. Failing to is not worth an error."""
    try:
        write_private(state_path(), json.dumps({**_last_jobs(), url: job_id}) + "\n")
    except OSError:
        return


def last_job(url: str) -> str | None:
    return _last_jobs().get(url)


def _last_jobs() -> dict[str, str]:
    try:
        stored = json.loads(state_path().read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
