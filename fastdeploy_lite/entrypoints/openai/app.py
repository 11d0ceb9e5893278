"""The FastAPI application: routes of the service, of its metrics and of its controller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from fastdeploy_lite import envs
from fastdeploy_lite import version as package_version
from fastdeploy_lite.entrypoints.openai import errors, web
from fastdeploy_lite.entrypoints.openai.bodies import (
    BoundedBody,
    body_of,
    decode,
    document_bodies,
    parse,
)
from fastdeploy_lite.entrypoints.openai.format_chat import ChatFormat
from fastdeploy_lite.entrypoints.openai.format_completion import CompletionFormat
from fastdeploy_lite.entrypoints.openai.format_responses import ResponsesFormat
from fastdeploy_lite.entrypoints.openai.handler import Handler
from fastdeploy_lite.entrypoints.openai.middleware import (
    OPEN_PATHS,
    Admission,
    ApiKeys,
    App,
    Gate,
    KnownRoutes,
    Observer,
    RootPath,
)
from fastdeploy_lite.entrypoints.openai.protocol import (
    AbortRequest,
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    DetokenizeRequest,
    ErrorResponse,
    ModelInfo,
    ModelList,
    TokenizeRequest,
)
from fastdeploy_lite.entrypoints.openai.responses_protocol import ResponsesRequest
from fastdeploy_lite.entrypoints.openai.service import Service
from fastdeploy_lite.entrypoints.openai.serving_models import list_models
from fastdeploy_lite.entrypoints.openai.tokenization import tokenized
from fastdeploy_lite.entrypoints.openai.tracing import Tracer
from fastdeploy_lite.metrics.metrics import CONTENT_TYPE, ServerMetrics
from fastdeploy_lite.utils.errors import RequestError, quote

NOT_HEALTHY = "Worker Service Not Healthy"
WEIGHTS_DISABLED = "Dynamic Load Weight Disabled."
_STATUSES = {
    400: "The request is at fault",
    401: "The API key is missing or wrong",
    408: "The body arrived too slowly",
    404: "There is no such thing here",
    413: "The body is too large",
    429: "Too many requests at the same time",
    500: "The service failed, or the request waited too long",
    503: "The engine is starting, draining or gone",
}
_BODIES = (
    ChatCompletionRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, AbortRequest,
    ResponsesRequest,
)  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorResponse}
    if status == 400
    else {"description": text}
    for status, text in _STATUSES.items()
}


@dataclass(frozen=True, slots=True)
class Application:
    """The service's application inside its middleware.

    Attributes:
        asgi: What the HTTP server runs.
        admission: Counts requests in flight.
    """

    asgi: App
    admission: Admission


@dataclass(frozen=True, slots=True)
class Cors:
    """Which pages of other origins may call the service; nobody by default.

    Attributes:
        origins: Allowed origins, or "*".
        credentials: Whether cookies and keys may be sent along.
        methods: Allowed methods.
        headers: Allowed headers.
    """

    origins: Sequence[str] = ()
    credentials: bool = False
    methods: Sequence[str] = ("*",)
    headers: Sequence[str] = ("*",)

    def around(self, app: App) -> App:
        """`app`, answering preflights and marking answers."""
        if not self.origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=self.origins,
            allow_credentials=self.credentials,
            allow_methods=self.methods,
            allow_headers=self.headers,
            expose_headers=["x-request-id"],
        )


@dataclass(frozen=True, slots=True)
class Exposure:
    """To whom the ports of a service answer.

    Attributes:
        api_keys: Accepted keys; empty for none.
        cors: Pages of other origins.
        root_path: Prefix of all paths behind a proxy.
        tracer: Makes a span of every request; None for none.
    """

    api_keys: Sequence[str] = ()
    cors: Cors = Cors()
    root_path: str = ""
    tracer: Tracer | None = None

    def around(self, app: App, metrics: ServerMetrics, open_paths: frozenset[str]) -> App:
        """`app` behind keys, cross-origin rules and the observer."""
        guarded: App = ApiKeys(app, self.api_keys, open_paths)
        if self.tracer is not None:
            guarded = self.tracer.around(guarded)
        return Observer(RootPath(self.cors.around(guarded), self.root_path), metrics)


def create_application(
    service: Service,
    *,
    max_concurrency: int,
    with_metrics: bool,
    exposure: Exposure = Exposure(),
) -> Application:
    """Build the service's application.

    Args:
        service: The service.
        max_concurrency: Generation requests at the same time.
        with_metrics: Whether the metrics routes are served here too.
        exposure: Keys, cross-origin rules, the proxy's prefix.

    Returns:
        The application.
    """
    app = FastAPI(
        title="fastdeploy_lite", version=_version(), root_path=exposure.root_path,
        docs_url=None, redoc_url=None,  # FastAPI's own load from elsewhere
    )  # fmt: skip
    errors.install(app)
    web.add_pages(app)
    _add_generation(app, service)
    _add_probes(app, service)
    _add_text(app, service)
    _add_control(app, service)
    _add_disabled(app)
    if with_metrics:
        add_metrics(app, service)
    document_bodies(app, *_BODIES)
    admission = Admission(app, max_concurrency)
    guarded = _bounded(Gate(_with_body(admission), admission), app)
    return Application(exposure.around(guarded, service.metrics, _open_paths()), admission)


def _with_body(app: App) -> App:
    return BoundedBody(app, envs.FD_LITE_MAX_BODY_BYTES, envs.FD_LITE_MAX_BODY_VALUES)


def _bounded(inner: App, app: FastAPI) -> App:
    return KnownRoutes(inner, app.routes)


def _open_paths() -> frozenset[str]:
    return OPEN_PATHS | {"/metrics"} if envs.FD_LITE_OPEN_METRICS else OPEN_PATHS


def metrics_application(service: Service, exposure: Exposure = Exposure()) -> App:
    """The application of a metrics port of its own, behind the service's keys."""
    app = FastAPI(title="fastdeploy_lite metrics", version=_version())
    errors.install(app)
    add_metrics(app, service)
    guarded = _bounded(_with_body(app), app)
    return exposure.around(guarded, service.metrics, _open_paths())


def controller_application(service: Service, exposure: Exposure = Exposure()) -> App:
    """The application of the controller port, behind the service's keys."""
    app = FastAPI(title="fastdeploy_lite controller", version=_version())
    errors.install(app)

    @app.post("/controller/reset_scheduler")
    async def reset_scheduler() -> Response:
        """Abort everything and forget cached prefixes."""
        if not service.client.is_healthy:
            return PlainTextResponse("Engine not loaded", 500)
        await service.client.control("reset")
        return PlainTextResponse("Scheduler Reset Successfully")

    @app.post("/controller/scheduler")
    async def scheduler(request: Request) -> Response:
        """Reset on demand; the local scheduler has nothing else to change."""
        data = await request.body()
        body = decode(data) if data else {}
        if isinstance(body, dict) and body.get("reset"):
            await service.client.control("reset")
            message = "Scheduler updated successfully"
            return errors.json_response(errors.error_body(message))
        message = "The local scheduler cannot be reconfigured; only reset is available"
        refusal = errors.error_body(message, "invalid_request_error", None, "invalid_value")
        return errors.json_response(refusal, 400)

    guarded = _bounded(_with_body(app), app)
    return exposure.around(guarded, service.metrics, frozenset())


def _version() -> str:
    import fastdeploy_lite  # noqa: PLC0415 - the attribute is computed on access

    return str(fastdeploy_lite.__version__)


def _add_generation(app: FastAPI, service: Service) -> None:
    chat = Handler(service, ChatFormat())
    completion = Handler(service, CompletionFormat())
    responses = Handler(service, ResponsesFormat())

    @app.post(
        "/v1/responses", response_model=None, responses=ERRORS, tags=["generation"],
        openapi_extra=body_of(ResponsesRequest),
    )  # fmt: skip
    async def create_response(request: Request) -> Response:
        """Answer a conversation with typed items."""
        return await responses.create(await parse(request, ResponsesRequest), request)

    @app.post(
        "/v1/chat/completions", response_model=ChatCompletionResponse, responses=ERRORS,
        tags=["generation"], openapi_extra=body_of(ChatCompletionRequest),
    )  # fmt: skip
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        return await chat.create(await parse(request, ChatCompletionRequest), request)

    @app.post(
        "/v1/completions", response_model=CompletionResponse, responses=ERRORS,
        tags=["generation"], openapi_extra=body_of(CompletionRequest),
    )  # fmt: skip
    async def create_completion(request: Request) -> Response:
        """Continue a text."""
        return await completion.create(await parse(request, CompletionRequest), request)

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models() -> ModelList:
        """List the model."""
        return list_models(service)

    @app.get("/v1/models/{model:path}", response_model=ModelInfo, responses={404: ERRORS[404]},
             tags=["models"])  # fmt: skip
    async def model(model: str) -> Any:
        """The model, by its name."""
        info = list_models(service).data[0]
        if model in (info.id, "default"):
            return info
        text = f"The model {quote(model)} does not exist; this server has {quote(info.id)}"
        body = errors.error_body(text, "invalid_request_error", "model", "model_not_found")
        return errors.json_response(body, 404)

    for path, product in (("/v1/embeddings", "embeddings"), ("/v1/reward", "rewards")):
        app.add_api_route(
            path, _generates_only, methods=["POST"], tags=["not served"],
            summary=f"Not served: {product} need a pooling model", status_code=501,
            response_model=ErrorResponse, response_description="Always: this server generates text",
        )  # fmt: skip


async def _generates_only(request: Request) -> Response:
    """Answers 501, whatever is sent: upstream serves this route with pooling models only."""
    path = request.scope["path"]
    text = f"{path} needs a pooling model; this server generates text: use /v1/chat/completions"
    body = errors.error_body(text, "invalid_request_error", None, "not_implemented")
    return errors.json_response(body, 501)


def _add_probes(app: FastAPI, service: Service) -> None:
    responses: dict[int | str, dict[str, Any]] = {404: {"description": NOT_HEALTHY}}

    @app.get("/health", responses=responses, tags=["probes"])
    async def health() -> Response:
        """200 while the engine lives."""
        if service.client.is_healthy:
            return Response(status_code=200)
        return PlainTextResponse(NOT_HEALTHY, 404)

    for path in ("/health", "/ping"):  # load balancers; the HTTP server leaves the body out
        app.add_api_route(path, health, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/ping", health, methods=["GET"], responses=responses, tags=["probes"])
    app.add_api_route("/ping", health, methods=["POST"], responses=responses, tags=["probes"])

    @app.get("/load", tags=["probes"])
    async def load() -> dict[str, Any]:
        """The `/v1` routes (upstream's meaning of load)."""
        return {"routes": [_route(r) for r in app.routes if _path(r).startswith("/v1")]}

    @app.get("/version", tags=["probes"])
    async def show_version() -> dict[str, str]:
        """Versions of this package and of Paddle."""
        return {"version": _version(), "details": package_version()}


def _path(route: BaseRoute) -> str:
    return str(getattr(route, "path", ""))


def _route(route: BaseRoute) -> dict[str, Any]:
    methods = sorted(getattr(route, "methods", None) or [])
    return {"path": _path(route), "methods": methods, "tags": getattr(route, "tags", None) or []}


def _add_text(app: FastAPI, service: Service) -> None:
    responses: dict[int | str, dict[str, Any]] = {400: ERRORS[400]}

    @app.post(
        "/tokenize", responses=responses, tags=["text"], openapi_extra=body_of(TokenizeRequest)
    )
    async def tokenize(http: Request) -> Response:
        """Token ids of a text or of a rendered conversation."""
        body = await parse(http, TokenizeRequest)
        return errors.json_response(await service.in_thread(tokenized, body, service))

    @app.get("/tokenizer_info", tags=["text"])
    async def tokenizer_info() -> dict[str, Any]:
        """Special tokens and chat template, as evaluation tools ask for them."""
        tokenizer = service.tokenizer
        template = service.preprocessor.chat_template or tokenizer.chat_template
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
        special = tokenizer.special_tokens_map
        return {
            **{name: special.get(name) for name in names},
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": service.config.scheduler.max_model_len,
            "chat_template": template,
        }

    @app.post(
        "/detokenize", responses=responses, tags=["text"], openapi_extra=body_of(DetokenizeRequest)
    )
    async def detokenize(http: Request) -> Response:
        """The text of token ids."""
        body = await parse(http, DetokenizeRequest)
        text = await service.in_thread(service.preprocessor.text_of, body.tokens, "tokens")
        return errors.json_response({"prompt": text})


def _add_control(app: FastAPI, service: Service) -> None:
    unavailable: dict[int | str, dict[str, Any]] = {503: ERRORS[503]}

    @app.post("/v1/pause", responses=unavailable, tags=["control"])
    async def pause() -> dict[str, Any]:
        """End what runs with `finish_reason` abort, and refuse requests until resumed."""
        service.check_alive()
        await service.client.control("pause")
        return {"status": "success", "request_id": "control-pause", "result": None}

    @app.post("/v1/resume", responses=unavailable, tags=["control"])
    async def resume() -> dict[str, Any]:
        """Go on after a pause."""
        service.check_alive()
        await service.client.control("resume")
        return {"status": "success", "request_id": "control-resume", "result": None}

    @app.get("/v1/is_paused", tags=["control"])
    async def is_paused() -> dict[str, Any]:
        """Whether the engine is paused."""
        paused = service.client.stats.paused
        return {"status": "success", "is_paused": paused, "result": {"is_paused": paused}}

    @app.post(
        "/v1/abort", responses={**unavailable, 400: ERRORS[400]}, tags=["control"],
        openapi_extra=body_of(AbortRequest),
    )  # fmt: skip
    async def abort(http: Request) -> dict[str, list[str]]:
        """End requests by their public id; they answer with `finish_reason` abort."""
        return {"aborted": await _abort(service, await parse(http, AbortRequest))}

    @app.post(
        "/v1/abort_requests", responses={**unavailable, 400: ERRORS[400]}, tags=["control"],
        openapi_extra=body_of(AbortRequest),
    )  # fmt: skip
    async def abort_requests(http: Request) -> Response:
        """The same in upstream's form."""
        body = await parse(http, AbortRequest)
        wanted = body.req_ids or body.request_ids or []
        if not body.abort_all and not wanted and body.request_id is None:
            text = "give req_ids, or abort_all: true"
            raise RequestError(text, param="req_ids", code="missing_required_parameter")
        missing = [name for name in dict.fromkeys(wanted) if service.find_active(name) is None]
        found = [{"request_id": name} for name in await _abort(service, body)]
        result = {"aborted": found, "not_found": missing}
        return errors.json_response({"status": "success", "result": result})


async def _abort(service: Service, body: AbortRequest) -> list[str]:
    """End the requests that a body names; returns those that were alive."""
    service.check_alive()
    wanted = [*(body.request_ids or []), *(body.req_ids or [])]
    wanted += [body.request_id] if body.request_id else []
    found = dict.fromkeys(map(service.find_active, wanted))
    known = list(service.active) if body.abort_all else [name for name in found if name]
    ids = [engine_id for name in known for engine_id in service.active[name]]
    if ids:
        await service.client.abort(ids)
    return known


def _add_disabled(app: FastAPI) -> None:
    """Routes of reinforcement learning and expert balancing answer as upstream's do when off."""

    async def weights() -> Response:
        return PlainTextResponse(WEIGHTS_DISABLED, 404)

    async def experts() -> Response:
        return errors.json_response({"code": 1, "msg": "redundant expert is disabled"}, 400)

    for path in ("/update_model_weight", "/clear_load_weight"):
        app.add_api_route(path, weights, methods=["GET"], include_in_schema=False)
    for path in ("/v1/update_weights", "/v1/sleep", "/v1/wakeup"):
        app.add_api_route(path, weights, methods=["POST"], include_in_schema=False)
    for path in ("/rearrange_experts", "/get_per_expert_tokens_stats", "/check_redundant"):
        app.add_api_route(path, experts, methods=["POST"], include_in_schema=False)


def add_metrics(app: FastAPI, service: Service) -> None:
    """Add `/metrics` and `/config-info`.

    Args:
        app: Where to.
        service: The service.
    """

    @app.get("/metrics", tags=["metrics"])
    async def metrics() -> Response:
        """Prometheus text."""
        client = service.client
        service.metrics.update(client.stats)
        service.metrics.update_replicas(client.replicas_healthy, client.replica_stats)
        return Response(service.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/config-info", tags=["metrics"])
    async def config_info() -> Response:
        """The configuration and the environment variables that matter."""
        if not service.client.is_healthy:
            return PlainTextResponse("Engine not loaded", 500)
        values = {**service.args.shown(), "env_config": envs.snapshot()}
        for name, group in (("scheduler_config", service.config.scheduler),
                            ("cache_config", service.config.cache)):  # fmt: skip
            values[name] = {f: getattr(group, f) for f in group.__dataclass_fields__}
        return errors.json_response(values)
