"""The HTTP API: OpenAI's, with a mix in every request."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from lora_prefvec import __version__
from lora_prefvec.serving.answers import ChatCompletion, Completion
from lora_prefvec.serving.backend import Backend
from lora_prefvec.serving.bodies import JsonRoute, why_refused
from lora_prefvec.serving.desk import PREFERENCES_HEADER, Desk
from lora_prefvec.serving.errors import ApiError, ErrorBody
from lora_prefvec.serving.guard import Guard
from lora_prefvec.serving.metrics import Metrics
from lora_prefvec.serving.mixes import Menu
from lora_prefvec.serving.protocol import ChatRequest, CompletionRequest
from lora_prefvec.serving.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered as it is, or not now (429)."},
    "5XX": {"model": ErrorBody, "description": "The server or its engine failed (500, 502), or stops (503)."},
}


class Model(TypedDict):
    """An entry of `/v1/models`; `preferences` is the mix behind the name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    preferences: dict[str, float]


class Models(TypedDict):
    """The body of `/v1/models`."""

    object: Literal["list"]
    data: list[Model]


class Health(TypedDict):
    """The body of `/health`."""

    status: str


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """The server's app; `Server` runs it.

    Raises:
        InputError: presets or ranges that do not fit the backend's vectors, or names that cannot be told apart.
    """
    menu = Menu(backend.base, list(backend.names), settings.presets, settings.ranges)
    metrics = Metrics(backend)
    desk = Desk(backend, settings, menu, metrics)
    started = int(time.time())

    app = FastAPI(
        title="prefvec serve",
        version=__version__,
        description="OpenAI's API over a base with preference vectors; every request brings its own mix.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.settings, app.state.backend = settings, backend
    app.state.stopping, app.state.inside = False, 0
    app.router.route_class = JsonRoute
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    token = [Security(HTTPBearer(auto_error=False))] if settings.token else []

    @app.post("/v1/chat/completions", responses=replies_of(ChatCompletion), dependencies=token)
    async def chat_completions(body: ChatRequest) -> Response:
        """Reply to a conversation."""
        return await desk.answer(body)

    @app.post("/v1/completions", responses=replies_of(Completion), dependencies=token)
    async def completions(body: CompletionRequest) -> Response:
        """Continue a text."""
        return await desk.answer(body)

    def described(name: str) -> Model:
        mix = menu.mix(name, None, None)
        return {"id": name, "object": "model", "created": started, "owned_by": "lora-prefvec", "preferences": mix}

    @app.get("/v1/models", dependencies=token)
    async def models() -> Models:
        """The base, the presets and the vectors: every model with a name of its own."""
        return {"object": "list", "data": [described(name) for name in menu.models()]}

    @app.get("/v1/models/{model:path}", dependencies=token)
    async def model(model: str) -> Model:
        """One model; a mix such as `base+helpful=0.5` is one too."""
        return described(model)

    ill = {"model": Health, "description": "No reply can be written at present."}

    @app.get("/health", responses={200: {"model": Health}, 503: ill})
    async def health() -> Response:
        """Whether replies can be written; asks for no token."""
        trouble = "stopping" if app.state.stopping else await backend.trouble()
        return JSONResponse({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/metrics", dependencies=token, response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """For Prometheus; asks for the token, as it tells what is asked and how much."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def replies_of(whole: type) -> dict[int | str, dict[str, Any]]:
    """How a response with replies is described: whole as JSON, or streamed as server-sent events."""
    data = {"type": "string", "description": "A part of the response as JSON, or [DONE]."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    events = {"itemSchema": event, "example": 'data: {"id":"..."}\n\ndata: [DONE]\n\n'}
    mixed = {"schema": {"type": "string"}, "description": "The mix that was used, as JSON."}
    return {200: {"model": whole, "content": {"text/event-stream": events}, "headers": {PREFERENCES_HEADER: mixed}}}


async def http_error(_: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    problem = {404: "There is no such route here.", 405: "This route is not for this method."}
    return ApiError(
        error.status_code, problem.get(error.status_code, str(error.detail)), headers=error.headers
    ).response()


async def invalid(request: Request, error: RequestValidationError) -> Response:
    """A body that is JSON and not what is asked for."""
    fields = CompletionRequest.model_fields if request.url.path == "/v1/completions" else ChatRequest.model_fields
    return why_refused(error, list(fields)).response()
