"""PostgreSQL's 64-bit transaction ids, which SQLAlchemy does not know: ints in Python."""

from typing import Any

from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType


class Xid8(UserDefinedType[int]):
    """The column type `xid8`; it never wraps around."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


ischema_names["xid8"] = Xid8  # so that reflection finds it, which the comparison with the migrations rests on
