"""Text- and class-conditional MAR (arXiv:2406.11838): text encoder, masked autoencoder and KL autoencoder."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.checks import check_number
from studio.decoding.cspd import ContinuousOutput, ContinuousSpeculative, check_pair, continuous_speculative
from studio.decoding.mar import MARSampler, MaskedAutoregressive, MaskedOutput, masked_autoregressive
from studio.decoding.sampling import KnownTokens
from studio.errors import StudioError
from studio.models.mar import MAR
from studio.pipelines.base import ConditionalPipeline, Images, dtype_of, first_difference, timed, with_parts
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.continuous_masked import MaskedBatch
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.tokenizers.kl import KLTokenizer

logger = logging.get_logger(__name__)


def incompatibility(tokenizer: KLTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    sampled = transformer["token_dim"] // transformer["patch_size"] ** 2
    return first_difference(("latents of length", tokenizer.latent_channels, sampled))


class MARPipeline(ConditionalPipeline):
    """Samples images a few continuous tokens at a time.

    Args:
        image_tokenizer: decodes latents to pixels.
        transformer: samples tokens; class- or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        drafter: a smaller `MAR` over the same tokens and conditions, for `ContinuousSpeculative` decoding.
        default_guidance_scale, default_temperature, default_num_inference_steps, default_diffusion_steps: used where a
            call leaves them out. Inference steps are calls of the transformer, diffusion steps denoise a token.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.
    """

    drafter: MAR | None
    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"  # type: ignore[assignment]  # None in diffusers
    _exclude_from_cpu_offload = ["drafter"]
    _optional_components = ["text_encoder", "tokenizer", "drafter"]
    _callback_tensor_inputs = ["tokens", "positions"]

    def __init__(
        self,
        image_tokenizer: KLTokenizer,
        transformer: MAR,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drafter: MAR | None = None,
        default_guidance_scale: float = 3.0,
        default_temperature: float = 1.0,
        default_num_inference_steps: int = 64,
        default_diffusion_steps: int = 100,
        default_guidance_schedule: str = "linear",
        lowercase_prompts: bool = False,
        prompt_completion: list[dict] | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(
            image_tokenizer=image_tokenizer,
            transformer=transformer,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            drafter=drafter,
        )
        self.register_defaults(
            default_guidance_scale=default_guidance_scale,
            default_temperature=default_temperature,
            default_num_inference_steps=default_num_inference_steps,
            default_diffusion_steps=default_diffusion_steps,
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
        num_inference_steps: int | None = None,
        decoding: MaskedAutoregressive | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, float, MaskedAutoregressive]:
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
        settings = MaskedAutoregressive() if decoding is None else decoding
        if not isinstance(settings, MaskedAutoregressive):
            raise StudioError(
                "MAR samples with MaskedAutoregressive (mar) or ContinuousSpeculative (cspd) decoding, "
                f"not {type(settings).__name__}."
            )
        if num_inference_steps is not None and settings.steps is not None:
            raise StudioError(
                "The number of steps is given twice: leave out num_inference_steps or the decoding's steps."
            )
        settings = self._filled(self.scheduled(settings, guidance_scale), num_inference_steps)
        settings.plan(self.transformer.num_tokens)
        settings.denoising_plan()
        self._check_components(settings, temperature)
        return guidance_scale or 1.0, temperature, settings

    def _check_components(self, settings: MaskedAutoregressive, temperature: float) -> None:
        """Raises a `StudioError` for components that do not fit together or do not fit the decoding."""
        ours = self.transformer.config
        self.check_fit(incompatibility(self.image_tokenizer, ours))
        if not isinstance(settings, ContinuousSpeculative):
            return
        if self.drafter is None:
            raise StudioError(
                "Continuous speculative decoding (cspd) needs a drafter and this pipeline has none: use the folder "
                "that `studio train mar-drafter` makes, or build the pipeline with drafter=, a smaller MAR."
            )
        for name in ("num_classes", "caption_dim", "latent_scale"):
            if self.drafter.config[name] != ours[name]:
                raise StudioError(
                    f"Drafter and transformer must agree; {name} is {self.drafter.config[name]} and {ours[name]}."
                )
        check_pair(self.transformer, self.drafter, settings, temperature)

    def validation_warning(self, decoding: MaskedAutoregressive | None) -> str | None:
        """As of the base class, for settings of `ContinuousSpeculative`."""
        if not isinstance(decoding, ContinuousSpeculative):
            return None
        filled = self._filled(decoding)
        assert isinstance(filled, ContinuousSpeculative)
        return filled.validation_warning(self.transformer.num_tokens)

    def _filled(self, settings: MaskedAutoregressive, num_inference_steps: int | None = None) -> MaskedAutoregressive:
        """The settings, with this pipeline's defaults where they are None."""
        config = self.config
        steps = config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        return settings.filled(steps=steps, diffusion_steps=config.default_diffusion_steps)

    def image_grid(self) -> tuple[int, int | None]:
        """Pixels a side of an image, and tokens a side of its grid."""
        config = self.transformer.config
        return config.grid_size * config.patch_size * self.image_tokenizer.downsample_factor, config.grid_size

    def new_batch(self, max_images: int = 8) -> MaskedBatch:
        """A running batch that calls join and leave, whatever their prompts, settings and progress."""
        return MaskedBatch(self, MARSampler(self.transformer), max_images)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D), float32, of pixels (B, 3, side, side) in [-1, 1]."""
        return self.transformer.patchify(self.image_tokenizer.encode(pixels)).float()

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
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoding: MaskedAutoregressive | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MARPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        known_tokens: KnownTokens | None = None,
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 (or 0) turns it off.
            temperature: factor on the standard deviation of every denoising step; 0 adds no noise.
            num_inference_steps: calls of the transformer, 1 to the number of tokens; more give better images.
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: how tokens are sampled: `MaskedAutoregressive()` (the default) or `ContinuousSpeculative()`.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding; `transformer.unpatchify` turns them into
                latents.
            callback_on_step_end: called as (pipe, index, index, {"tokens": (B, L, D)}) after each step whose tokens are
                final; tokens that are not sampled yet are 0. "positions" (B, k) are those that the step sampled. It may
                return a dict with changed "tokens", with which sampling continues. With `ContinuousSpeculative` a step
                ends when its drafts are verified.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            known_tokens: tokens that are kept, of the shape of the result's; the others are sampled given these.

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
            num_inference_steps=num_inference_steps,
            decoding=decoding,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        is_speculative = isinstance(settings, ContinuousSpeculative)
        if validation_warning := self.validation_warning(settings):
            logger.warning(validation_warning)
        seconds: dict[str, float] = {}
        final = 0
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            call = {
                "generators": generators,
                "guidance_scale": guidance_scale,
                "temperature": temperature,
                "settings": settings,
                "known": known_tokens,
            }
            steps = 0
            with self.progress_bar(total=self.transformer.num_tokens) as progress:

                def on_step(step: int, tokens: torch.Tensor, positions: torch.Tensor) -> bool:
                    nonlocal final, steps
                    final += positions.shape[1]
                    progress.update(positions.shape[1])
                    names, tensors = callback_on_step_end_tensor_inputs, {"tokens": tokens, "positions": positions}
                    stopped = self.end_step(callback_on_step_end, steps, names, **tensors)
                    steps += 1
                    return stopped

                sampled = self._sample(condition, on_step, is_speculative, call)
            images = self.images_or_tokens(seconds, sampled.tokens, output_type)
        stats = _stats(sampled, final, seconds)
        return self.output(images, sampled.tokens, stats, prompts, return_dict)

    def _sample(
        self, condition: dict[str, torch.Tensor], on_step: Callable, is_speculative: bool, call: dict[str, Any]
    ) -> MaskedOutput:
        if not is_speculative:
            return masked_autoregressive(self.transformer, condition, on_step=on_step, **call)
        assert self.drafter is not None
        return continuous_speculative(
            self.transformer,
            condition,
            draft=self.drafter,
            on_step=on_step,
            on_draft=lambda *_: self._interrupt,
            **call,
        )


def _stats(sampled: MaskedOutput, final: int, seconds: dict[str, float]) -> DecodingStats:
    return DecodingStats(
        target_calls=sampled.target_calls,
        tokens=len(sampled.tokens) * final,
        mean_accepted_length=final / max(1, sampled.target_calls),
        seconds=with_parts(seconds, sampled.seconds),
        acceptance=sampled.acceptance if isinstance(sampled, ContinuousOutput) else None,
    )
