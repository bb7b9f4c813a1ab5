"""Text- and class-conditional RQ-Transformer (arXiv:2203.01941): stacks of residual codes, cell by cell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio.decoding.rq_transformer import RQDecoding, rq_decoding
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.models.rq_transformer import RQTransformer
from studio.pipelines.base import first_difference, timed
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.pipelines.residual import ResidualPipeline
from studio.tokenizers.rvq import RVQTokenizer


def incompatibility(tokenizer: RVQTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    side, cell, codes = tokenizer.config.sample_size, tokenizer.pixels_per_cell, transformer["vocab_size"]
    sampled = [codes] * transformer["depth"] if isinstance(codes, int) else list(codes)
    compared = [
        ("levels", tokenizer.config.depth, transformer["depth"]),
        ("rows and columns of cells", [side // pixels for pixels in cell], list(transformer["grid"])),
        ("codes of each level", [len(table) for table in tokenizer.codebooks], sampled),
    ]
    if transformer["spatial_reads_codes"] or transformer["depth_reads_codes"]:
        compared.append(("code vectors of length", tokenizer.codebooks[0].shape[1], transformer["code_dim"]))
    return first_difference(*compared)


class RQTransformerPipeline(ResidualPipeline):
    """Samples images cell by cell, and each cell level by level.

    The stats count calls of the spatial transformer. Each gives a whole stack of codes, with one call of the small
    depth transformer per code.

    Args:
        image_tokenizer: has the code vectors that the transformer reads, and decodes codes to pixels.
        transformer: samples codes; class-conditional (with one class: unconditional) or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        default_guidance_scale, default_temperature, default_top_k, default_top_p: used where a call leaves them out.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.

    Raises:
        StudioError: a transformer with word embeddings of its own (`caption_words`), for which there is no tokenizer.
    """

    model_cpu_offload_seq = "text_encoder"  # type: ignore[assignment]  # None in diffusers
    _exclude_from_cpu_offload = ["image_tokenizer", "transformer"]

    def __init__(
        self,
        image_tokenizer: RVQTokenizer,
        transformer: RQTransformer,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        default_guidance_scale: float = 1.0,
        default_temperature: float = 1.0,
        default_top_k: int = 0,
        default_top_p: float = 1.0,
        default_guidance_schedule: str = "constant",
        lowercase_prompts: bool = False,
        prompt_completion: list[dict] | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        if transformer.config.caption_words is not None:
            raise StudioError(
                "This RQ-Transformer has word embeddings of its own and no text tokenizer: sample with "
                "studio.decoding.rq_transformer, or use a model of classes or of a text encoder."
            )
        self.register_modules(
            image_tokenizer=image_tokenizer, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_defaults(
            default_guidance_scale=default_guidance_scale,
            default_temperature=default_temperature,
            default_top_k=default_top_k,
            default_top_p=default_top_p,
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
        decoding: RQDecoding | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, Sampling | tuple[Sampling, ...], RQDecoding]:
        """Checks the arguments of a call, whose meaning is that of `__call__`.

        Returns:
            What the call would sample with, defaults filled in: guidance scale, sampling (one, or one for each
            level) and decoding.

        Raises:
            StudioError: arguments that the call cannot use, or components that do not fit together.
        """
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        if guidance_scale not in (0, 1) and not self.takes_text:
            raise StudioError(
                "This model has no null class, so it cannot use guidance: leave out guidance_scale, or give 1."
            )
        self.check_fit(incompatibility(self.image_tokenizer, self.transformer.config))
        if decoding is not None and not isinstance(decoding, RQDecoding):
            raise StudioError(f"RQ-Transformer samples with RQDecoding (rq) decoding, not {type(decoding).__name__}.")
        settings, depth = self.scheduled(decoding or RQDecoding(), guidance_scale), self.transformer.config.depth
        sampling = self.sampling(temperature, top_k, top_p)
        if settings.levels is None:
            return guidance_scale, sampling, settings
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if twice := [name for name, value in given.items() if value is not None]:
            raise StudioError(f"The levels of RQDecoding have their own sampling: leave out {', '.join(twice)}.")
        if len(settings.levels) != depth:
            raise StudioError(f"This model has {depth} levels; RQDecoding has {len(settings.levels)}.")
        return guidance_scale, settings.levels, settings

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
        decoding: RQDecoding | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["RQTransformerPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model; 0 for an unconditional one.
            guidance_scale: classifier-free guidance (arXiv:2207.12598), for text only; 1 (or 0) turns it off.
            temperature: 0 takes the likeliest code each time.
            top_k, top_p: keep the k likeliest codes (0: all), or the nucleus of probability p (1: all).
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: `RQDecoding()`, which may have a sampling for each level.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding.
            callback_on_step_end: called after each cell as (pipe, cell, cell, {"tokens": codes (B, L, D)}), -1 where
                nothing is sampled yet; may return a dict with "tokens" in which that cell is changed, with which
                sampling continues.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.

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
        seconds = {"prefill": 0.0}
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            with self.progress_bar(total=self.transformer.num_tokens) as progress, timed(seconds, "decode"):
                tokens = rq_decoding(
                    self.transformer,
                    condition["captions"] if self.takes_text else condition["class_labels"][:, None],
                    self.image_tokenizer.codebooks,
                    valid=condition.get("caption_mask"),
                    generators=generators,
                    sampling=sampling,
                    guidance_scale=guidance_scale,
                    guidance_schedule=settings.guidance_schedule,
                    on_step=self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs),
                ).flatten(1, 2)
            images = self.images_or_tokens(seconds, tokens, output_type)
        shown, depth = int((tokens >= 0).sum()), self.transformer.config.depth
        stats = DecodingStats(
            target_calls=shown // len(tokens) // depth,
            tokens=shown,
            mean_accepted_length=float(depth),
            seconds=seconds,
        )
        return self.output(images, tokens, stats, prompts, return_dict)
