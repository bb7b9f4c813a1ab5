"""What conditional pipelines share: conditions, random streams, images, and the checks of arguments."""

import functools
import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from studio import backends
from studio.checks import check_choice, check_integer, check_number, check_text, shown
from studio.decoding.autoregressive import check_schedule
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.pipelines.chat_template import checked_tokenize
from studio.pipelines.class_labels import ClassLabels, checked_labels, class_index
from studio.pipelines.editing import EditingMixin, with_editing
from studio.pipelines.known_words import write_known_words
from studio.pipelines.output import DecodingStats, Images, ImageTokenPipelineOutput
from studio.pipelines.prompt_completion import check_prompt_completion, fill_unspecified
from studio.pipelines.streams import image_generators, listed, of_each_image
from studio.pipelines.text_states import text_states
from studio.pipelines.whole_words import with_whole_words

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
MAX_PROMPT_CHARACTERS = 2000
MAX_IMAGES = 10_000
"""The most images of one call, over all prompts."""
_ADVICE = {
    "negative_prompt": "there is no negative prompt, so say in the prompt what the image shows",
    "num_inference_steps": "the number of steps is a setting of the decoding",
    "height": "images have the size of the image tokenizer",
    "width": "images have the size of the image tokenizer",
}
"""Arguments of diffusers' pipelines, and what to do instead."""


class ConditionalPipeline(EditingMixin, DiffusionPipeline):
    """Base of a pipeline with a `transformer` conditioned on classes (`num_classes` in its configuration) or on text.

    A text-conditional transformer has `caption_dim` and `caption_length` in its configuration. The pipeline then has a
    `text_encoder` with the interface of `T5EncoderModel`, its `tokenizer`, and in its own configuration
    `lowercase_prompts` and `prompt_completion`, phrases sampled for what a prompt leaves unspecified; see
    `fill_unspecified`.
    """

    config: Any
    transformer: Any
    image_tokenizer: Any
    text_encoder: Any
    tokenizer: Any
    _callback_tensor_inputs: list[str]
    vocabulary: tuple[list[str], list[str]] | None = None
    """The words and the concepts that the model was trained with; None for an open vocabulary."""
    id2label: dict[int, str]
    """The names of classes by number, as `studio.pipelines.class_labels` says; empty where there are none."""
    _interrupt = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in vars(cls):
            cls.__call__ = _with_known_arguments(with_editing(cls.__call__))  # type: ignore[method-assign]  # every call is checked

    def register_defaults(self, **defaults: Any) -> None:
        """Writes the defaults of a pipeline into its configuration.

        Raises:
            StudioError: an unknown guidance schedule, phrases that complete no prompt, or labels of no classes.
        """
        self.register_to_config(**defaults)
        check_schedule(defaults["default_guidance_schedule"])
        check_prompt_completion(defaults["prompt_completion"])
        self.id2label = checked_labels(defaults["id2label"], self.transformer.config.num_classes)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; the vocabulary is saved with the pipeline."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.vocabulary is not None:
            write_known_words(save_directory, *self.vocabulary)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current token."""
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        """As in diffusers, but searches the components for offloading hooks only once.

        diffusers searches several times, which is noticeable beside the short call of a student.
        """
        parts = [part for part in vars(self).values() if isinstance(part, torch.nn.Module)]
        if any(backends.has_hooks(part) for part in parts):
            return super()._execution_device
        return next(self.transformer.parameters()).device

    @property
    def takes_text(self) -> bool:
        """Whether the transformer is conditioned on text."""
        return self.transformer.config.caption_dim is not None

    def class_index(self, label: int | str) -> int:
        """The number of a class, given by number or by name.

        Raises:
            StudioError: no such class, a name of several, or a text-conditional model.
        """
        if self.takes_text:
            raise StudioError("This model is text-conditional: pass a prompt and no class_labels.")
        return class_index(label, self.id2label, self.transformer.config.num_classes)

    def check_condition(self, prompt: str | list[str] | None, class_labels: ClassLabels) -> None:
        """Raises a `StudioError` for a prompt or classes that the transformer cannot be conditioned on."""
        if self.takes_text:
            if class_labels is not None:
                raise StudioError("This model is text-conditional: pass a prompt and no class_labels.")
            if self.text_encoder is None or self.tokenizer is None:
                raise StudioError("This pipeline has no text encoder: load or convert it with one to use a prompt.")
            for text in listed(prompt) or [None]:
                check_text(
                    "The prompt", text, MAX_PROMPT_CHARACTERS, "The prompt is empty: describe the image in a few words."
                )
        else:
            if prompt is not None:
                raise StudioError("This model is class-conditional: pass class_labels and no prompt.")
            for label in listed(class_labels) or [None]:
                self.class_index(label)

    def check_fit(self, incompatibility: str | None) -> None:
        """Raises a `StudioError` for what does not fit between image tokenizer and transformer, a clause."""
        if incompatibility is not None:
            raise StudioError(f"The components of this pipeline do not fit together: {incompatibility}.")

    def checked_guidance(
        self,
        prompt: str | list[str] | None,
        class_labels: ClassLabels,
        num_images_per_prompt: int,
        guidance_scale: float | None,
        output_type: str,
        callback_inputs: Sequence[str],
    ) -> float:
        """Checks the arguments that all pipelines have; returns the guidance scale, the default one for None.

        Raises:
            StudioError: the first of these arguments that cannot be used.
        """
        guidance_scale = self.config.default_guidance_scale if guidance_scale is None else guidance_scale
        self.check_condition(prompt, class_labels)
        subjects = len(listed(prompt if self.takes_text else class_labels))
        if subjects > MAX_IMAGES:
            raise StudioError(f"A call samples at most {MAX_IMAGES} images, not {subjects}: make several calls.")
        check_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES // subjects)
        guidance_scale = check_number("guidance_scale", guidance_scale)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        known = self._callback_tensor_inputs
        if not isinstance(callback_inputs, list | tuple) or not all(name in known for name in callback_inputs):
            raise StudioError(f"Callbacks can ask for {known}, not {shown(callback_inputs)}.")
        return guidance_scale

    def scheduled(self, settings: Any, guidance_scale: float) -> Any:
        """The settings of a decoding, with this pipeline's guidance schedule where they have none.

        Raises:
            StudioError: a schedule without guidance.
        """
        if settings.guidance_schedule is None:
            return replace(settings, guidance_schedule=self.config.default_guidance_schedule)
        if guidance_scale in (0, 1):
            raise StudioError(
                f"The guidance scale is {guidance_scale:g}, which is no guidance: give another one, or leave "
                "guidance_schedule out."
            )
        return settings

    def sampling(
        self, temperature: float | None, top_k: int | None, top_p: float | None, order: str = "llamagen"
    ) -> Sampling:
        """The sampling of a call, with this pipeline's defaults for None.

        Raises:
            StudioError: a number out of range, or tokens to sample from where the likeliest one is taken.
        """
        config = self.config
        temperature = config.default_temperature if temperature is None else temperature
        given = {"top_k": top_k not in (None, 0), "top_p": top_p not in (None, 1)}
        if temperature == 0 and (unused := [name for name, is_given in given.items() if is_given]):
            raise StudioError(f"At temperature 0 the likeliest token is taken: leave out {' and '.join(unused)}.")
        return Sampling(
            temperature,
            config.default_top_k if top_k is None else top_k,
            config.default_top_p if top_p is None else top_p,
            order,
        )

    def check_arguments(self, names: Iterable[str]) -> None:
        """Raises a `StudioError` for names that are no arguments of this pipeline's call."""
        known = inspect.signature(type(self).__call__).parameters
        if unknown := [name for name in names if name not in known]:
            advice = "; ".join(dict.fromkeys(_ADVICE.get(name, "leave that out") for name in unknown))
            raise StudioError(f"{type(self).__name__} knows no {', no '.join(unknown)}: {advice}.")

    def validation_warning(self, decoding: Any) -> str | None:
        """A warning for settings outside the validated range; None where there is nothing to warn of."""
        return None

    def count_prompt_tokens(self, prompt: str) -> int:
        """Text tokens of a prompt, of which the model reads `caption_length` at most.

        Raises:
            StudioError: a text that the text tokenizer cannot read.
        """
        return len(checked_tokenize(lambda: self.tokenizer(self._normalized(prompt), truncation=False))["input_ids"])

    def _normalized(self, text: str) -> str:
        text = text.strip().lower() if self.config.lowercase_prompts else text.strip()
        return checked_tokenize(lambda: with_whole_words(self.tokenizer, text))

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes prompts.

        Args:
            prompt: one text or B of them.
            device: of the result; the pipeline's execution device when None.

        Returns:
            Text encoder states (B, caption_length, caption_dim), and the mask (B, caption_length), false at padding,
            where states are zeros.

        Raises:
            StudioError: a text that the text tokenizer cannot read.
        """
        texts = [self._normalized(text) for text in ([prompt] if isinstance(prompt, str) else prompt)]
        length = self.transformer.config.caption_length
        prompts = checked_tokenize(lambda: self.tokenizer(texts, truncation=False))["input_ids"]
        if (longest := max(map(len, prompts))) > length:
            logger.warning(
                "The prompt is truncated: it has %d text tokens, of which the model reads %d.", longest, length
            )
            prompts = self.tokenizer(texts, max_length=length, truncation=True)["input_ids"]
        device = device or self._execution_device
        states = text_states(self.text_encoder, prompts, device)
        captions = states[0].new_zeros(len(states), length, states[0].shape[-1], dtype=dtype_of(self.transformer))
        for row, found in zip(captions, states):
            row[: len(found)] = found
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        return captions, torch.arange(length, device=device) < lengths[:, None]

    def condition(
        self,
        prompt: str | list[str] | None = None,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """The condition of every image, as keyword arguments of the transformer; images of one prompt are adjacent."""
        if self.takes_text:
            texts = listed(prompt)
            different = list(dict.fromkeys(texts))
            captions, mask = self.encode_prompt(different, device)
            places = torch.tensor([different.index(text) for text in texts], device=captions.device)
            condition = {"captions": captions[places], "caption_mask": mask[places]}
        else:
            numbers = [self.class_index(label) for label in listed(class_labels)]
            condition = {"class_labels": torch.tensor(numbers, device=device or self._execution_device)}
        return {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in condition.items()}

    def prepare_inputs(
        self,
        prompt: str | list[str] | None,
        class_labels: ClassLabels,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> tuple[list[torch.Generator], dict[str, torch.Tensor], list[str] | None]:
        """Random streams, condition and prompts of the images; each stream first samples what its prompt leaves open.

        Returns:
            A generator for each image, the condition, and the completed prompt of each image (None for classes).
        """
        subjects = of_each_image(prompt if self.takes_text else class_labels, num_images_per_prompt)
        device = self._execution_device
        generators = image_generators(generator, len(subjects), device)
        if not self.takes_text:
            return generators, self.condition(class_labels=subjects, device=device), None
        choices = self.config.prompt_completion or []
        prompts = [fill_unspecified(text, choices, stream) for text, stream in zip(subjects, generators)]
        return generators, self.condition(prompts, device=device), prompts

    def begin(
        self, seconds: dict[str, float], *arguments: Any
    ) -> tuple[list[torch.Generator], dict[str, torch.Tensor], list[str] | None]:
        """`prepare_inputs` at the beginning of a call, which nothing has interrupted yet; stores `seconds["text"]`."""
        self._interrupt = False
        with timed(seconds, "text"):
            return self.prepare_inputs(*arguments)

    def end_step(
        self,
        callback: Callable | None,
        number: int,
        names: Sequence[str],
        *,
        tokens: torch.Tensor,
        **tensors: torch.Tensor,
    ) -> bool:
        """Calls a `callback_on_step_end`, if any, with the tensors of these names; True when sampling should stop.

        Tokens that it returns are written into `tokens`.
        """
        if callback is not None:
            available = {"tokens": tokens, **tensors}
            changed = callback(self, number, number, {name: available[name] for name in names}) or {}
            if changed.get("tokens", tokens) is not tokens:
                tokens.copy_(changed["tokens"])
        return self._interrupt

    def step_reporter(
        self, progress: Any, callback: Callable | None, names: Sequence[str]
    ) -> Callable[[int, torch.Tensor], bool]:
        """The `on_step(number, tokens)` of a loop, which updates `progress` and calls the callback."""

        def on_step(number: int, tokens: torch.Tensor) -> bool:
            progress.update()
            return self.end_step(callback, number, names, tokens=tokens)

        return on_step

    def output(
        self, images: Images, tokens: torch.Tensor, stats: DecodingStats, prompts: list[str] | None, return_dict: bool
    ) -> ImageTokenPipelineOutput | tuple:
        """The return value of a call; offloaded models are moved back."""
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, tokens, stats
        return ImageTokenPipelineOutput(images=images, tokens=tokens, stats=stats, prompts=prompts)

    def images_or_tokens(self, seconds: dict[str, float], tokens: torch.Tensor, output_type: str) -> Images:
        """What a call returns as images: those of its tokens, or the tokens themselves; stores `seconds["pixels"]`."""
        with timed(seconds, "pixels"):
            return tokens if output_type == "tokens" else self.decode_tokens(tokens, output_type)

    def decoded_images(
        self, decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, output_type: str
    ) -> Images:
        """Decodes tokens (B, ...) to images.

        On a CPU `decode` gets one image at a time, which takes about 1.5 times as long: convolutions round differently
        in a batch there, and a seed would not always give the same PNG.
        """
        parts = tokens.split(1) if tokens.device.type == "cpu" else [tokens]
        return self.postprocess(torch.cat([decode(part) for part in parts]), output_type)

    def postprocess(self, pixels: torch.Tensor, output_type: str) -> Images:
        """Images of `output_type` from decoded pixels (B, 3, H, W), about [-1, 1].

        Raises:
            StudioError: pixels that are not finite.
        """
        pixels = pixels.float()
        if not pixels.isfinite().all():
            raise StudioError(
                "The model gave no finite pixels: lower guidance and temperature, or run it in float32; "
                "if nothing helps, its weights are damaged."
            )
        if output_type == "pil":
            values = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
            return self.bytes_to_pil(values)
        pixels = (pixels / 2 + 0.5).clamp(0, 1)
        return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).cpu().numpy()

    @staticmethod
    def bytes_to_pil(values: torch.Tensor) -> list[Image.Image]:
        """PIL images of uint8 values (B, 3, H, W)."""
        return [Image.fromarray(image) for image in values.permute(0, 2, 3, 1).cpu().numpy()]


def _with_known_arguments(call: Callable) -> Callable:
    """Wraps a pipeline's `__call__` so that unknown keywords raise a `StudioError`."""

    @functools.wraps(call)
    def checked(self: ConditionalPipeline, *args: Any, **kwargs: Any) -> Any:
        self.check_arguments(kwargs)
        callback = kwargs.get("callback_on_step_end")
        if callback is not None and not callable(callback):
            raise StudioError(f"callback_on_step_end must be a function, not {shown(callback)}.")
        return call(self, *args, **kwargs)

    return checked


def first_difference(*compared: tuple[str, object, object]) -> str | None:
    """Describes the first difference among (name, value of the tokenizer, value of the transformer), or None."""
    for name, ours, sampled in compared:
        if ours != sampled:
            return f"the image tokenizer has {name} {ours}, the transformer {sampled}"
    return None


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Stores the seconds that the block took as `seconds[phase]`."""
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began


def dtype_of(model: ModelMixin) -> torch.dtype:
    """A model's `dtype`, looked up in diffusers' slow way only where hooks may cast its weights."""
    return model.dtype if backends.has_hooks(model) else next(model.parameters()).dtype


def with_parts(seconds: dict[str, float], parts: dict[str, float]) -> dict[str, float]:
    """Seconds by phase of a decoding without prefill, with the parts that make up its "decode"."""
    return {**seconds, "prefill": 0.0, "decode": sum(parts.values()), **parts}
