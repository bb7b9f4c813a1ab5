"""Text- and class-conditional TokenBridge (arXiv:2503.16430): masked cells, sampled dimension by dimension."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.decoding.sampling import KnownTokens, Sampling
from studio.decoding.token_bridge import DimensionWise, DimensionWiseSampler, dimension_wise
from studio.errors import StudioError
from studio.models.token_bridge import TokenBridge
from studio.pipelines.base import ConditionalPipeline, Images, first_difference, timed, with_parts
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.continuous_masked import MaskedBatch
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.tokenizers.token_bridge import TokenBridgeTokenizer


def incompatibility(tokenizer: TokenBridgeTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    return first_difference(
        ("tokens a cell", tokenizer.dimensions, transformer["token_dim"]),
        ("levels", tokenizer.config.levels, transformer["levels"]),
        ("as order of dimensions", list(tokenizer.config.dimension_order), list(transformer["dimension_order"])),
    )


class TokenBridgePipeline(ConditionalPipeline):
    """Samples images a few cells at a time.

    Args:
        image_tokenizer: has the values of levels, and decodes cells to pixels.
        transformer: samples cells; class- or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        default_guidance_scale, default_temperature, default_num_inference_steps: used where a call leaves them out.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->image_tokenizer"  # type: ignore[assignment]  # None in diffusers
    _optional_components = ["text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["tokens"]

    def __init__(
        self,
        image_tokenizer: TokenBridgeTokenizer,
        transformer: TokenBridge,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_guidance_scale: float = 3.0,
        default_temperature: float = 1.0,
        default_num_inference_steps: int = 64,
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
        top_k: int = 0,
        top_p: float = 1.0,
        decoding: DimensionWise | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, Sampling, DimensionWise]:
        """Checks the arguments of a call, whose meaning is that of `__call__`.

        Returns:
            What the call would sample with: guidance scale, sampling and decoding, with this pipeline's defaults.

        Raises:
            StudioError: arguments that the call cannot use, or components that do not fit together.
        """
        config = self.config
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        self.check_fit(incompatibility(self.image_tokenizer, self.transformer.config))
        if decoding is not None and not isinstance(decoding, DimensionWise):
            raise StudioError(
                f"TokenBridge samples with DimensionWise (bridge) decoding, not {type(decoding).__name__}."
            )
        settings = self.scheduled(decoding or DimensionWise(), guidance_scale)
        settings = settings.filled(steps=config.default_num_inference_steps)
        settings.plan(self.transformer.num_tokens)
        sampling = Sampling(config.default_temperature if temperature is None else temperature, top_k, top_p)
        return guidance_scale or 1.0, sampling, settings

    def image_grid(self) -> tuple[int, int | None]:
        """Pixels a side of an image, and cells a side of its grid."""
        side = self.transformer.config.grid_size
        return side * self.image_tokenizer.downsample_factor, side

    def new_batch(self, max_images: int = 8) -> MaskedBatch:
        """A running batch that calls join and leave, whatever their prompts, settings and progress."""
        return MaskedBatch(self, DimensionWiseSampler(self.transformer, self.image_tokenizer.level_values), max_images)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L, D) of pixels (B, 3, side, side) in [-1, 1]."""
        return self.image_tokenizer.encode(pixels).flatten(1, 2)

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor, output_type: str = "pil") -> Images:
        """Decodes tokens to images.

        Args:
            tokens: (B, L, D) int64; cells that are not sampled, -1, get the level nearest to 0 in all dimensions.
            output_type: "pil" truncates 127.5 x + 128 to bytes, "np" and "pt" are in [0, 1].
        """
        side = self.transformer.config.grid_size
        nothing = self.image_tokenizer.quantizer.encode(torch.zeros((), device=tokens.device))
        sampled = torch.where(tokens < 0, nothing, tokens)
        return self.decoded_images(self.image_tokenizer.decode, sampled.unflatten(1, (side, side)), output_type)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoding: DimensionWise | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["TokenBridgePipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        known_tokens: KnownTokens | None = None,
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598) at its maximum; 1 (or 0) turns it off.
            temperature: 0 takes the likeliest level each time.
            top_k, top_p: keep the k likeliest levels (0: all), or the nucleus of probability p (1: all).
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: `DimensionWise()`, the number of steps and the guidance schedule.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding.
            callback_on_step_end: called after each step as (pipe, step, step, {"tokens": tokens (B, L, D)}), -1 in
                cells that are not sampled yet.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            known_tokens: tokens that are kept, of the shape of the result's; the others are sampled given these.

        Returns:
            An `ImageTokenPipelineOutput` whose tokens are (B, L, D), -1 in cells that an interrupted call left out.

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
        plan = settings.plan(self.transformer.num_tokens)
        seconds: dict[str, float] = {}
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            with self.progress_bar(total=settings.steps) as progress:
                on_step = self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs)
                sampled = dimension_wise(
                    self.transformer,
                    self.image_tokenizer.level_values,
                    condition,
                    generators=generators,
                    sampling=sampling,
                    guidance_scale=guidance_scale,
                    settings=settings,
                    on_step=on_step,
                    known=known_tokens,
                )
            images = self.images_or_tokens(seconds, sampled.tokens, output_type)
        final = self.transformer.num_tokens - plan[sampled.target_calls - 1].first
        stats = DecodingStats(
            target_calls=sampled.target_calls,
            tokens=len(sampled.tokens) * final * self.transformer.config.token_dim,
            mean_accepted_length=final / sampled.target_calls,
            seconds=with_parts(seconds, sampled.seconds),
        )
        return self.output(images, sampled.tokens, stats, prompts, return_dict)
