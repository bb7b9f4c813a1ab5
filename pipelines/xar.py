"""Text- and class-conditional xAR (arXiv:2502.20388): text encoder, transformer and KL autoencoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.checks import check_number
from studio.decoding.xar import XARDecoding, xar_decoding
from studio.errors import StudioError
from studio.models.xar import XAR
from studio.pipelines.base import ConditionalPipeline, Images, dtype_of, first_difference, timed
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.tokenizers.kl import KLTokenizer


def incompatibility(tokenizer: KLTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    return first_difference(("latents of length", tokenizer.latent_channels, transformer["token_dim"]))


class XARPipeline(ConditionalPipeline):
    """Samples images a cell of continuous tokens at a time.

    Args:
        image_tokenizer: decodes latents to pixels.
        transformer: gives the velocities of cells; class- or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        default_guidance_scale, default_temperature, default_num_inference_steps: used where a call leaves them out.
            Inference steps are those of the flow of a cell.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.
    """

    model_cpu_offload_seq = "text_encoder"  # type: ignore[assignment]  # None in diffusers
    _exclude_from_cpu_offload = ["transformer", "image_tokenizer"]
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["tokens"]

    def __init__(
        self,
        image_tokenizer: KLTokenizer,
        transformer: XAR,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_guidance_scale: float = 2.7,
        default_temperature: float = 1.0,
        default_num_inference_steps: int = 40,
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
        decoding: XARDecoding | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, float, XARDecoding]:
        """Checks the arguments of a call, whose meaning is that of `__call__`.

        Returns:
            What the call would sample with: guidance scale, temperature and decoding, with this pipeline's defaults.

        Raises:
            StudioError: arguments that the call cannot use, or components that do not fit together.
        """
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        temperature = self.config.default_temperature if temperature is None else temperature
        temperature = check_number("temperature", temperature)
        if decoding is not None and not isinstance(decoding, XARDecoding):
            raise StudioError(f"xAR samples with XARDecoding (xar) decoding, not {type(decoding).__name__}.")
        self.check_fit(incompatibility(self.image_tokenizer, self.transformer.config))
        settings = self.scheduled(decoding or XARDecoding(), guidance_scale)
        return guidance_scale or 1.0, temperature, settings.filled(steps=self.config.default_num_inference_steps)

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor, output_type: str = "pil") -> Images:
        """Decodes tokens (B, L, D); "pil" truncates 127.5 x + 128 to bytes, "np" and "pt" are in [0, 1]."""
        latents = self.transformer.unpatchify(tokens).to(dtype_of(self.image_tokenizer))
        return self.decoded_images(self.image_tokenizer.decode, latents, output_type)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoding: XARDecoding | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["XARPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598) at its greatest; 1 (or 0) turns it off.
            temperature: factor on the noise of the steps of the flow; 0 adds none.
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: `XARDecoding()`, the number of steps and the guidance schedule.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding; `transformer.unpatchify` turns them into
                latents.
            callback_on_step_end: called after each cell as (pipe, cell, cell, {"tokens": (B, L, D)}); tokens that are
                not sampled yet are 0. It may return a dict with changed "tokens", with which sampling continues.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.

        Returns:
            An `ImageTokenPipelineOutput`, or with `return_dict=False` a tuple of images, tokens and stats.

        Raises:
            StudioError: arguments that cannot be used, or components that do not fit together.
        """
        guidance_scale, temperature, settings = self.check_call(
            prompt,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            guidance_scale=guidance_scale,
            temperature=temperature,
            decoding=decoding,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        seconds: dict[str, float] = {}
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            with self.progress_bar(total=self.transformer.num_cells) as progress:
                sampled = xar_decoding(
                    self.transformer,
                    condition,
                    generators=generators,
                    guidance_scale=guidance_scale,
                    temperature=temperature,
                    settings=settings,
                    on_step=self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs),
                )
            images = self.images_or_tokens(seconds, sampled.tokens, output_type)
        assert settings.steps is not None
        final = sampled.target_calls // settings.steps * self.transformer.cell_tokens
        stats = DecodingStats(
            target_calls=sampled.target_calls,
            tokens=len(sampled.tokens) * final,
            mean_accepted_length=final / sampled.target_calls,
            seconds={**seconds, **sampled.seconds},
        )
        return self.output(images, sampled.tokens, stats, prompts, return_dict)
