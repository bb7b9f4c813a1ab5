"""Text- and class-conditional ResGen (arXiv:2412.10208): stacks of residual codes in any number of calls."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.decoding.resgen import (
    DISTRIBUTIONS,
    ResGenDecoding,
    ResGenOutput,
    ResGenSampler,
    ResidualSteps,
    resgen_decoding,
)
from studio.decoding.sampling import KnownTokens, Sampling
from studio.errors import StudioError
from studio.models.resgen import ResGen
from studio.pipelines.base import first_difference, timed, with_parts
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.continuous_masked import MaskedBatch
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.pipelines.residual import ResidualPipeline
from studio.tokenizers.rvq import RVQTokenizer


def incompatibility(tokenizer: RVQTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    config, tables = tokenizer.config, tokenizer.codebooks
    rows, columns = tokenizer.pixels_per_cell
    compared = [
        ("levels", config.depth, transformer["depth"]),
        ("code vectors of length", tables[0].shape[1], transformer["code_dim"]),
        ("cells", (config.sample_size // rows) * (config.sample_size // columns), transformer["num_positions"]),
    ]
    if transformer["prediction"] == "levels":
        compared += [("codes a level", len(table), transformer["vocab_size"]) for table in tables]
    return first_difference(*compared)


class ResGenPipeline(ResidualPipeline):
    """Samples all levels of many cells at once; the number of calls does not depend on the depth.

    Args:
        image_tokenizer: quantises the predictions and decodes codes to pixels.
        transformer: predicts the hidden levels; class- or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        default_guidance_scale, default_temperature, default_top_k, default_top_p, default_num_inference_steps: used
            where a call leaves them out.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.
    """

    model_cpu_offload_seq = "text_encoder->transformer"  # type: ignore[assignment]  # None in diffusers

    def __init__(
        self,
        image_tokenizer: RVQTokenizer,
        transformer: ResGen,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_guidance_scale: float = 3.0,
        default_temperature: float = 1.0,
        default_top_k: int = 0,
        default_top_p: float = 1.0,
        default_num_inference_steps: int = 16,
        default_guidance_schedule: str = "linear",
        lowercase_prompts: bool = False,
        prompt_completion: list[dict] | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            image_tokenizer=image_tokenizer, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_defaults(
            default_guidance_scale=default_guidance_scale,
            default_temperature=default_temperature,
            default_top_k=default_top_k,
            default_top_p=default_top_p,
            default_num_inference_steps=default_num_inference_steps,
            default_guidance_schedule=default_guidance_schedule,
            lowercase_prompts=lowercase_prompts,
            prompt_completion=prompt_completion,
            id2label=id2label,
        )

    def check_call(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        decoding: ResidualSteps | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, Sampling, ResidualSteps]:
        """Checks the arguments of a call, whose meaning is that of `__call__`.

        Returns:
            What the call would sample with: guidance scale, sampling and decoding, with this pipeline's defaults.

        Raises:
            StudioError: arguments that the call cannot use, or components that do not fit together.
        """
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        self.check_fit(incompatibility(self.image_tokenizer, self.transformer.config))
        if decoding is not None and not isinstance(decoding, ResidualSteps):
            raise StudioError(
                "ResGen samples with ResGenDecoding (resgen) or FirstHitting (first-hitting) decoding, "
                f"not {type(decoding).__name__}."
            )
        settings = self.scheduled(decoding or ResGenDecoding(), guidance_scale)
        settings = settings.filled(steps=self.config.default_num_inference_steps)
        DISTRIBUTIONS[self.transformer.config.prediction].check(settings.scatter)
        settings.plan(self.transformer.num_tokens * self.transformer.config.depth)
        sampling = self.sampling(temperature, top_k, top_p)
        return guidance_scale or 1.0, sampling, settings

    def image_grid(self) -> tuple[int, int | None]:
        """Pixels a side of an image, and cells a side of its grid."""
        return self.image_tokenizer.config.sample_size, round(self.transformer.config.num_positions**0.5)

    def new_batch(self, max_images: int = 8) -> MaskedBatch:
        """A running batch that calls join and leave, whatever their prompts, settings and progress."""
        return MaskedBatch(self, ResGenSampler(self.transformer, self.image_tokenizer.quantizer), max_images)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Codes (B, L, D) of pixels (B, 3, side, side) in [-1, 1]."""
        return self.image_tokenizer.encode(pixels).flatten(1, 2)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoding: ResidualSteps | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ResGenPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        known_tokens: KnownTokens | None = None,
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598) at its greatest; 1 (or 0) turns it off.
            temperature: of the choice of a component, and a factor on the spread around its mean; 0 takes the likeliest
                mean.
            top_k, top_p: keep the k likeliest components (0: all), or the nucleus of probability p (1: all).
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: how many calls there are and which codes each of them keeps: `ResGenDecoding()` (the default), the
                most confident first, or `FirstHitting()`, in random order.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding.
            callback_on_step_end: called after each step as (pipe, step, step, {"tokens": codes (B, L, D)}), -1 where
                nothing is sampled yet; may return a dict with changed "tokens", with which sampling continues.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            known_tokens: tokens that are kept, of the shape of the result's; the others are sampled given these.

        Returns:
            An `ImageTokenPipelineOutput` whose tokens are (B, L, D), -1 where an interrupted call did not sample.

        Raises:
            StudioError: arguments that cannot be used, or components that do not fit together.
        """
        guidance_scale, sampling, settings = self.check_call(
            prompt,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            decoding=decoding,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        seconds: dict[str, float] = {}
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            with self.progress_bar(total=settings.steps) as progress:
                on_step = self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs)
                sampled = resgen_decoding(
                    self.transformer,
                    self.image_tokenizer.quantizer,
                    condition,
                    generators=generators,
                    sampling=sampling,
                    guidance_scale=guidance_scale,
                    settings=settings,
                    on_step=on_step,
                    known=known_tokens,
                )
            images = self.images_or_tokens(seconds, sampled.tokens, output_type)
        stats = _stats(sampled, seconds)
        return self.output(images, sampled.tokens, stats, prompts, return_dict)


def _stats(sampled: ResGenOutput, seconds: dict[str, float]) -> DecodingStats:
    shown = int((sampled.tokens >= 0).sum())
    return DecodingStats(
        target_calls=sampled.target_calls,
        tokens=shown,
        mean_accepted_length=shown / len(sampled.tokens) / sampled.target_calls,
        seconds=with_parts(seconds, sampled.seconds),
    )
