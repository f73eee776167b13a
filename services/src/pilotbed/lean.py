"""What the parts that start with every call take of the standard library, without what that pulls in.

`signal`, `socket`, `contextlib` and `dataclasses` import enum, collections, functools, selectors, re and inspect: half
of the time that a call took. The C modules below the first two have the same functions.
"""

TYPE_CHECKING = False  # typing's would import typing
if TYPE_CHECKING:
    import signal
    import socket
    from typing import dataclass_transform
else:
    import _signal as signal
    import _socket as socket

    def dataclass_transform(**_):
        return lambda kind: kind


__all__ = ["Record", "signal", "socket", "suppress"]


class suppress:
    """As in contextlib."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self._kinds)


@dataclass_transform(kw_only_default=True)
class Record:
    """A class whose fields are its annotations, and their defaults its class attributes."""

    def __init__(self, **values: object) -> None:
        fields = type(self).__annotations__
        wrong = values.keys() - fields.keys()
        missing = [field for field in fields if field not in values and not hasattr(type(self), field)]
        if wrong or missing:
            raise TypeError(f"{type(self).__name__}: unknown {sorted(wrong)}, missing {missing}")
        self.__dict__.update(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and type(self) is type(other) and self.fields() == other.fields()

    __hash__ = None  # type: ignore[assignment]

    def fields(self) -> "dict[str, object]":
        """Return all fields and their values."""
        return {field: getattr(self, field) for field in type(self).__annotations__}
