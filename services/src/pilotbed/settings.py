"""Configuration files: TOML read into a dataclass, whose fields are the keys that the file may have."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class SettingsError(Exception):
    """A configuration that cannot be used; the message names the file, the key and the remedy."""


def load(path: Path, schema: type[T]) -> T:
    """Read the TOML file ``path`` into ``schema``, a dataclass.

    A field without a default is required; a field that is itself a dataclass, or a mapping to one, is a table.

    Raises:
        SettingsError: the file cannot be read, a key is unknown or missing, or a value has the wrong type.
    """
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    try:
        return typing.cast(T, _table(schema, data, ""))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def _table(schema: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise SettingsError(f"{where} must be a table")
    fields = {field.name: field for field in dataclasses.fields(schema) if field.init}
    prefix = f"{where}." if where else ""
    if unknown := sorted(set(data) - set(fields)):
        raise SettingsError(f"unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(schema)
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SettingsError(f"key {prefix}{name} is missing")
    try:
        return schema(**values)
    except ValueError as error:
        raise SettingsError(f"{where or 'file'}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:  # one return for each kind of hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _table(hint, value, where)
    if origin is types.UnionType and type(value) in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, Mapping):
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise SettingsError(f"{where} = {value!r} must be {getattr(hint, '__name__', hint)}")
