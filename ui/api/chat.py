"""`POST /v1/chat/completions`: OpenAI's chat API for questions about an image, with token pruning."""

import base64
import binascii
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from studio.ui.api.asking import asking, begun, chosen_model, event, last_of, streamed
from studio.ui.api.errors import ApiError, ApiRoute
from studio.ui.api.schemas import ONE_MESSAGE, ChatRequest
from studio.ui.jobs.ask_job import QUECC, AskRequest, Reading, read

if TYPE_CHECKING:
    from studio.pipelines.visual_question import Answer

_DATA = "data:image/"
_LENGTH, _KEEP = 64, 0.2  # of an answer, and of the tokens, where none is given

router = APIRouter(route_class=ApiRoute, tags=["chat"])


@router.post("/v1/chat/completions", summary="Ask about an image")
async def complete(body: ChatRequest, request: Request) -> Any:
    """Answer a question, whole or as a stream."""
    asked = _asked(body)
    left = await asking(request, model=asked.model, prune=asked.method, merge=asked.merge, user=body.user)
    items = read(asked)
    name = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
    if body.stream:
        first = await begun(items, lambda reading: reading.image is not None, left)
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return streamed(_chunks(name, asked, first, items, with_usage), items, left)
    answer = _answer(await last_of(items, left))
    message = {"role": "assistant", "content": answer.answer, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": _reason(asked, answer), "logprobs": None}
    return {**name, "object": "chat.completion", "choices": [choice], "usage": _usage(answer), "studio": _own(answer)}


def _asked(body: ChatRequest) -> AskRequest:
    """The request behind a body.

    Raises:
        StudioError: a parameter that cannot be served.
    """
    if body.stream_options and not body.stream:
        raise ApiError("stream_options are for stream: true.", param="stream_options", code="unsupported_parameter")
    if body.tokens is not None and body.prune not in (None, QUECC):
        raise ApiError("tokens and prune exclude each other: leave one out.", param="tokens", code="invalid_value")
    method = body.prune if body.tokens is None else QUECC
    if method == QUECC and body.keep is not None:
        raise ApiError("quecc makes a number of tokens: give tokens, not keep.", param="keep", code="invalid_value")
    if body.keep is not None and body.prune is None:
        raise ApiError("keep needs a pruning method: add prune, or leave it out.", param="keep", code="invalid_value")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise ApiError("Give one of max_tokens and max_completion_tokens.", param="max_tokens", code="invalid_value")
    parts = body.messages[0].content
    images = [part.image_url.url for part in parts if part.type == "image_url"]
    texts = [part.text for part in parts if part.type == "text"]
    if len(images) != 1:
        wrong = f"There are {len(images)} images: {ONE_MESSAGE}."
        raise ApiError(wrong, param="messages", code="invalid_value")
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return AskRequest(
        chosen_model(body.model, "reader"),
        _image(images[0]),
        "\n".join(texts),
        method=method,
        keep=_KEEP if body.keep is None else body.keep,
        compare=False,
        max_new_tokens=_LENGTH if length is None else length,
        tokens=body.tokens,
        merge=body.merge,
    )


def _image(url: str) -> bytes:
    """The bytes of a data URL.

    Raises:
        ApiError: any other address, or no base64.
    """
    head, _, data = url.partition(",")
    if not head.startswith(_DATA) or not head.endswith(";base64"):
        reason = "this server fetches nothing: send the image itself, as data:image/png;base64,..."
        raise ApiError(f"Invalid value for 'image_url': {reason}.", param="messages", code="invalid_image_url")
    if not data:
        wrong = "The image is empty: give its bytes in base64 behind the comma."
        raise ApiError(wrong, param="messages", code="invalid_image_url")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        wrong = "The image is not valid base64: encode its bytes again."
        raise ApiError(wrong, param="messages", code="invalid_image_url") from error


async def _chunks(
    name: dict[str, Any], asked: AskRequest, first: Reading, items: AsyncIterator[Reading], with_usage: bool
) -> AsyncGenerator[str]:
    """The answer in pieces, as its tokens come."""

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return event({**name, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    sent, last = "", first
    async for last in items:
        text = _answer(last).answer if last.pruned or last.whole else ""
        if text.startswith(sent) and len(text) > len(sent) and not text.endswith("\ufffd"):
            yield chunk({"content": text.removeprefix(sent)})
            sent = text
    answer = _answer(last)
    if rest := answer.answer.removeprefix(sent):
        yield chunk({"content": rest})
    yield chunk({}, _reason(asked, answer))
    if with_usage:
        own = {"usage": _usage(answer), "studio": _own(answer)}
        yield event({**name, "object": "chat.completion.chunk", "choices": [], **own})
    yield "data: [DONE]\n\n"


def _answer(reading: Reading) -> "Answer":
    answer = reading.pruned or reading.whole
    assert answer is not None, "a finished reading has an answer"
    return answer


def _reason(asked: AskRequest, answer: "Answer") -> str:
    return "length" if answer.answer_tokens >= asked.max_new_tokens else "stop"


def _usage(answer: "Answer") -> dict[str, int]:
    total = answer.prompt_tokens + answer.answer_tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.answer_tokens, "total_tokens": total}


def _own(answer: "Answer") -> dict[str, Any]:
    """What the answer cost."""
    counts = {"visual_tokens": answer.visual_tokens, "kept_tokens": answer.kept_tokens}
    return {**counts, "seconds": answer.seconds, "tower": answer.tower and asdict(answer.tower)}
