"""All routes of the API: OpenAI's, and those for operators."""

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from studio import __version__
from studio.ui.api import chat
from studio.ui.api.answers import files_router
from studio.ui.api.asking import chosen_model, offered_models
from studio.ui.api.edits import edits_router
from studio.ui.api.errors import ApiError, ApiRoute, error_response, not_here
from studio.ui.api.images import images_router
from studio.ui.server import metrics, worker

_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
_DESCRIPTION = (
    "OpenAI's API for images and for questions about them, with the settings of token-based models. A parameter that "
    "cannot be served is refused by name. The app of the same server is at /."
)


def new_application(folder: Path | None, **settings: Any) -> FastAPI:
    """A FastAPI application with the routes of the API; the app is mounted on it.

    Args:
        folder: of files, as of `ImageAnswers`.
        settings: of `FastAPI`.
    """
    app = FastAPI(title="Studio", version=__version__, description=_DESCRIPTION, redoc_url=None, **settings)
    app.include_router(_router())
    for router in (images_router, edits_router, files_router):
        app.include_router(router(folder))
    app.include_router(chat.router)
    for path in ("/v1", "/v1/{path:path}"):
        app.add_api_route(path, _unknown, methods=_METHODS, include_in_schema=False)
    app.add_exception_handler(RequestValidationError, _failed)
    app.add_exception_handler(ApiError, _failed)
    return app


def _router() -> APIRouter:
    router, began = APIRouter(route_class=ApiRoute), int(time.time())

    def described(name: str, kind: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "studio", "kind": kind}

    @router.get("/v1/models", tags=["models"], summary="List the models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(*each) for each in offered_models().items()]}

    @router.get("/v1/models/{name:path}", tags=["models"], summary="Describe a model")
    async def model(name: str) -> dict[str, Any]:
        kind = offered_models().get(name)
        return described(chosen_model(name, kind or "pipeline"), kind or "pipeline")

    @router.get("/healthz", tags=["operation"], summary="Whether the process answers")
    async def healthy() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", tags=["operation"], summary="Whether requests are taken")
    async def ready() -> Response:
        if worker.is_closing():
            return JSONResponse({"status": "stopping"}, 503, {"Retry-After": str(worker.RESTART)})
        return JSONResponse({"status": "ready"})

    @router.get("/metrics", tags=["operation"], summary="Numbers for Prometheus")
    async def numbers() -> Response:
        return Response(metrics.exposed(), media_type=metrics.CONTENT_TYPE)

    for route in [*router.routes]:
        if isinstance(route, ApiRoute):
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
    return router


async def _unknown(request: Request) -> Any:
    raise not_here(request)


async def _failed(_: Request, error: Exception) -> Response:
    return error_response(error)
