"""Options from plain data, with mistakes as lines that a user can read."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from onnx_autoglm.errors import UserError

Kind = TypeVar("Kind", bound=BaseModel)


def flag_of(name: str, metavar: str | None = None) -> dict[str, Any]:
    """What a field says of its place on the command line (`json_schema_extra`)."""
    return {"flag": name, "metavar": metavar}


def validated(kind: type[Kind], data: dict[str, Any], where: str) -> Kind:
    """Options from plain data. Raises UserError with one line per mistake."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            path = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {path}: {message}" if path else f"{where}: {message}")
        raise UserError("\n".join(lines)) from error
