"""`serve`: loads a model, listens, and leaves in good order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from onnx_autoglm import modelfile
from onnx_autoglm.chat_template import chat_template
from onnx_autoglm.data_text import open_tokenizer
from onnx_autoglm.decode import Decoder
from onnx_autoglm.errors import UserError
from onnx_autoglm.feed_roles import token_roles
from onnx_autoglm.generate import CONTEXT, Generator
from onnx_autoglm.model_folder import ModelFolder, parse_ends
from onnx_autoglm.passes.canonicalize import canonicalize
from onnx_autoglm.rows import RowEngine
from onnx_autoglm.serve_app import Served, create_app
from onnx_autoglm.serve_options import ServeOptions
from onnx_autoglm.serve_predict import Predictor
from onnx_autoglm.serve_scheduler import Scheduler
from onnx_autoglm.serve_texts import Language

SHORTEST_KEY = 8
LAST_WORDS = 5  # seconds to tell clients that their request is cut off


def serve(model: Path, options: ServeOptions) -> None:
    """Serves a model until SIGTERM or SIGINT; then goes on with what it has for `drain_seconds` at most.

    Raises UserError: a package is missing, the port is taken, the model does not load.
    """
    _require_packages()
    key = None if options.api_key_file is None else read_key(options.api_key_file)
    with _bound(options.host, options.port) as listener:
        served = load(model, options)
        listener.listen()  # from here on clients may come; they are answered in a moment
        _say(served, listener, key)
        _run(served, listener, key)


def load(path: Path, options: ServeOptions) -> Served:
    """The model, ready to be served: as a language model if it can write, else to predict.

    Raises UserError if it, or what lies beside it, cannot be loaded.
    """
    model = canonicalize(modelfile.open_model(path))
    name = options.name or (path.parent.resolve().name if path.stem == "model" else path.stem)
    why = "it takes no tokens"
    if token_roles(model) is not None:
        try:
            decoder = Decoder(model, threads=options.threads)
        except UserError as error:
            why = str(error)
        else:
            return Served(name, options, _language(path, decoder, options))
    return Served(
        name, options, Predictor(model, threads=options.threads, queue=options.queue), why_no_text=why
    )


def _language(path: Path, decoder: Decoder, options: ServeOptions) -> Language:
    folder = ModelFolder(path, options.tokenizer)
    words = None if folder.tokenizer is None else open_tokenizer(folder.tokenizer)
    ends = parse_ends(options.eos, words) or folder.ends(words)[0]
    engine = RowEngine(decoder)
    generator = Generator(engine, words, ends=ends, context=options.context or folder.context() or CONTEXT)
    scheduler = Scheduler(engine, slots=options.slots, queue=options.queue, piece=options.prompt_piece)
    return Language(generator, scheduler, chat_template(folder), options)


def read_key(path: Path) -> str:
    """The API key in a file. Raises UserError if there is none, or one that is easily guessed."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the API key from {path}: {error}") from error
    key = lines[0].strip() if lines else ""
    if len(key) < SHORTEST_KEY:
        raise UserError(
            f"{path} must hold an API key of at least {SHORTEST_KEY} characters on its first line"
        )
    return key


def _require_packages() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn

        assert fastapi and prometheus_client and uvicorn
    except ImportError as error:
        raise UserError(
            f"serving needs the package {error.name}: pip install 'onnx-autoglm[serve]'"
        ) from error


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that has the port but does not listen yet: a port in use is known before the model is loaded."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {host} is no address: {error.strerror}") from error
    with socket.socket(family, kind, number) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host} port {port}: {error.strerror}; choose another with --port, or --port 0"
            ) from error
        yield listener


def _say(served: Served, listener: socket.socket, key: str | None) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {served.name} on http://{shown}:{port}", flush=True)
    if isinstance(served.model, Language):
        engine = served.model.scheduler.engine
        if engine.alone:
            print(f"note: requests are not decoded together: {engine.alone}", flush=True)
        if not served.model.generator.ends:
            print("note: nothing says which token ends a text: pass --eos", flush=True)
    else:
        print(f"note: only /predict is served: {served.why_no_text}", flush=True)
    if key is None and not _is_loopback(host):
        print("warning: anybody who reaches this address may use it: pass --api-key-file", file=sys.stderr)


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")


def _run(served: Served, listener: socket.socket, key: str | None) -> None:
    import uvicorn
    from uvicorn.config import LOGGING_CONFIG

    class Server(uvicorn.Server):
        """Ends with code 0 after a signal; the base class raises it again."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # Not loop.add_signal_handler: its pipe also wakes the loop for each token, and a signal that finds it full
            # is lost.
            loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
            before = [
                signal.signal(number, lambda *_: loop.call_soon_threadsafe(self.leave)) for number in numbers
            ]
            yield
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

        def leave(self) -> None:
            """The first signal lets requests finish for a while, the second does not."""
            self.force_exit, self.should_exit = served.leaving, True
            served.leaving = True
            if isinstance(served.model, Language):
                served.model.scheduler.close()
                wait = 0 if self.force_exit else served.options.drain_seconds
                asyncio.get_running_loop().call_later(wait, served.model.scheduler.stop)

    config = uvicorn.Config(
        create_app(served, key),
        # asyncio warns of each piece that a client who has just gone does not take: no news, and there are many.
        log_config={
            **LOGGING_CONFIG,
            "loggers": {**LOGGING_CONFIG["loggers"], "asyncio": {"level": "ERROR"}},
        },
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=served.options.drain_seconds + LAST_WORDS,
    )
    Server(config).run(sockets=[listener])
