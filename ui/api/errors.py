"""Errors of the API in the form of OpenAI's: `{"error": {"message", "type", "param", "code"}}`."""

import json
import math
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from studio.errors import StudioError
from studio.ui.api.schemas import unservable
from studio.ui.server import metrics
from studio.ui.server.failures import error_content, sentence_of
from studio.ui.server.scheduler import Overloaded

_SUBJECTS = {
    "The prompt": "prompt",
    "The number of images": "n",
    "The seed": "seed",
    "The decoding": "decoding",
    **{
        f"{kind} samples with": "decoding"
        for kind in ("LlamaGen", "MAR", "TokenBridge", "ResGen", "RQ-Transformer", "xAR")
    },
    "The size": "size",
    "The pruning method": "prune",
    "The fraction of tokens": "keep",
    "The number of tokens that go": "merge",
    "The number of tokens": "tokens",
    "This reader": "tokens",
    **dict.fromkeys(("Tokens ", "Merged tokens", "No rates were learned", "The numbers of merging"), "merge"),
    "The longest answer": "max_tokens",
    "The question": "messages",
    "The image": "messages",
    "The strength": "strength",
    "The padding": "padding_mask_crop",
    **{name: name for name in ("guidance_scale", "temperature", "top_k", "top_p")},
}
"""The parameter that a message is about, by how it begins."""
_REASONS = {
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "give an object"),
    **dict.fromkeys(("union_tag_invalid", "union_tag_not_found"), "give it the type text or image_url"),
}
"""What to do, by the type of an error of pydantic."""


class ApiError(StudioError):
    """An error of the API.

    Args:
        message: a sentence that says what to do.
        status: of HTTP.
        param: the parameter that it is about.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


class ApiRoute(APIRoute):
    """A route of which every error has the form of OpenAI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of `APIRoute`."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except Exception as error:
                return error_response(error)

        return handled


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed."""
    status, content = described(error)
    headers = error.headers if isinstance(error, ApiError) else None
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(math.ceil(error.retry_after))}
    return JSONResponse(content, status, headers)


def described(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and content of the answer to a request that failed, which is counted."""
    if isinstance(error, RequestValidationError):
        error = _of_validation(error.errors())
    elif isinstance(error, HTTPException):
        error = _of_http(error)
    metrics.count_error("refused" if isinstance(error, StudioError) else type(error).__name__)
    message = sentence_of(error)
    status, param, code = 500, None, None
    if isinstance(error, ApiError):
        status, param, code = error.status, error.param, error.code
    elif isinstance(error, Overloaded):
        status, code = error.status, "rate_limit_exceeded" if error.status == 429 else "overloaded"
    elif isinstance(error, StudioError):
        status, code = 400, "invalid_value"
        param = next((name for start, name in _SUBJECTS.items() if message.startswith(start)), None)
    return status, error_content(message, status, param, code)


def error_event(error: Exception) -> str:
    """A server-sent event for an error after the answer has begun."""
    return f"event: error\ndata: {json.dumps(described(error)[1])}\n\n"


def not_here(request: Request) -> ApiError:
    """The error for a path that does not exist, or that other methods have."""
    path, method = request.url.path, request.method
    found = {
        name.upper()
        for template, methods in request.app.openapi()["paths"].items()
        if re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(template)), path)
        for name in methods
    }
    if not found:
        return ApiError(f"There is no {method} {path} here: /docs describes what there is.", 404, code="unknown_url")
    allow = {"Allow": ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))}
    sentence = f"{path} is not for {method}: send {' or '.join(sorted(found))}."
    return ApiError(sentence, 405, code="method_not_allowed", headers=allow)


def _of_http(error: HTTPException) -> ApiError:
    """The error of a body that cannot be read, and whatever else FastAPI refuses by itself."""
    cause = error.__cause__
    if isinstance(cause, RecursionError):
        return ApiError("The body is nested too deeply: send an object of parameters.", code="invalid_json")
    if isinstance(cause, UnicodeDecodeError):
        return ApiError("The body is not UTF-8: send it so, without compression.", code="invalid_json")
    if isinstance(cause, ValueError) and "digits" in str(cause):
        return ApiError("The body has a number with too many digits: give a smaller one.", code="invalid_json")
    return ApiError(f"{error.detail.rstrip('.')}: see /docs.", error.status_code, code="invalid_request")


def _of_validation(errors: Sequence[Any]) -> ApiError:
    """The first of the errors that pydantic found."""
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    param = _name_of(first["loc"])
    if first["type"] == "json_invalid":
        return ApiError("The body is not valid JSON: send an object of parameters.", code="invalid_json")
    if not param:
        return ApiError(
            "Send the parameters as a JSON object, with Content-Type: application/json.", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        if reason := unservable(param):
            sentence = f"Unsupported parameter: '{param}'. Leave it out: {reason}."
            return ApiError(sentence, param=param, code="unsupported_parameter")
        return ApiError(f"Unknown parameter: '{param}'. Leave it out.", param=param, code="unknown_parameter")
    if first["type"] == "missing":
        return ApiError(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = _REASONS.get(first["type"]) or str(first["msg"]).removeprefix("Value error, ")
    if "Expected UploadFile" in reason:
        reason = "send a file, not text"
    return ApiError(f"Invalid value for '{param}': {reason}.", param=param, code="invalid_value")


def _name_of(place: Sequence[Any]) -> str:
    """A parameter, as in "messages[0].content[1].image_url.detail", of where pydantic found an error."""
    name, before = "", None
    for part in place[tuple(place[:1]) == ("body",) :]:
        is_type = isinstance(before, int) and name.rpartition(".")[2].startswith("content[")
        if not is_type:  # pydantic also names the type of a part
            name += f"[{part}]" if isinstance(part, int) else f".{part}"
        before = part
    return name.removeprefix(".")
