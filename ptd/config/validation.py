"""Check values and keys that pydantic does not check, and turn its errors into messages for users."""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from pydantic import (
    BaseModel,
    TypeAdapter,
    ValidationError,
)

from ptd.errors import UserError


def parse_method(section: dict[str, Any]) -> Any:
    """Build the method's config dataclass from ``{name: …, **settings}``; raises `UserError`."""
    from ptd.methods import method  # imports torch, which the other sections do not need

    if not isinstance(section.get("name"), str):
        raise UserError("method.name: is missing; give the tuning method's name, e.g. method: {name: prefix}")
    cls = method(section["name"]).config
    settings = {key: value for key, value in section.items() if key != "name"}
    known = [field.name for field in dataclasses.fields(cls)]
    for key in settings:
        if key not in known:
            raise UserError(unknown_key(f"method.{key}", str(key), ["name", *known]))
    for field in dataclasses.fields(cls):
        try:
            refuse_truth(settings.get(field.name), str(field.type))
        except ValueError as error:
            raise UserError(f"method.{field.name}: {error}") from error
    try:
        # Validates each field's type; the dataclass itself stays free of pydantic.
        return TypeAdapter(cls).validate_python(settings)
    except ValidationError as error:
        raise UserError("\n".join(explained(error, None, prefix="method"))) from error


def refuse_truth(value: Any, annotation: str) -> None:
    """Raise `ValueError` for a boolean in a field that takes numbers, where Python would read True as 1."""
    if isinstance(value, bool) and "bool" not in annotation and ("int" in annotation or "float" in annotation):
        raise ValueError(f"got {value}; a number is needed")


def repair_scientific(value: Any) -> Any:
    """Turn strings such as ``1e-2`` into numbers: YAML 1.1 reads a number without a dot as a string."""
    if isinstance(value, dict):
        return {key: repair_scientific(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


_SCIENTIFIC = re.compile(r"[+-]?[0-9]+e[+-]?[0-9]+", re.IGNORECASE)


def _shown(value: Any) -> str:
    """Return the ``repr`` of a value for a message, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python converts no integer of more than 4300 digits to text
        text = f"{type(value).__name__} with a very long number"
    return text if len(text) <= 200 else f"{text[:199]}…"


def explained(error: ValidationError, model: type[BaseModel] | None, prefix: str = "") -> list[str]:
    lines = []
    for item in error.errors():
        # After "deepspeed" the location holds pydantic's labels of the possible types, not keys.
        path = list(item["loc"][:1] if item["loc"][:1] == ("deepspeed",) else item["loc"])
        dotted = ".".join([prefix, *map(str, path)] if prefix else map(str, path))
        if item["type"] == "extra_forbidden":
            lines.append(unknown_key(dotted, str(path[-1]), _keys_of(model, path[:-1])))
        elif item["type"] == "missing":
            lines.append(f"{dotted}: is missing")
        elif item["type"] == "value_error":
            lines.append(f"{dotted}: {item['ctx']['error']}" if dotted else str(item["ctx"]["error"]))
        else:
            lines.append(f"{dotted}: got {_shown(item['input'])}; {item['msg'][0].lower()}{item['msg'][1:]}")
    return lines


def _keys_of(model: type[BaseModel] | None, path: list[Any]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part)) if model is not None else None
        annotation = field.annotation if field is not None else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return list(model.model_fields) if model is not None else []


def unknown_key(dotted: str, key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"{dotted}: unknown key; did you mean {'.'.join([*dotted.split('.')[:-1], near[0]])}?"
    return f"{dotted}: unknown key; valid keys: {', '.join(sorted(known))}"
