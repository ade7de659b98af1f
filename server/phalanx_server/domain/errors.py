"""What an action may refuse, and why: the errors that reach a user.

Owns the tree of errors and their stable codes. Refuses to know HTTP: the API maps a code to a status (RFC 9457).

    PhalanxError
    ├── Invalid               invalid_request: a field has a value that cannot be
    │   ├── UnknownField      unknown_field: a field does not exist
    │   └── Impossible        impossible_request: no node that is known could ever hold it
    ├── NotFound              not_found: it does not exist, or the caller may not know that it does
    ├── Forbidden             forbidden
    ├── Conflict              conflict: the state of things does not allow it now
    │   ├── IdempotencyConflict   idempotency_conflict: the key was used with another body
    │   └── Superseded        superseded: a newer agent has taken over
    ├── EtagMismatch          etag_mismatch: it has changed since it was read
    └── Unavailable           unavailable: try again shortly
        └── StorageUnavailable    storage_unavailable: only the files' storage is away or full; all else can go on
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """What is wrong with one field (`jobs[3].resources.replicas`; "" = the whole), and what to do about it."""

    field: str
    message: str
    hint: str | None = None


class PhalanxError(Exception):
    """Base. `detail` is a sentence that names the value and says what to do."""

    code: ClassVar[str] = "internal"

    def __init__(self, detail: str, *, errors: Sequence[FieldError] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)


class Invalid(PhalanxError):
    code = "invalid_request"

    @classmethod
    def field(cls, field: str, message: str, hint: str | None = None) -> "Invalid":
        """One field is wrong."""
        return cls.fields([FieldError(field, message, hint)])

    @classmethod
    def fields(cls, errors: Sequence[FieldError]) -> "Invalid":
        """Several are wrong; the first one makes the sentence."""
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        head = f"{first.field}: {first.message}" if first.field else first.message
        hint = f"; {first.hint}" if first.hint else ""
        return cls(f"{head}{hint}{more}", errors=errors)


class UnknownField(Invalid):
    code = "unknown_field"


class Impossible(Invalid):
    code = "impossible_request"


class NotFound(PhalanxError):
    code = "not_found"


class Forbidden(PhalanxError):
    code = "forbidden"


class Conflict(PhalanxError):
    code = "conflict"


class IdempotencyConflict(Conflict):
    code = "idempotency_conflict"


class Superseded(Conflict):
    code = "superseded"


class EtagMismatch(PhalanxError):
    code = "etag_mismatch"


class Unavailable(PhalanxError):
    code = "unavailable"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"
