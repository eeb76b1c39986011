"""Chats as prompts, by the template that lies beside a model (`chat_template.jinja` or `tokenizer_config.json`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onnx_autoglm.errors import UserError
from onnx_autoglm.model_folder import ModelFolder, token_text

if TYPE_CHECKING:
    import jinja2

Render = Callable[[list[dict[str, str]]], str]
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Refusal(Exception):
    """The template refuses these messages."""


def chat_template(folder: ModelFolder) -> Render | None:
    """Turns messages (role and content) into a prompt; None without a template.

    The template runs in a sandbox. What it returns raises Refusal where the template refuses messages.

    Raises UserError for a template that cannot be read, or without jinja2.
    """
    source = _source(folder)
    if source is None:
        return None
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("a chat template needs jinja2: pip install 'onnx-autoglm[serve]'") from error
    # As transformers sets it up: block tags leave no blank lines.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _now
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"cannot read the chat template beside the model: {error}") from error
    config = folder.read("tokenizer_config.json")
    tokens = {name: text for name in TOKENS if (text := token_text(config.get(name))) is not None}
    return lambda messages: _render(template, messages, tokens)


def _source(folder: ModelFolder) -> str | None:
    path = folder.find("chat_template.jinja")
    if path is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    found = folder.read("tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _render(template: jinja2.Template, messages: list[dict[str, str]], tokens: dict[str, str]) -> str:
    import jinja2

    try:
        return template.render(messages=messages, add_generation_prompt=True, **tokens)
    except jinja2.TemplateError as error:
        raise Refusal(str(error)) from error
    except (TypeError, ValueError, KeyError) as error:
        raise Refusal("it cannot be applied to these messages") from error


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _now(form: str) -> Any:
    import datetime

    return datetime.datetime.now().strftime(form)
