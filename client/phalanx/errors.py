"""The errors that the SDK raises. It owns their tree and how a problem+json answer becomes one of them; it refuses to
know how they are shown (the CLI does that) and which of them are retried (`retry.py` does).

    PhalanxError
    ├── ConfigError            no server is configured, or the config file cannot be read
    ├── JobFileError           a job file is malformed; `path`, `line` and `column` say where
    ├── BundleError            the working directory cannot be packed
    ├── OutputError            a file that a job left cannot be written here
    ├── ProtocolError          the answer is not what the API promises (a proxy, or another version)
    ├── ConnectionFailed       nothing answered
    ├── WaitTimeout            a job did not end within the time given to `wait`
    └── ApiError               the server refused: `status`, `code`, `detail`, `errors`, `request_id`
        ├── InvalidRequest     400, 413, 415, 422, 428
        ├── Unauthorized       401 (code `token_expired` where the token was good once)
        ├── Forbidden          403
        ├── NotFound           404
        ├── Conflict           409, 412
        ├── RateLimited        429, still so after the retries
        └── ServerError        5xx
            └── Unavailable    502, 503, 504, still so after the retries
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phalanx.units import duration_text


class PhalanxError(Exception):
    """Anything that this package raises on purpose. Its text is one sentence for a person."""


class ConfigError(PhalanxError):
    pass


class BundleError(PhalanxError):
    pass


class OutputError(PhalanxError):
    pass


class ProtocolError(PhalanxError):
    pass


class ConnectionFailed(PhalanxError):
    pass


class WaitTimeout(PhalanxError):
    """`still` names what was waited for, and says what it still does."""

    def __init__(self, still: str, waited_s: float) -> None:
        self.still = still
        super().__init__(f"{still} after {duration_text(waited_s)}")


class JobFileError(PhalanxError):
    """`line` and `column` count from 1; 0 where the place is not known."""

    def __init__(self, message: str, *, path: str = "", line: int = 0, column: int = 0) -> None:
        self.path, self.line, self.column = path, line, column
        place = ":".join([path] + [str(n) for n in (line, column) if n]) if path else ""
        super().__init__(f"{place}: {message}" if place else message)


@dataclass(frozen=True)
class FieldError:
    """One thing that is wrong with a request body: `field` is a dotted path into it."""

    field: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        said = f"{self.field}: {self.message}" if self.field else self.message
        return f"{said} ({self.hint})" if self.hint else said


class ApiError(PhalanxError):
    """The server's refusal, as its problem+json says it."""

    def __init__(
        self,
        *,
        status: int,
        code: str,
        title: str = "",
        detail: str = "",
        errors: tuple[FieldError, ...] = (),
        request_id: str = "",
    ) -> None:
        self.status, self.code, self.title, self.detail = status, code, title, detail
        self.errors, self.request_id = errors, request_id
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        if self.errors:
            return "; ".join(str(error) for error in self.errors)
        return self.detail or self.title or f"the server answered {self.status}"


class InvalidRequest(ApiError):
    pass


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    pass


class RateLimited(ApiError):
    pass


class ServerError(ApiError):
    pass


class Unavailable(ServerError):
    pass


_BY_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: Conflict,
    429: RateLimited,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}


def kind_of(status: int) -> type[ApiError]:
    """The class of error for an HTTP status ≥ 400."""
    return _BY_STATUS.get(status) or (ServerError if status >= 500 else InvalidRequest)


def from_problem(status: int, problem: Any, *, request_id: str = "") -> ApiError:
    """The error for a refused request. `problem` is the decoded body; anything but an object counts as empty."""
    body = problem if isinstance(problem, dict) else {}
    return kind_of(status)(
        status=status,
        code=str(body.get("code") or f"http_{status}"),
        title=str(body.get("title") or ""),
        detail=str(body.get("detail") or ""),
        errors=tuple(_field_error(item) for item in body.get("errors") or [] if isinstance(item, dict)),
        request_id=str(body.get("request_id") or request_id),
    )


def _field_error(item: dict[str, Any]) -> FieldError:
    return FieldError(str(item.get("field") or ""), str(item.get("message") or ""), str(item.get("hint") or ""))
