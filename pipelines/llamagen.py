"""Text- and class-conditional LlamaGen (arXiv:2406.06525): text encoder, token model and image tokenizer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from studio import backends
from studio.checks import check_integer
from studio.decoding.autoregressive import Autoregressive, autoregressive
from studio.decoding.distilled import Distilled, DistilledOutput, distilled
from studio.decoding.fastest_exact import FastestExact, fastest_exact
from studio.decoding.jacobi import Jacobi, jacobi
from studio.decoding.sampling import KnownTokens, Sampled, Sampling
from studio.decoding.speculative import Speculative, speculative
from studio.errors import StudioError
from studio.models.distilled import DistilledStudent
from studio.models.drafter import Drafter
from studio.models.llamagen import LlamaGen
from studio.pipelines.base import ConditionalPipeline, Images, dtype_of, timed
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.continuous import LlamaGenBatch
from studio.pipelines.output import DecodingStats, ImageTokenPipelineOutput
from studio.tokenizers.one_d_piece import OneDPieceTokenizer
from studio.tokenizers.vq import VQTokenizer


def incompatibility(tokenizer: VQTokenizer | OneDPieceTokenizer, transformer: Mapping[str, Any]) -> str | None:
    """Why a tokenizer does not fit a transformer of this configuration, as a clause; None where it fits."""
    codes, vocabulary = tokenizer.config.codebook_size, transformer["vocab_size"]
    if codes != vocabulary:
        return f"the image tokenizer has {codes} codes but the transformer samples from {vocabulary}"
    row, sampled = (length and f"a row of {length}" for length in (tokenizer.row_length, transformer["row_length"]))
    if row != sampled:
        return f"the image tokenizer's tokens are {row or 'a grid'}, those of the transformer {sampled or 'a grid'}"
    return None


class LlamaGenPipeline(ConditionalPipeline):
    """Samples images token by token.

    Args:
        image_tokenizer: decodes tokens to pixels: a grid, or a row from coarse to fine whose first tokens are an image.
        transformer: samples tokens; class- or text-conditional.
        text_encoder: an encoder with the interface of `T5EncoderModel`; only for a text-conditional transformer.
        tokenizer: the text tokenizer of that encoder.
        drafter: drafts tokens for `Speculative` and `Lantern` decoding.
        student: a student distilled from the transformer, for `Distilled` decoding.
        default_guidance_scale, default_temperature, default_top_k, default_top_p: used where a call leaves them out.
        default_guidance_schedule: "constant" or "linear", where a decoding's settings leave it open; see
            `studio.decoding.autoregressive`.
        lowercase_prompts: whether prompts are lowercased first, as for the published text-conditional weights.
        prompt_completion: phrases sampled for what a prompt leaves unspecified; see `fill_unspecified`. The completed
            prompts are in the output.
        id2label: names of classes by number, of a class-conditional model: `{207: "golden retriever"}`.
    """

    drafter: Drafter | None
    student: DistilledStudent | None
    model_cpu_offload_seq = "text_encoder->transformer->student->image_tokenizer"  # type: ignore[assignment]  # None in diffusers
    _exclude_from_cpu_offload = ["drafter"]
    _optional_components = ["text_encoder", "tokenizer", "drafter", "student"]
    _callback_tensor_inputs = ["tokens"]

    def __init__(
        self,
        image_tokenizer: VQTokenizer | OneDPieceTokenizer,
        transformer: LlamaGen,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        drafter: Drafter | None = None,
        student: DistilledStudent | None = None,
        default_guidance_scale: float = 4.0,
        default_temperature: float = 1.0,
        default_top_k: int = 0,
        default_top_p: float = 1.0,
        default_guidance_schedule: str = "constant",
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
            student=student,
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
        if drafter is not None:
            drafter.read_embeddings(transformer)

    def check_num_tokens(self, num_tokens: int | None) -> None:
        """Raises a `StudioError` for a number of tokens that this model cannot decode to an image."""
        if num_tokens is None:
            return
        row = self.transformer.config.row_length
        if row is None:
            raise StudioError(
                "num_tokens is for rows of tokens, coarse to fine: this model samples a grid, so leave it out."
            )
        check_integer("num_tokens", num_tokens, 1, row)

    def check_distilled(self, settings: Distilled, given: list[str]) -> None:
        """Raises a `StudioError` if no student fits, or if a student cannot use these arguments.

        Args:
            settings: of the call.
            given: names of the arguments of the call that apply to the transformer's sampling.
        """
        if self.student is None:
            raise StudioError(
                "Distilled decoding needs a student and this pipeline has none: use emoji-ar, convert the model with "
                "--student, or build the pipeline with student=, a DistilledStudent."
            )
        ours, teacher = self.student.config, self.transformer.config
        for name in ("vocab_size", "grid_size", "row_length", "num_classes", "caption_dim", "caption_length"):
            if ours[name] != teacher[name]:
                raise StudioError(f"The student has {name} {ours[name]}, the transformer {teacher[name]}: use its own.")
        if ours.code_dim != self.image_tokenizer.config.code_dim:
            raise StudioError(
                f"The student samples vectors of {ours.code_dim} numbers, "
                f"the image tokenizer reads {self.image_tokenizer.config.code_dim}: use the one it was made with."
            )
        if given and settings.teacher_steps is None:
            raise StudioError(
                f"Distilled decoding does not use {', '.join(given)}: "
                "leave that out, or let the teacher sample some tokens (teacher_steps)."
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
        cfg_interval: int = -1,
        num_tokens: int | None = None,
        decoding: Autoregressive | Jacobi | FastestExact | Speculative | Distilled | None = None,
        output_type: str = "pil",
        callback_inputs: Sequence[str] = ("tokens",),
    ) -> tuple[float, Sampling, Autoregressive | Jacobi | FastestExact | Speculative | Distilled]:
        """Checks the arguments of a call, whose meaning is that of `__call__`.

        Returns:
            What the call would sample with: guidance scale, sampling and decoding, with this pipeline's defaults.

        Raises:
            StudioError: arguments that the call cannot use, or components that do not fit together.
        """
        cfg_interval = check_integer("cfg_interval", cfg_interval, -1)
        steering = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        steering["cfg_interval"] = None if cfg_interval == -1 else cfg_interval
        guidance_scale = self.checked_guidance(
            prompt, class_labels, num_images_per_prompt, guidance_scale, output_type, callback_inputs
        )
        self.check_fit(incompatibility(self.image_tokenizer, self.transformer.config))
        self.check_num_tokens(num_tokens)
        if cfg_interval != -1 and guidance_scale in (0, 1):
            raise StudioError(
                f"The guidance scale is {guidance_scale:g}, which is no guidance: give another one, or leave "
                "cfg_interval out."
            )
        settings = Autoregressive() if decoding is None else decoding
        if isinstance(settings, Distilled):
            self.check_distilled(settings, [name for name, value in steering.items() if value is not None])
            settings.reports_for(self.student, num_tokens)
        elif isinstance(settings, Speculative):
            settings.rule(self.image_tokenizer.quantize.embedding.weight)
        elif not isinstance(settings, (Autoregressive, Jacobi, FastestExact)):
            raise StudioError(
                "LlamaGen samples with Autoregressive (ar), FastestExact (exact), Jacobi (jacobi), Speculative "
                "(speculative), Lantern (lantern), LanternPlusPlus (lantern++) or Distilled (distilled) decoding, "
                f"not {type(settings).__name__}."
            )
        if not isinstance(settings, Distilled) or settings.teacher_steps is not None:
            settings = self.scheduled(settings, guidance_scale)
        sampling = self.sampling(temperature, top_k, top_p, settings.filter_order)
        return guidance_scale, sampling, settings

    edits_in_any_order = False

    def image_grid(self) -> tuple[int, int | None]:
        """Pixels a side of an image, and tokens a side of its grid; None for a row."""
        side = self.transformer.config.grid_size
        if side is None:
            return self.image_tokenizer.config.sample_size, None
        return side * self.image_tokenizer.downsample_factor, side

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens (B, L) of pixels (B, 3, side, side) in [-1, 1]."""
        return self.image_tokenizer.encode(pixels).flatten(1)

    def new_batch(self, max_images: int = 8) -> LlamaGenBatch:
        """A running batch that calls join and leave, whatever their prompts, settings and progress."""
        return LlamaGenBatch(self, max_images)

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor, output_type: str = "pil") -> Images:
        """Decodes the first tokens of images.

        Args:
            tokens: (B, n) int64. Missing tokens of a grid repeat the first one; of a row, any n from 1 on are an image.
            output_type: "pil" truncates 127.5 x + 128 to bytes, "np" and "pt" are in [0, 1].
        """
        decode = backends.select_pixels(self.image_tokenizer).decode
        return self.decoded_images(decode, self._to_layout(tokens), output_type)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Images:
        """Decodes the first code vectors (B, n, code_dim) of images, as `decode_tokens`."""
        vectors = self._to_layout(latents.to(dtype_of(self.image_tokenizer)))
        return self.decoded_images(backends.select_pixels(self.image_tokenizer).decode_vectors, vectors, output_type)

    def _to_layout(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first tokens or vectors (B, n, ...) in the image tokenizer's layout: a row, or a grid (B, h, w, ...)."""
        side = self.transformer.config.grid_size
        if side is None:
            return tokens
        missing = tokens[:, :1].repeat_interleave(side**2 - tokens.shape[1], dim=1)
        return torch.cat((tokens, missing), dim=1).unflatten(1, (side, side))

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
        cfg_interval: int = -1,
        num_tokens: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        decoding: Autoregressive | Jacobi | FastestExact | Speculative | Distilled | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[["LlamaGenPipeline", int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("tokens",),
        known_tokens: KnownTokens | None = None,
    ) -> ImageTokenPipelineOutput | tuple:
        """Samples `num_images_per_prompt` images for each prompt or class.

        Args:
            prompt: text, at most 2,000 characters each, for a text-conditional model.
            class_labels: classes by number or by name, for a class-conditional model.
            guidance_scale: classifier-free guidance (arXiv:2207.12598); 1 (or 0) turns it off.
            temperature: at least 0; 0 takes the likeliest token each time.
            top_k, top_p: keep the k likeliest tokens (0: all), or the nucleus of probability p (1: all).
            cfg_interval: index of the last token but one that is guided; -1 guides all.
            num_tokens: how many tokens to sample of a row, coarse to fine; all when None.
            generator: one per image, or one from which a random stream for each image is derived.
            decoding: how tokens are sampled: `Autoregressive()` (the default), `Jacobi()`, `FastestExact()`,
                `Speculative()`, `Lantern()`, `LanternPlusPlus()` or `Distilled()`. The last uses guidance and filters
                only for its `teacher_steps`.
            output_type: "pil", "np", "pt", or "tokens", which skips decoding.
            callback_on_step_end: called as (pipe, index, index, {"tokens": (B, index + 1)}) when all images have
                a token more; may return a dict with a changed last token in "tokens", with which sampling continues. A
                student's call samples all tokens at once, and any of them may be changed; index is that of the last.
            callback_on_step_end_tensor_inputs: names of the tensors that the callback gets.
            known_tokens: tokens that are kept, of the shape of the result's; the others are sampled given these.

        Returns:
            An `ImageTokenPipelineOutput`, or with `return_dict=False` a tuple of images, tokens and stats.

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
            cfg_interval=cfg_interval,
            num_tokens=num_tokens,
            decoding=decoding,
            output_type=output_type,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )
        seconds: dict[str, float] = {}
        with timed(seconds, "total"):
            inputs = self.begin(seconds, prompt, class_labels, num_images_per_prompt, generator)
            generators, condition, prompts = inputs
            total = num_tokens or self.transformer.num_tokens
            if isinstance(settings, Distilled):
                total = settings.reports_for(self.student, num_tokens)
            with self.progress_bar(total=total) as progress:
                on_step = self.step_reporter(progress, callback_on_step_end, callback_on_step_end_tensor_inputs)
                sampled = self._sample(
                    condition,
                    generators=generators,
                    sampling=sampling,
                    guidance_scale=guidance_scale,
                    cfg_interval=cfg_interval,
                    settings=settings,
                    num_tokens=num_tokens,
                    on_step=on_step,
                    editable=callback_on_step_end is not None,
                    known=known_tokens,
                )
            with timed(seconds, "pixels"):
                images = sampled.tokens if output_type == "tokens" else self._images(sampled, output_type)
        stats = _stats(sampled, seconds)
        return self.output(images, sampled.tokens, stats, prompts, return_dict)

    def _sample(
        self,
        condition: dict[str, torch.Tensor],
        *,
        settings: Autoregressive | Jacobi | FastestExact | Speculative | Distilled,
        num_tokens: int | None,
        editable: bool,
        **call: Any,
    ) -> Sampled:
        """Calls the loop of these settings; `editable`: whether `on_step` may change tokens."""
        call["settings"] = settings
        if isinstance(settings, Speculative):
            codebook = self.image_tokenizer.quantize.embedding.weight
            call |= {"codebook": codebook, "drafter": self.drafter, "num_tokens": num_tokens, "editable": editable}
            return speculative(self.transformer, condition, **call)
        if isinstance(settings, Distilled):
            if call.pop("known") is not None:
                raise StudioError("A student samples whole images in one call: edit with Speculative, Jacobi or plain.")
            codebook = self.image_tokenizer.codebook
            call |= {"codebook": codebook, "student": self.student, "steps": num_tokens}
            return distilled(self.transformer, condition, **call)
        if isinstance(settings, (Jacobi, FastestExact)):
            loop = jacobi if isinstance(settings, Jacobi) else fastest_exact
            return loop(self.transformer, condition, num_tokens=num_tokens, editable=editable, **call)
        return autoregressive(self.transformer, condition, num_tokens=num_tokens, **call)

    def _images(self, sampled: Sampled, output_type: str) -> Images:
        """Images of complete or interrupted samples."""
        if isinstance(sampled, DistilledOutput):
            assert sampled.latents is not None
            return self.decode_latents(sampled.latents, output_type)
        return self.decode_tokens(sampled.tokens, output_type)


def _stats(sampled: Sampled, seconds: dict[str, float]) -> DecodingStats:
    phases = {**seconds, **sampled.seconds}
    return DecodingStats(
        target_calls=sampled.target_calls,
        tokens=sampled.tokens.numel(),
        mean_accepted_length=sampled.mean_accepted_length,
        seconds={name: phases[name] for name in ("text", "prefill", "decode", "pixels", "total")},
        decoding=sampled.decoding,
        window=getattr(sampled, "window", None),
    )
