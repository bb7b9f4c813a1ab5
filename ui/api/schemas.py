"""The parameters of the API, as pydantic models: what is not in them is refused by name."""

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from studio import decoding_options

_NEVER = {
    "background": "images have the background that the prompt names",
    "input_fidelity": "pixels outside the mask stay as they are",
    "safety_identifier": "send user",
    "moderation": "nothing is moderated here",
    "quality": "the quality is that of the model",
    "style": "name the style in the prompt",
    "frequency_penalty": "answers are greedy",
    "presence_penalty": "answers are greedy",
    "logprobs": "no probabilities are given",
    "top_logprobs": "no probabilities are given",
    "logit_bias": "answers are greedy",
    "stop": "shorten the answer with max_tokens",
    "tools": "the reader calls no tools",
    "tool_choice": "the reader calls no tools",
    "response_format": "answers are text",
    "negative_prompt": "say in the prompt what the image shows",
}
"""Parameters of other servers that this one cannot serve, and what to know instead."""


def unservable(name: str) -> str | None:
    """Why a known parameter cannot be served here; `None` for any other."""
    return _NEVER.get(name)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ImageFields(_Strict):
    """An image request: OpenAI's parameters and ours."""

    prompt: str = Field(description="What the image shows.")
    model: str | None = Field(None, description="A model of GET /v1/models; the served one where none is given.")
    n: int | None = Field(None, description="Images, 1 where no number is given.")
    size: str | None = Field(None, description='"auto", or the size of the model\'s images, such as "256x256".')
    response_format: Literal["b64_json", "url"] | None = Field(None, description='"b64_json" where none is given.')
    output_format: Literal["png", "webp", "jpeg"] | None = Field(None, description='"png" where none is given.')
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of WebP and JPEG, 0 to 100.")
    stream: bool | None = Field(None, description="Server-sent events with partial images.")
    partial_images: int | None = Field(None, ge=0, le=16, description="Partial images of each image, with stream.")
    user: str | None = Field(None, max_length=200, description="Your name for the person who asks; it is logged.")
    seed: int | None = Field(None, description="Of the first image; the next use seed + 1 and so on.")
    guidance_scale: float | None = Field(None, description="Classifier-free guidance; 1 is off.")
    temperature: float | None = Field(None, description="0 takes the likeliest token.")
    top_k: int | None = Field(None, description="Sample from the k likeliest tokens; 0 is all.")
    top_p: float | None = Field(None, description="Sample from the likeliest tokens of this total probability.")
    decoding: str | None = Field(None, description="A decoding that fits the model, such as jacobi or lantern.")
    num_inference_steps: int | None = Field(None, description="The option steps of decodings that have it.")


class _EditFields(_ImageFields):
    """An edit as a form, whose values are texts: OpenAI's parameters and ours."""

    model_config = ConfigDict(extra="forbid", strict=False)
    prompt: str = Field(description="What the redrawn part shows.")
    image: UploadFile | None = Field(None, description="PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF.")
    images: list[UploadFile] | None = Field(None, alias="image[]", description="The same, as a list of one.")
    mask: UploadFile | None = Field(
        None,
        description="As large as the image, fully transparent where to redraw; the image itself where none is given.",
    )
    size: str | None = Field(None, description='"auto", or the size of the image.')
    strength: float | None = Field(None, description="Share of the cells to redraw; below 1 the rest stays.")
    padding_mask_crop: int | None = Field(
        None, description="Redraw a square around the mask with this margin, in pixels."
    )


def _option_fields() -> dict[str, Any]:
    """A field for every option of a decoding."""
    fields: dict[str, Any] = {}
    for name, owners in decoding_options().items():
        kind = next(iter(owners.values())).kind
        described = (f"{name}: {option.summary} [default: {option.shown_default}]" for name, option in owners.items())
        fields[name] = (kind | None, Field(None, description=" ".join(described)))
    return fields


ImageRequest: Any = create_model("ImageRequest", __base__=_ImageFields, **_option_fields())
EditForm: Any = create_model("EditForm", __base__=_EditFields, **_option_fields())


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _Address(_Strict):
    url: str = Field(description="data:image/png;base64,...")
    detail: Literal["auto"] | None = Field(None, description="auto only: the reader has one resolution.")


class _ImageUrl(_Strict):
    type: Literal["image_url"]
    image_url: _Address


def _parts(content: Any) -> Any:
    """The parts of a content, which may be a text alone."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Message(_Strict):
    role: Literal["user"]
    content: Annotated[list[Annotated[_Text | _ImageUrl, Field(discriminator="type")]], BeforeValidator(_parts)]


ONE_MESSAGE = "send one user message whose content is a list of one text and one image_url"


def _one_message(messages: Any) -> Any:
    if isinstance(messages, list) and len(messages) != 1:
        raise ValueError(ONE_MESSAGE)
    return messages


def _greedy(temperature: float | None) -> float | None:
    if temperature:
        raise ValueError("answers are greedy: give 0, or leave it out")
    return temperature


class _StreamOptions(_Strict):
    include_usage: bool | None = None


class ChatRequest(_Strict):
    """A question about one image: OpenAI's parameters and ours."""

    model: str | None = Field(None, description="A reader of GET /v1/models; the first one where none is given.")
    messages: Annotated[list[_Message], BeforeValidator(_one_message)] = Field(
        min_length=1, max_length=1, description="One message with one image and a text."
    )
    max_tokens: int | None = Field(None, description="Of the answer.")
    max_completion_tokens: int | None = Field(None, description="The same under its newer name.")
    stream: bool | None = Field(None, description="Server-sent events.")
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float | None, AfterValidator(_greedy)] = Field(
        None, description="Answers are greedy: 0 only."
    )
    n: int | None = Field(None, ge=1, le=1, description="One answer.")
    user: str | None = Field(None, max_length=200, description="Your name for the person who asks; it is logged.")
    prune: str | None = Field(None, description="A pruning method, such as divprune; all tokens where none is given.")
    tokens: int | None = Field(None, description="Read the image as that many tokens, made for the question (QueCC).")
    keep: float | None = Field(None, description="The fraction of visual tokens to keep, with prune; 0.2 by default.")
    merge: str | None = Field(
        None,
        description="Tokens that the vision tower merges in its first layer, the second, ..., such as 56,28,14; "
        "diffrate, as learned for the model, or diffrate:36+10,28+8, merged and pruned.",
    )
