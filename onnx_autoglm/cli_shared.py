"""What all commands share: options from fields, a console, a progress line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import BaseModel, BeforeValidator

from onnx_autoglm.options import Flag, flags
from onnx_autoglm.validation import validated

Kind = TypeVar("Kind", bound=BaseModel)


def option_of(flag: Flag) -> click.Option:
    """The command-line option of a field: its type, help text and default."""
    settings: dict[str, Any] = {"help": flag.field.description, "metavar": flag.metavar, "default": None}
    kind, default = flag.field.annotation, flag.field.default
    if kind == (bool | None):
        return click.Option([f"{flag.name}/--no-{flag.name[2:]}", flag.keyword], **settings)
    if kind is bool and default is True:
        settings["help"] = f"{flag.field.description}  [default: yes]"
        return click.Option([f"{flag.name}/--no-{flag.name[2:]}", flag.keyword], **settings)
    if kind is bool:
        return click.Option(
            [flag.name, flag.keyword], is_flag=True, help=flag.field.description, default=None
        )
    if get_origin(kind) is Literal:
        settings["type"] = click.Choice([str(value) for value in get_args(kind)])
    elif get_origin(kind) is tuple or flag.metavar == "KIND=FRACTION":
        settings["multiple"] = True
    elif kind in (int, float) and not any(isinstance(item, BeforeValidator) for item in flag.field.metadata):
        settings["type"] = kind
    if isinstance(default, str | int | float):
        settings["help"] = f"{flag.field.description}  [default: {default}]"
    return click.Option([flag.name, flag.keyword], **settings)


def from_flags(kind: type[Kind], given: Mapping[str, Any]) -> Kind:
    """Options of a command without sections, from keywords named as its flags.

    Raises UserError with one line per value that is not allowed.
    """
    known = {flag.keyword: flag.path[-1] for flag in flags(kind)}
    data = {known[keyword]: value for keyword, value in given.items() if value not in (None, ())}
    return validated(kind, data, "options")


def console(file: Any) -> Any:
    from rich.console import Console

    # A pipe has no width of its own; tables must not be folded there.
    return Console(file=file, width=None if file.isatty() else 160)


@contextlib.contextmanager
def progress_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A spinner with the step that runs, on a terminal; nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task("start")
        yield lambda step: bar.update(task, description=step)
