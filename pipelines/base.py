"""What pipelines share that sample from words or classes: conditions, random streams, images, and their checks."""

import functools
import inspect
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging

from studio.checks import check_choice, check_integer, check_number, check_text, shown
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.pipelines.chat_template import reading
from studio.pipelines.known_words import write_known_words
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.pipelines.prompt_completion import fill_unspecified

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "tokens")
MAX_PROMPT_CHARACTERS = 2000
MAX_IMAGES = 10_000
"""The most images of one call, over all of its prompts."""
_INSTEAD = {
    "negative_prompt": "there is no negative prompt, so say in the prompt what the image shows",
    "num_inference_steps": "the number of steps is a setting of the decoding",
    "height": "images have the size of the image tokenizer",
    "width": "images have the size of the image tokenizer",
}
"""Arguments that pipelines of diffusers take, and what to do in their place."""


class ConditionalPipeline(DiffusionPipeline):
    """Base of a pipeline with a `transformer` conditioned on classes (`num_classes` in its configuration) or on text.

    A transformer of text has `caption_dim` and `caption_length` in its configuration, and the pipeline then has a
    `text_encoder` with the interface of `T5EncoderModel`, its `tokenizer`, and `lowercase_prompts` and
    `prompt_completion`
    in its own: what is chosen at random for an image where its prompt leaves it open; see `fill_unspecified`.
    """

    vocabulary: tuple[list[str], list[str]] | None = None
    """The words and the concepts that the model knows; None where any word may do."""
    _interrupt = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.__call__ = _with_known_arguments(cls.__call__)

    def save_pretrained(self, save_directory, **kwargs):
        """As of diffusers; the words that the pipeline knows are saved with it."""
        super().save_pretrained(save_directory, **kwargs)
        if self.vocabulary is not None:
            write_known_words(save_directory, *self.vocabulary)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the current token."""
        return self._interrupt

    @property
    def _execution_device(self) -> torch.device:
        """As of diffusers, which looks through the parts several times for hooks of offloading; once is enough to see
        that there are none, and a student's call is short."""
        for part in self.components.values():
            if isinstance(part, torch.nn.Module):
                for module in part.modules():
                    if "_hf_hook" in vars(module) or "_diffusers_hook" in vars(module):
                        return super()._execution_device
        return next(self.transformer.parameters()).device

    @property
    def takes_text(self) -> bool:
        return self.transformer.config.caption_dim is not None

    def check_condition(self, prompt, class_labels) -> None:
        """Raises a `StudioError` for a prompt or classes that the transformer cannot be conditioned on."""
        if self.takes_text:
            if class_labels is not None:
                raise StudioError("This model samples from words: pass a prompt and no class_labels.")
            if self.text_encoder is None or self.tokenizer is None:
                raise StudioError("This pipeline has no text encoder: load or convert it with one to use a prompt.")
            for text in listed(prompt) or [None]:
                check_text(
                    "The prompt", text, MAX_PROMPT_CHARACTERS, "The prompt is empty: say in a few words what to sample."
                )
        else:
            if prompt is not None:
                raise StudioError("This model samples from class numbers: pass class_labels and no prompt.")
            for label in listed(class_labels) or [None]:
                check_integer("Each of class_labels", label, 0, self.transformer.config.num_classes - 1)

    def checked_guidance(
        self, prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
    ) -> float:
        """The guidance scale of a call, this pipeline's where it is left out.

        Errors: `StudioError` that names the first of these arguments that cannot be used.
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

    def sampling(self, temperature, top_k, top_p, order: str = "llamagen") -> Sampling:
        """How a call samples, with this pipeline's defaults where it says nothing."""
        config = self.config
        return Sampling(
            config.default_temperature if temperature is None else temperature,
            config.default_top_k if top_k is None else top_k,
            config.default_top_p if top_p is None else top_p,
            order,
        )

    def check_arguments(self, names) -> None:
        """Raises a `StudioError` for names of arguments that a call of this pipeline does not take."""
        known = inspect.signature(type(self).__call__).parameters
        if unknown := [name for name in names if name not in known]:
            told = "; ".join(dict.fromkeys(_INSTEAD.get(name, "leave that out") for name in unknown))
            raise StudioError(f"{type(self).__name__} knows no {', no '.join(unknown)}: {told}.")

    def validation_warning(self, decoding) -> str | None:
        """What a user should know before sampling so, or None: settings outside those that were validated."""
        return None

    @torch.no_grad()
    def encode_prompt(
        self, prompt: str | list[str], device: torch.device | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text encoder states (B, caption_length, caption_dim) and the mask (B, caption_length) of real text tokens.

        `device` is where they are wanted: where the pipeline runs when left out.
        """
        texts = [text.strip() for text in ([prompt] if isinstance(prompt, str) else prompt)]
        if self.config.lowercase_prompts:
            texts = [text.lower() for text in texts]
        length = self.transformer.config.caption_length
        full = reading(lambda: self.tokenizer(texts, truncation=False))["input_ids"]
        if (longest := max(map(len, full))) > length:
            logger.warning("The prompt is cut: %d text tokens, of which the model reads %d.", longest, length)
        ids = self.tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
            return_attention_mask=True,
        )
        ids = ids.to(device or self._execution_device)
        states = self.text_encoder(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
        return states.last_hidden_state.to(self.transformer.dtype), ids["attention_mask"].bool()

    def condition(
        self, prompt=None, class_labels=None, num_images_per_prompt: int = 1, device: torch.device | None = None
    ) -> dict[str, torch.Tensor]:
        """The condition of every image; images of one prompt stand together."""
        if self.takes_text:
            texts = listed(prompt)
            different = list(dict.fromkeys(texts))
            captions, mask = self.encode_prompt(different, device)
            places = torch.tensor([different.index(text) for text in texts], device=captions.device)
            condition = {"captions": captions[places], "caption_mask": mask[places]}
        else:
            condition = {"class_labels": torch.tensor(listed(class_labels), device=device or self._execution_device)}
        return {name: value.repeat_interleave(num_images_per_prompt, dim=0) for name, value in condition.items()}

    def prepare_inputs(self, prompt, class_labels, num_images_per_prompt: int, generator):
        """What the images of a call are sampled from; each one's own stream chooses what its prompt leaves open.

        Returns:
            A random stream for each, the condition, and the words of each, or None without words.
        """
        subjects = of_each_image(prompt if self.takes_text else class_labels, num_images_per_prompt)
        device = self._execution_device
        generators = image_generators(generator, len(subjects), device)
        if not self.takes_text:
            return generators, self.condition(class_labels=subjects, device=device), None
        choices = self.config.prompt_completion or []
        words = [fill_unspecified(text, choices, stream) for text, stream in zip(subjects, generators)]
        return generators, self.condition(words, device=device), words

    def end_step(self, callback, number: int, names, *, tokens: torch.Tensor, **tensors: torch.Tensor) -> bool:
        """Calls a `callback_on_step_end`, if any, with the tensors of these names; True where sampling should stop.

        Tokens that it returns are written into those that were shown.
        """
        if callback is not None:
            shown = {"tokens": tokens, **tensors}
            changed = callback(self, number, number, {name: shown[name] for name in names}) or {}
            if changed.get("tokens", tokens) is not tokens:
                tokens.copy_(changed["tokens"])
        return self._interrupt

    def step_reporter(self, progress, callback, names):
        """What a loop calls after each step as (number, tokens): `progress` moves on, and the callback is called."""

        def on_step(number: int, tokens: torch.Tensor) -> bool:
            progress.update()
            return self.end_step(callback, number, names, tokens=tokens)

        return on_step

    def output(
        self, images, tokens: torch.Tensor, stats: DecodingStats, prompts: list[str] | None, return_dict: bool
    ) -> ImageTokenPipelineOutput | tuple:
        """What a call returns; models that were moved for it go back."""
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, tokens, stats
        return ImageTokenPipelineOutput(images=images, tokens=tokens, stats=stats, prompts=prompts)

    def decoded_images(self, decode: Callable[[torch.Tensor], torch.Tensor], tokens: torch.Tensor, output_type: str):
        """Images of tokens (B, ...), in the form that was asked for.

        `decode` makes pixels of some of them. On a CPU that is one at a time, which takes about half as long again: the
        convolutions there round otherwise in a batch, and one seed would not always give one PNG.
        """
        parts = tokens.split(1) if tokens.device.type == "cpu" else [tokens]
        return self.postprocess(torch.cat([decode(part) for part in parts]), output_type)

    def postprocess(self, pixels: torch.Tensor, output_type: str):
        """Decoded images (B, 3, H, W), about [-1, 1], in the form that was asked for."""
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
    def bytes_to_pil(values: torch.Tensor) -> list:
        """uint8 images (B, 3, H, W) to a list of PIL images."""
        from PIL import Image

        return [Image.fromarray(image) for image in values.permute(0, 2, 3, 1).cpu().numpy()]


def of_each_image(subjects, num_images_per_prompt: int) -> list:
    """The prompt or class of every image, of one or a list of them; images of one stand together."""
    return [subject for subject in listed(subjects) for _ in range(num_images_per_prompt)]


def listed(subjects) -> list:
    """Prompts or classes, of which one may be given by itself, as a list."""
    return list(subjects) if isinstance(subjects, list | tuple) else [subjects]


def _with_known_arguments(call):
    """A pipeline's `__call__` that refuses keywords which it does not know as a `StudioError`."""

    @functools.wraps(call)
    def checked(self, *args, **kwargs):
        self.check_arguments(kwargs)
        callback = kwargs.get("callback_on_step_end")
        if callback is not None and not callable(callback):
            raise StudioError(f"callback_on_step_end is a function, not {shown(callback)}.")
        return call(self, *args, **kwargs)

    return checked


def image_generators(generator, batch: int, device) -> list[torch.Generator]:
    """One random stream per image.

    A list is used as it is. A single generator serves the first image itself and seeds streams for the others; `None`
    seeds every stream from torch's global generator.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != batch:
            raise StudioError(f"{batch} images need {batch} generators, one each; {len(generator)} were given.")
        if not all(isinstance(each, torch.Generator) for each in generator):
            raise StudioError("Each generator of the list must be a torch.Generator: give one for every image.")
        return list(generator)
    if generator is None:
        return [_seeded(int(seed), device) for seed in torch.randint(2**62, (batch,))]
    if not isinstance(generator, torch.Generator):
        raise StudioError("generator must be a torch.Generator, a list of them, or None.")
    source = torch.Generator(generator.device)
    source.set_state(generator.get_state())
    seeds = torch.randint(2**62, (batch - 1,), generator=source, device=source.device).tolist()
    return [generator, *(_seeded(seed, generator.device) for seed in seeds)]


def _seeded(seed: int, device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def timed(seconds: dict[str, float], phase: str):
    """Notes how long the block took."""
    began = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - began
