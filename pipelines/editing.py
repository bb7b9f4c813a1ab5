"""In- and outpainting and variations, with any pipeline whose model can be given tokens.

Cells outside the mask are known to the model before sampling begins (`studio.decoding.sampling.KnownTokens`). For
masked models (MAR, TokenBridge, ResGen) that is exact conditioning. A LlamaGen samples in raster order, given the
tokens before a position only: the part of an image below its top is continued exactly, and `approximate` says where
known tokens came too late to matter. Of a row of tokens, coarse to fine, the first ones are kept, which hold the coarse
look.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from PIL import Image

from studio.decoding.sampling import KnownTokens
from studio.errors import StudioError
from studio.pipelines.canvas import EDIT_DEFAULTS, EditRequest, Window, blended, fill_hidden, hidden_cells, resized
from studio.pipelines.class_labels import ClassLabels
from studio.pipelines.output import DecodingStats, Images, ImageTokenPipelineOutput
from studio.pipelines.streams import image_generators, listed, of_each_image


class EditingMixin:
    """Gives a pipeline's call the fields of an `EditRequest`: `pipe(prompt, image=..., mask_image=...)`."""

    transformer: Any
    image_tokenizer: Any
    edits_in_any_order = True
    """Whether sampled tokens are conditioned on all known ones, and not only on those before them."""

    def image_grid(self) -> tuple[int, int | None]:
        """Pixels a side of an image, and cells a side of its grid; None for a row.

        Raises:
            StudioError: this kind of model cannot be given tokens.
        """
        raise self._whole_images_only()

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The tokens (B, L) or (B, L, D) of pixels (B, 3, side, side) in [-1, 1].

        Raises:
            StudioError: as of `image_grid`.
        """
        raise self._whole_images_only()

    def _whole_images_only(self) -> StudioError:
        return StudioError(
            f"{type(self).__name__} generates whole images only: edit with a MAR, TokenBridge, ResGen or LlamaGen."
        )

    def variations(self, image: Any, strength: float = 0.5, **options: Any) -> ImageTokenPipelineOutput | tuple:
        """Images like one: redraws a share of its cells, or of a row the tokens at its end.

        Args:
            image: as of `EditRequest`.
            strength: the share, above 0 and below 1.
            options: as of the call; `prompt` or `class_labels` say what the image shows.
        """
        return self(image=image, strength=strength, **options)  # type: ignore[operator]  # pipelines can be called

    def edit(
        self,
        request: EditRequest,
        call: Callable,
        prompt: str | list[str] | None = None,
        *,
        class_labels: ClassLabels = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **options: Any,
    ) -> ImageTokenPipelineOutput | tuple:
        """Redraws what a request says, window by window.

        Args:
            request: image, mask and the like.
            call: the pipeline's call without them.
            prompt, class_labels, num_images_per_prompt, generator, output_type, return_dict, options: of the call.

        Returns:
            As of the call. Images have the size of the request's, expanded; tokens are those of the last window, and
            costs those of all.

        Raises:
            StudioError: a request or arguments that cannot be used.
        """
        side, grid = self.image_grid()
        if options.get("known_tokens") is not None:
            raise StudioError("Tokens are given twice: leave out known_tokens, or the image.")
        self.check_call(  # type: ignore[attr-defined]  # every pipeline has one
            prompt,
            class_labels=class_labels,
            num_images_per_prompt=num_images_per_prompt,
            output_type=output_type,
            **{name: value for name, value in options.items() if not name.startswith("callback")},
        )
        placed = [request.mask_image, request.expand or None, request.padding_mask_crop, request.soft_edge]
        if grid is None and any(value is not None for value in placed):
            raise StudioError(
                "The tokens of this model are a row and have no places: leave out mask_image, expand, "
                "padding_mask_crop and soft_edge, and give a strength below 1, which keeps the first tokens."
            )
        canvas, mask = request.canvas()
        prompts, labels = (
            None if subjects is None else of_each_image(subjects, num_images_per_prompt)
            for subjects in (prompt, class_labels)
        )
        count = len(listed(prompts or labels))
        generators = image_generators(generator, count, self.transformer.device)
        images, outputs, approximate = canvas.expand(count, -1, -1, -1).clone(), [], False
        windows = [(Window(0, 0, *mask.shape), mask)] if grid is None else list(request.windows(mask))
        for window, hidden in windows:
            before = window.of(images)
            pixels = before if request.strength < 1 else fill_hidden(before, ~hidden[None, None])
            tokens = self._encoded(resized(pixels, side, side))
            cells = hidden_cells(hidden, grid, tokens.shape[1], request.strength, generators)
            known = KnownTokens(tokens, ~cells.to(tokens.device))
            out = call(
                self,
                prompts,
                class_labels=labels,
                generator=generators,
                output_type="pt",
                known_tokens=known,
                **options,
            )
            prompts = out.prompts
            sampled = resized(out.images.float().cpu(), window.height, window.width)
            edge = (
                request.soft_edge if request.soft_edge is not None else -(-window.width // (2 * (grid or window.width)))
            )
            before[:] = blended(sampled, before, hidden, edge)
            outputs.append(out)
            approximate |= not (self.edits_in_any_order or known.is_prefix)
            if self._interrupt:  # type: ignore[attr-defined]  # set by the pipeline
                break
        tokens, stats = outputs[-1].tokens, _sum_of([out.stats for out in outputs])
        shown = tokens if output_type == "tokens" else _images_of(images, output_type)
        if not return_dict:
            return shown, tokens, stats
        return ImageTokenPipelineOutput(
            images=shown, tokens=tokens, stats=stats, prompts=prompts, approximate=approximate
        )

    @torch.no_grad()
    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Tokens of pixels (B, 3, side, side) in [0, 1], on a CPU one image at a time, as they are decoded."""
        tokenizer = self.image_tokenizer
        pixels = (2 * pixels - 1).to(tokenizer.device, tokenizer.dtype)
        parts = pixels.split(1) if pixels.device.type == "cpu" else [pixels]
        return torch.cat([self.encode_pixels(part) for part in parts])


def _images_of(pixels: torch.Tensor, output_type: str) -> Images:
    if output_type == "pt":
        return pixels
    if output_type == "np":
        return pixels.permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in (255 * pixels).round().byte().permute(0, 2, 3, 1).numpy()]


def _sum_of(parts: list[DecodingStats]) -> DecodingStats:
    """The costs of several calls as those of one; rates are means over calls of the transformer."""
    calls = sum(part.target_calls for part in parts)

    def mean(name: str) -> float | None:
        if getattr(parts[0], name) is None:
            return None
        return sum(getattr(part, name) * part.target_calls for part in parts) / max(1, calls)

    return DecodingStats(
        target_calls=calls,
        tokens=sum(part.tokens for part in parts),
        mean_accepted_length=mean("mean_accepted_length") or 0.0,
        seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        acceptance=mean("acceptance"),
        decoding=parts[-1].decoding,
        window=parts[-1].window,
    )


def with_editing(call: Callable) -> Callable:
    """Wraps a pipeline's `__call__` so that it takes the fields of an `EditRequest` as keywords, too."""
    signature = inspect.signature(call)
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return call  # of a subclass, which passes what it does not know on to its base

    @wraps(call)
    def editing(self: EditingMixin, *args: Any, **kwargs: Any) -> ImageTokenPipelineOutput | tuple:
        given = {name: kwargs.pop(name) for name in EDIT_DEFAULTS if name in kwargs}
        unused = [value is None or (name == "strength" and value == 1) for name, value in given.items()]
        if all(unused):
            return call(self, *args, **kwargs)
        return self.edit(EditRequest(**given), call, *args, **kwargs)

    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=EDIT_DEFAULTS[name]) for name in EDIT_DEFAULTS
    ]
    editing.__signature__ = signature.replace(  # type: ignore[attr-defined]  # inspect reads it
        parameters=[*signature.parameters.values(), *fields]
    )
    editing.__doc__ = (call.__doc__ or "").replace("\n\n        Returns:", f"\n{_ARGUMENTS}\n\n        Returns:", 1)
    return editing


_ARGUMENTS = inspect.cleandoc(EditRequest.__doc__ or "").partition("Args:\n")[2].partition("\n\nRaises:")[0]
_ARGUMENTS = "\n".join(f"        {line}".rstrip() for line in _ARGUMENTS.splitlines())
