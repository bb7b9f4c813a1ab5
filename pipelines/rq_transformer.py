"""Words or a class to images with RQ-Transformer (arXiv:2203.01941): stacks of residual codes, one after another."""

from collections.abc import Callable

import torch

from studio.decoding.rq_transformer import RQDecoding, rq_decoding
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.models.rq_transformer import RQTransformer
from studio.pipelines.base import timed
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.pipelines.prompt_completion import check_prompt_completion
from studio.pipelines.residual import ResidualPipeline, first_difference
from studio.tokenizers.rvq import RVQTokenizer


def incompatibility(tokenizer: RVQTokenizer, transformer: dict) -> str | None:
    """What keeps a tokenizer from a transformer of this configuration, in words; None where they fit."""
    side, cell, codes = tokenizer.config.sample_size, tokenizer.pixels_per_cell, transformer["vocab_size"]
    sampled = [codes] * transformer["depth"] if isinstance(codes, int) else list(codes)
    compared = [
        ("levels", tokenizer.config.depth, transformer["depth"]),
        ("rows and columns of cells", [side // pixels for pixels in cell], list(transformer["grid"])),
        ("codes of each level", [len(table) for table in tokenizer.codebooks], sampled),
    ]
    if transformer["spatial_reads_codes"] or transformer["depth_reads_codes"]:
        compared.append(("code vectors of length", tokenizer.codebooks[0].shape[1], transformer["code_dim"]))
    return first_difference(compared)


class RQTransformerPipeline(ResidualPipeline):
    """Samples images cell by cell, and each cell level by level.

    A call of the transformer, in the stats, is one of the spatial transformer: it gives a whole stack of codes, each of
    which is a call of the small depth transformer.

    Args:
        image_tokenizer: gives the transformer its code vectors, and decodes codes to pixels.
        transformer: samples codes; conditional on a class (of one, without a condition) or on a text encoder.
        text_encoder: any encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer that goes with it.
        default_guidance_scale, default_temperature, default_top_k, default_top_p: used where a call leaves them out.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: what is chosen at random for an image where its prompt leaves it open, and said in the
            output's
            `prompts`; see `fill_unspecified`.

    Errors: `StudioError` for a transformer with words of its own, which have no text tokenizer here.
    """

    model_cpu_offload_seq = "text_encoder"
    _exclude_from_cpu_offload = ["image_tokenizer", "transformer"]

    def __init__(
        self,
        image_tokenizer: RVQTokenizer,
        transformer: RQTransformer,
        text_encoder=None,
        tokenizer=None,
        default_guidance_scale: float = 1.0,
        default_temperature: float = 1.0,
        default_top_k: int = 0,
        default_top_p: float = 1.0,
        lowercase_prompts: bool = False,
        prompt_completion: list[dict] | None = None,
    ):
        super().__init__()
        if transformer.config.caption_words is not None:
            raise StudioError(
                "This RQ-Transformer reads words as numbers of its own, which no pipeline can tell: sample with "
                "studio.decoding.rq_transformer, or take one of classes or of a text encoder."
            )
        self.register_modules(
            image_tokenizer=image_tokenizer, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            default_guidance_scale=default_guidance_scale,
            default_temperature=default_temperature,
            default_top_k=default_top_k,
            default_top_p=default_top_p,
            lowercase_prompts=lowercase_prompts,
            prompt_completion=prompt_completion,
        )
        check_prompt_completion(prompt_completion)

    def check_call(
        self,
        prompt=None,
        *,
        class_labels=None,
        num_images_per_prompt=1,
        guidance_scale=None,
        temperature=None,
        top_k=None,
        top_p=None,
        decoding=None,
        output_type="pil",
        callback_inputs=("tokens",),
    ) -> tuple[float, Sampling | tuple[Sampling, ...], RQDecoding]:
        """Raises the `StudioError` that a call with these arguments would raise before it samples.

        Returns:
            What it would sample with: guidance scale, sampling (one for all levels, or one of each) and decoding, with
            this pipeline's defaults.
        """
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        if guidance_scale not in (0, 1) and not self.takes_text:
            raise StudioError("This model has no null class to guide with: leave out guidance_scale, or give 1.")
        if mismatch := incompatibility(self.image_tokenizer, self.transformer.config):
            raise StudioError(f"The parts of this pipeline do not fit together: {mismatch}.")
        if decoding is not None and not isinstance(decoding, RQDecoding):
            raise StudioError(f"RQ-Transformer samples with RQDecoding (rq) decoding, not {type(decoding).__name__}.")
        settings, depth = decoding or RQDecoding(), self.transformer.config.depth
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
        class_labels: int | list[int] | None = None,
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
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("tokens",),
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: words, at most 2,000 characters each, for a text-conditional model.
            class_labels: class numbers, for a class-conditional model; 0 for one without a condition.
            guidance_scale: classifier-free guidance (arXiv:2207.12598) of words; 1 (or 0) turns it off.
            temperature: 0 takes the likeliest code each time.
            top_k, top_p: keep the k likeliest codes (0: all), or those that hold probability p (1: all).
            generator: one per image, or one for all (each image then gets a stream of its own derived from it).
            decoding: `RQDecoding()`, which may say how each level is sampled.
            output_type: "pil", "np", "pt", or "tokens" for the codes alone.
            callback_on_step_end: called after each cell as (pipeline, cell, cell, {"tokens": codes (B, L, D)}), -1
                where nothing is sampled yet; may return a dict with "tokens" in which that cell is changed, from which
                sampling goes on.

        Returns:
            An `ImageTokenPipelineOutput` whose tokens are (B, L, D), -1 where an interrupted call did not come.

        Errors: `StudioError` for arguments that cannot be used, and for parts that do not fit.
        """
        guidance_scale, sampling, _ = self.check_call(
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
        self._interrupt = False
        seconds = {"prefill": 0.0}
        with timed(seconds, "total"):
            with timed(seconds, "text"):
                generators, condition, prompts = self.prepare_inputs(
                    prompt, class_labels, num_images_per_prompt, generator
                )
            with self.progress_bar(total=self.transformer.num_tokens) as progress, timed(seconds, "decode"):
                tokens = rq_decoding(
                    self.transformer,
                    condition["captions"] if self.takes_text else condition["class_labels"][:, None],
                    self.image_tokenizer.codebooks,
                    valid=condition.get("caption_mask"),
                    generators=generators,
                    sampling=sampling,
                    guidance_scale=guidance_scale,
                    on_cell=self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs),
                ).flatten(1, 2)
            with timed(seconds, "pixels"):
                images = tokens if output_type == "tokens" else self.decode_tokens(tokens, output_type)
        shown, depth = int((tokens >= 0).sum()), self.transformer.config.depth
        stats = DecodingStats(
            target_calls=shown // len(tokens) // depth,
            tokens=shown,
            mean_accepted_length=float(depth),
            seconds=seconds,
        )
        return self.output(images, tokens, stats, prompts, return_dict)
