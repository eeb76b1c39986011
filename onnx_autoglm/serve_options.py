"""Options of `serve`: the command line and the documentation derive from these fields."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from onnx_autoglm.generate_options import LanguageOptions


class ServeOptions(LanguageOptions):
    """Where a server listens, who may use it, and how much it takes on."""

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on; the default is reached from this machine only. Set an API key before "
        "you open it to others.",
    )
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    name: str | None = Field(
        default=None,
        description="The name of the model for clients. By default that of its folder or file.",
    )
    api_key_file: Path | None = Field(
        default=None,
        description="A file with the key that clients must send (Authorization: Bearer KEY), on its first line. "
        "/healthz is open without.",
        json_schema_extra={"metavar": "PATH"},
    )
    slots: int = Field(default=8, ge=1, description="Requests that are decoded together.")
    queue: int = Field(
        default=64,
        ge=0,
        description="Requests that may wait beside them; more are told to come back later (429).",
    )
    prompt_piece: int = Field(
        default=256,
        ge=1,
        description="Tokens of new prompts that are read between two steps of the requests that write.",
    )
    max_tokens: int = Field(
        default=1024,
        ge=1,
        description="The most tokens that one request may ask for; its own default is 128.",
    )
    choices: int = Field(
        default=16, ge=1, description="The most continuations of one request: its prompts times its n."
    )
    timeout: float = Field(
        default=300.0, gt=0, description="Seconds that a request may take, waiting included."
    )
    body_bytes: int = Field(default=4 << 20, ge=1024, description="The largest body of a request, in bytes.")
    drain_seconds: int = Field(
        default=30,
        ge=0,
        description="Seconds that requests may go on for after SIGTERM; then they are cut off.",
    )
