"""Settings in TOML files: frozen models of their sections, and one line for what is wrong with a file."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from fedflame.errors import UserError
from fedflame.reading import read_toml, require_plain, shown

Model = TypeVar("Model", bound=BaseModel)
File = TypeVar("File", bound="SettingsFile")


class Section(BaseModel):
    """One table of a file; the docstring of a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number belongs: Python would take it for 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise ValueError("must be a number")
        return value


class SettingsFile(Section):
    """A whole file that speaks of other files beside it."""

    folder: Path = Path()
    """Where the file is; no key of it."""


def load_file(model: type[File], path: Path, what: str) -> File:
    """Read a file.

    Raises:
        UserError: it is missing or broken, lacks a key, or has one that is unknown or a value that is not
            allowed; the line begins with `what` and the path.
    """
    values = read_toml(path, what)
    refuse_unknown_keys(values, model, f"{what} {path}")
    empty: dict[str, Any] = {name: {} for name in _sections(model)}
    return validated(model, {**empty, **values, "folder": path.absolute().parent}, f"{what} {path}")


def validated(model: type[Model], values: dict[str, Any], what: str) -> Model:
    """The values as a model; UserError names `what`, and the key that is missing or has a wrong value."""
    try:
        require_plain(values)
        _require_no_nul(values)
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{what}: {where} is missing") from error
        raise UserError(f"{what}: {where} = {shown(first['input'])}: {first['msg']}") from error
    except ValueError as error:
        raise UserError(f"{what}: {error}") from error


def _require_no_nul(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a text that can be no path and no name, because the system ends it at a NUL."""
    for key, value in flat(values).items():
        if "\0" in str(value):
            raise ValueError(f"{key} = {shown(value)}: must have no NUL")


def keys_of(model: type[BaseModel]) -> list[str]:
    """Every key in flat form, such as `data.alpha`."""
    sections, keys = _sections(model), list[str]()
    for name in model.model_fields:
        if name in sections:
            keys += [f"{name}.{key}" for key in sections[name].model_fields]
        elif name not in SettingsFile.model_fields:
            keys.append(name)
    return keys


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"alpha": 0.5}}` and `{"data.alpha": 0.5}` alike as `{"data.alpha": 0.5}`."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def refuse_unknown_keys(values: Mapping[str, Any], model: type[BaseModel], what: str) -> None:
    """Raises UserError at the first key that the model does not have."""
    valid, sections = keys_of(model), _sections(model)
    for name, value in values.items():
        if name in sections and not isinstance(value, dict):
            raise UserError(f"{what}: {name} is a section; write {name}.key=value")
        inner = isinstance(value, dict) and not _has_names_of_users(model, name)
        for key in [f"{name}.{key}" for key in value] if inner else [name]:
            refuse_unknown_key(key, valid, what)


def refuse_unknown_key(key: str, valid: Collection[str], what: str) -> None:
    """Raises UserError with the nearest valid key where `key` is none of them."""
    if key not in valid:
        raise UserError(f"{what}: unknown key {key!r}; the nearest valid key is {_nearest(key, valid)!r}")


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {name: field.annotation for name, field in model.model_fields.items()}
    return {name: of for name, of in found.items() if isinstance(of, type) and issubclass(of, BaseModel)}


def _has_names_of_users(model: type[BaseModel], name: str) -> bool:
    """Whether the keys below are the user's own, such as those of models that a site allows."""
    return name in model.model_fields and get_origin(model.model_fields[name].annotation) is dict


def _nearest(key: str, valid: Collection[str]) -> str:
    """The most similar key, of those that have its letters in order, as `lr` is in `learning_rate`.

    Where there is none: of those, in any section, whose last part contains that of `key`, as `lora_dropout`
    has `dropout`. One or two letters are in too many.
    """
    name = key.rpartition(".")[2]
    longer = [other for other in valid if _abbreviates(key, other)]
    if not longer and len(name) > 2:
        longer = [other for other in valid if name in other.rpartition(".")[2]]
    return difflib.get_close_matches(key, longer or valid, n=1, cutoff=0.0)[0]


def _abbreviates(short: str, name: str) -> bool:
    letters = iter(name)
    return all(letter in letters for letter in short)
