"""What a failed command says and how it exits. It owns the exit codes and the one line on stderr."""

from __future__ import annotations

from phalanx import errors

DONE, FAILED, INVALID, NOT_AUTHORISED, NOT_FOUND, CONFLICT, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

EXIT_CODES = """Exit codes: 0 done · 1 the job or the operation failed · 2 usage or invalid input · 3 not authorised ·
4 not found · 5 conflict · 6 server unavailable · 130 interrupted"""

_BY_ERROR: tuple[tuple[type[Exception], int], ...] = (  # the first that fits
    (errors.Unauthorized, NOT_AUTHORISED),
    (errors.Forbidden, NOT_AUTHORISED),
    (errors.NotFound, NOT_FOUND),
    (errors.Conflict, CONFLICT),
    (errors.RateLimited, UNAVAILABLE),
    (errors.Unavailable, UNAVAILABLE),
    (errors.ConnectionFailed, UNAVAILABLE),
    (errors.InvalidRequest, INVALID),
    (errors.JobFileError, INVALID),
    (errors.BundleError, INVALID),
    (errors.ConfigError, INVALID),
)

_ADVICE: tuple[tuple[type[Exception], str], ...] = (
    (errors.Unauthorized, "run `phalanx login`, or set PHALANX_TOKEN"),
    (errors.ConnectionFailed, "is it running? `phalanx login` or PHALANX_URL choose another"),
    (errors.ServerError, "try again; if it stays, give the operator the request id"),
)


class CommandError(errors.PhalanxError):
    """A command cannot go on, for a reason of its own."""

    def __init__(self, message: str, *, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.exit_code
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), FAILED)


def sentence(error: Exception) -> str:
    """The error in one line, with what to do where that is known."""
    said = " ".join(str(error).split())
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), "")
    if isinstance(error, errors.ServerError) and error.request_id:
        advice += f" {error.request_id}"
    return f"{said.rstrip('.')}; {advice}" if advice else said
