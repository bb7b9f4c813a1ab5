"""Words or a class to images with ResGen (arXiv:2412.10208): stacks of residual codes, in any number of calls."""

from collections.abc import Callable

import torch

from studio.decoding.resgen import DISTRIBUTIONS, ResGenDecoding, ResGenOutput, ResidualSteps, resgen_decoding
from studio.decoding.sampling import Sampling
from studio.errors import StudioError
from studio.models.resgen import ResGen
from studio.pipelines.base import timed
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.pipelines.prompt_completion import check_prompt_completion
from studio.pipelines.residual import ResidualPipeline, first_difference
from studio.tokenizers.rvq import RVQTokenizer


def incompatibility(tokenizer: RVQTokenizer, transformer: dict) -> str | None:
    """What keeps a tokenizer from a transformer of this configuration, in words; None where they fit."""
    config, tables = tokenizer.config, tokenizer.codebooks
    rows, columns = tokenizer.pixels_per_cell
    compared = [
        ("levels", config.depth, transformer["depth"]),
        ("code vectors of length", tables[0].shape[1], transformer["code_dim"]),
        ("cells", (config.sample_size // rows) * (config.sample_size // columns), transformer["num_positions"]),
    ]
    if transformer["prediction"] == "levels":
        compared += [("codes a level", len(table), transformer["vocab_size"]) for table in tables]
    return first_difference(compared)


class ResGenPipeline(ResidualPipeline):
    """Samples all levels of many cells at a time; the number of calls does not depend on the depth.

    Args:
        image_tokenizer: quantises what is predicted, and decodes codes to pixels.
        transformer: predicts what is hidden; class- or text-conditional.
        text_encoder: any encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer that goes with it.
        default_guidance_scale, default_temperature, default_top_k, default_top_p, default_num_inference_steps: used
            where a call
            leaves them out.
        lowercase_prompts: whether prompts are lowercased first.
        prompt_completion: what is chosen at random for an image where its prompt leaves it open, and said in the
            output's
            `prompts`; see `fill_unspecified`.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        image_tokenizer: RVQTokenizer,
        transformer: ResGen,
        text_encoder=None,
        tokenizer=None,
        default_guidance_scale: float = 3.0,
        default_temperature: float = 1.0,
        default_top_k: int = 0,
        default_top_p: float = 1.0,
        default_num_inference_steps: int = 16,
        lowercase_prompts: bool = False,
        prompt_completion: list[dict] | None = None,
    ):
        super().__init__()
        self.register_modules(
            image_tokenizer=image_tokenizer, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            default_guidance_scale=default_guidance_scale,
            default_temperature=default_temperature,
            default_top_k=default_top_k,
            default_top_p=default_top_p,
            default_num_inference_steps=default_num_inference_steps,
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
    ) -> tuple[float, Sampling, ResidualSteps]:
        """Raises the `StudioError` that a call with these arguments would raise before it samples.

        Returns:
            What it would sample with: guidance scale, sampling and decoding, with this pipeline's defaults.
        """
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        if mismatch := incompatibility(self.image_tokenizer, self.transformer.config):
            raise StudioError(f"The parts of this pipeline do not fit together: {mismatch}.")
        if decoding is not None and not isinstance(decoding, ResidualSteps):
            raise StudioError(
                "ResGen samples with ResGenDecoding (resgen) or FirstHitting (first-hitting) decoding, "
                f"not {type(decoding).__name__}."
            )
        settings = (decoding or ResGenDecoding()).filled(self.config.default_num_inference_steps)
        DISTRIBUTIONS[self.transformer.config.prediction].check(settings.scatter)
        settings.plan(self.transformer.num_tokens * self.transformer.config.depth)
        sampling = self.sampling(temperature, top_k, top_p)
        return guidance_scale or 1.0, sampling, settings

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
        decoding: ResidualSteps | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["ResGenPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("tokens",),
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: words, at most 2,000 characters each, for a text-conditional model.
            class_labels: class numbers, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598) at the last call, to which it rises from 1; 1
                (or 0) turns it off.
            temperature: of the choice of a component, and of the spread around its mean; 0 takes the likeliest mean.
            top_k, top_p: keep the k likeliest components (0: all), or those that hold probability p (1: all).
            generator: one per image, or one for all (each image then gets a stream of its own derived from it).
            decoding: which codes stay when, and after how many calls all do: `ResGenDecoding()` (when left out), the
                most confident first, or `FirstHitting()`, in a random order.
            output_type: "pil", "np", "pt", or "tokens" for the codes alone.
            callback_on_step_end: called after each step as (pipeline, step, step, {"tokens": codes (B, L, D)}), -1
                where nothing is shown yet; may return a dict with changed "tokens", from which sampling goes on.

        Returns:
            An `ImageTokenPipelineOutput` whose tokens are (B, L, D), -1 where an interrupted call did not come.

        Errors: `StudioError` for arguments that cannot be used, and for parts that do not fit.
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
        self._interrupt = False
        seconds: dict[str, float] = {}
        with timed(seconds, "total"):
            with timed(seconds, "text"):
                generators, condition, prompts = self.prepare_inputs(
                    prompt, class_labels, num_images_per_prompt, generator
                )
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
                )
            with timed(seconds, "pixels"):
                images = sampled.tokens if output_type == "tokens" else self.decode_tokens(sampled.tokens, output_type)
        stats = _stats(sampled, seconds)
        return self.output(images, sampled.tokens, stats, prompts, return_dict)


def _stats(sampled: ResGenOutput, seconds: dict[str, float]) -> DecodingStats:
    shown = int((sampled.tokens >= 0).sum())
    return DecodingStats(
        target_calls=sampled.target_calls,
        tokens=shown,
        mean_accepted_length=shown / len(sampled.tokens) / sampled.target_calls,
        seconds={**seconds, "prefill": 0.0, "decode": sum(sampled.seconds.values()), **sampled.seconds},
    )
