"""What belongs to each image of a call: its prompt or class, and its random stream."""

from collections.abc import Sequence
from typing import Any

import torch

from studio.errors import StudioError


def of_each_image(subjects: Any, num_images_per_prompt: int) -> list:
    """The prompt or class of every image, from one or a list of them; images of one prompt are adjacent."""
    return [subject for subject in listed(subjects) for _ in range(num_images_per_prompt)]


def listed(subjects: Any) -> list:
    """One prompt or class, or several, as a list."""
    return list(subjects) if isinstance(subjects, list | tuple) else [subjects]


def image_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int, device: torch.device
) -> list[torch.Generator]:
    """One random stream per image.

    Args:
        generator: a list is used as it is; a single generator serves the first image and seeds streams for the others;
            None seeds every stream from torch's global generator.
        batch: number of images.
        device: of new streams.

    Raises:
        StudioError: a list of another length, or something other than generators.
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


def _seeded(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)
