"""The paths of a server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from onnx_autoglm.serve_errors import HttpError
from onnx_autoglm.serve_guard import Guard
from onnx_autoglm.serve_metrics import Metrics
from onnx_autoglm.serve_options import ServeOptions
from onnx_autoglm.serve_predict import Predictor
from onnx_autoglm.serve_protocol import Answer, ChatBody, CompletionBody, Drawing, parse, usage
from onnx_autoglm.serve_texts import Language, Texts

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

Endpoint = Callable[["Request"], Awaitable["Response"]]
Result = TypeVar("Result")

BODY_SECONDS = 30  # for a client to send its request
CLIENT_GONE = 499  # as nginx counts it; nobody reads the answer


@dataclasses.dataclass
class Served:
    """A model under its name: a language model, or one that predicts."""

    name: str
    options: ServeOptions
    model: Language | Predictor
    why_no_text: str = ""  # of a model that predicts
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    leaving: bool = False  # told to stop; goes on with what it has

    @property
    def well(self) -> bool:
        return not self.leaving and not (isinstance(self.model, Language) and self.model.scheduler.closed)


def create_app(served: Served, key: str | None = None) -> FastAPI:
    """The application. While it lives, a thread runs the scheduler of a language model."""
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException

    metrics = Metrics(served.model.scheduler.load if isinstance(served.model, Language) else None)
    paths = _Paths(served, metrics)
    app = FastAPI(title="onnx-autoglm", openapi_url=None, lifespan=_lifespan(served))
    routes: dict[str, tuple[str, Endpoint]] = {
        "/v1/completions": ("POST", paths.completions),
        "/v1/chat/completions": ("POST", paths.chat),
        "/predict": ("POST", paths.predict),
        "/v1/models": ("GET", paths.models),
        "/v1/models/{name:path}": ("GET", paths.model),
        "/healthz": ("GET", paths.health),
        "/metrics": ("GET", paths.metrics),
    }
    for path, (method, endpoint) in routes.items():
        app.router.add_route(path, endpoint, methods=[method])
    app.add_exception_handler(HttpError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_error)
    app.add_middleware(Guard, key=key, metrics=metrics, paths=frozenset(routes))
    return app


def _lifespan(served: Served) -> Callable[[Any], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def live(_: Any) -> AsyncIterator[None]:
        if not isinstance(served.model, Language):
            yield
            return
        scheduler = served.model.scheduler
        thread = threading.Thread(target=scheduler.run, name="scheduler")
        thread.start()
        try:
            yield
        finally:
            scheduler.stop()
            await asyncio.to_thread(thread.join)

    return live


async def _answer_error(_: Request, error: Exception) -> Response:
    """Errors of ours, and those of the framework (unknown paths, wrong methods), in one form."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    if isinstance(error, HTTPException):
        error = HttpError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    assert isinstance(error, HttpError)
    return JSONResponse(error.body(), error.status, headers=error.headers)


class _Paths:
    """One method per path."""

    def __init__(self, served: Served, metrics: Metrics) -> None:
        self._served, self._metrics = served, metrics

    async def completions(self, request: Request) -> Response:
        language = self._language()
        body = parse(CompletionBody, await self._json(request))
        self._check_name(body.model)
        prompts = [await asyncio.to_thread(language.prompt, text) for text in body.prompts()]
        return await self._write(request, prompts, body, chat=False)

    async def chat(self, request: Request) -> Response:
        language = self._language()
        body = parse(ChatBody, await self._json(request))
        self._check_name(body.model)
        prompt = await asyncio.to_thread(language.chat_prompt, body.messages)
        return await self._write(request, [prompt], body, chat=True)

    async def predict(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        model = self._served.model
        if not isinstance(model, Predictor):
            raise HttpError(404, "this is a language model: use /v1/completions")
        data, seconds = await self._json(request), self._served.options.timeout
        try:
            async with asyncio.timeout(seconds):
                return JSONResponse(await asyncio.to_thread(model.predict, data))
        except TimeoutError as error:
            raise HttpError(504, f"not done after {seconds:g} seconds", code="timeout") from error

    async def models(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._described()]})

    async def model(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        self._check_name(request.path_params["name"])
        return JSONResponse(self._described())

    async def health(self, _: Request) -> Response:
        from starlette.responses import JSONResponse

        well = self._served.well
        return JSONResponse({"status": "ok" if well else "leaving"}, 200 if well else 503)

    async def metrics(self, _: Request) -> Response:
        from starlette.responses import Response

        text, kind = self._metrics.text()
        return Response(text, media_type=kind)

    def _described(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._served.created,
            "owned_by": "onnx-autoglm",
        }

    def _language(self) -> Language:
        model = self._served.model
        if not isinstance(model, Language):
            raise HttpError(404, f"this model writes no text ({self._served.why_no_text}): use /predict")
        return model

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self._served.name):
            raise HttpError(
                404,
                f"there is no such model; there is {self._served.name}",
                param="model",
                code="model_not_found",
            )

    async def _json(self, request: Request) -> Any:
        """The body as data. Raises HttpError for one that is no JSON, too large or too slow."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        # A page in a browser may send other types to any address without asking first.
        if kind != "application/json":
            raise HttpError(415, "send JSON, with Content-Type: application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(request)
        except TimeoutError as error:
            raise HttpError(408, f"the body did not come within {BODY_SECONDS} seconds") from error
        try:
            return json.loads(body, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, "the body is not JSON") from error

    async def _body(self, request: Request) -> bytes:
        limit = self._served.options.body_bytes
        too_large = HttpError(413, f"the body is larger than {limit} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limit:
            raise too_large
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    async def _write(
        self, request: Request, prompts: list[list[int]], body: Drawing, *, chat: bool
    ) -> Response:
        from starlette.responses import JSONResponse, Response, StreamingResponse

        texts = Texts(self._language(), prompts, body, self._metrics)
        answer = Answer(self._served.name, chat=chat)
        if body.stream:
            with_usage = body.stream_options.include_usage
            return StreamingResponse(_events(texts, answer, with_usage), media_type="text/event-stream")
        found = await _unless_gone(request, _whole(texts, answer))
        return Response(status_code=CLIENT_GONE) if found is None else JSONResponse(found)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


async def _whole(texts: Texts, answer: Answer) -> dict[str, Any]:
    said, finishes, written = [""] * texts.choices, ["length"] * texts.choices, 0
    async with contextlib.aclosing(texts.pieces()) as pieces:
        async for piece in pieces:
            said[piece.index] += piece.text
            written += piece.tokens
            finishes[piece.index] = piece.finish or finishes[piece.index]
    return answer.whole(said, finishes, usage(texts.prompt_tokens, written))


async def _events(texts: Texts, answer: Answer, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events: a chunk for each piece of text, at last [DONE]. Errors come as an event too."""
    written = 0
    try:
        for index in range(texts.choices):
            start = answer.start(index)
            if start is not None:
                yield _event(start)
        async with contextlib.aclosing(texts.pieces()) as pieces:
            async for piece in pieces:
                written += piece.tokens
                if piece.text or piece.finish:
                    yield _event(answer.chunk(piece.index, piece.text, piece.finish))
    except HttpError as error:
        yield _event(error.body())
    else:
        if with_usage:
            yield _event(answer.end(usage(texts.prompt_tokens, written)))
    finally:
        texts.cancel()
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What the work comes to; None, and the work cancelled, if the client goes first."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
