"""Tokens and latents of every training image, computed once for data and tokenizer, and kept on disk."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.checkpoints.bundled import sha256
from studio.data.source import Examples, Source
from studio.errors import StudioError
from studio.files import cache_folder


def weights_of(tokenizer: Any) -> Path:
    """The weights file that an image tokenizer was loaded from."""
    return Path(tokenizer.config["_name_or_path"], "diffusion_pytorch_model.safetensors")


def cached_tokens(tokenizer: Any, source: Source) -> torch.Tensor:
    """Tokens (n, N), int64, of a source's training examples.

    The checksum of the weights file that the tokenizer was loaded from names the cache, together with the data's.
    """
    tokens = _cached(f"tokens-{_key(source, tokenizer)}", lambda: tokens_of(tokenizer, source.train).astype(np.uint16))
    return torch.from_numpy(np.asarray(tokens).astype(np.int64))


def cached_latents(tokenizer: Any, source: Source) -> torch.Tensor:
    """Means and standard deviations (n, 2, C, h, w), float16, of the latents of a source's training examples under a
    KL tokenizer, named as `cached_tokens`. They stay on disk and are read as they are needed.
    """
    latents = _cached(f"latents-{_key(source, tokenizer)}", lambda: latents_of(tokenizer, source.train))
    return torch.from_numpy(latents)


def tokens_of(tokenizer: Any, examples: Examples, count: int | None = None) -> np.ndarray:
    """Tokens (n, N) of the first `count` examples, all when None."""
    return _encoded(lambda images: tokenizer.encode(images).flatten(1), tokenizer, examples, "tokens", count)


def latents_of(tokenizer: Any, examples: Examples, count: int | None = None) -> np.ndarray:
    """Means and standard deviations (n, 2, C, h, w) of latents, as `tokens_of`."""

    def gaussians(images):
        gaussian = tokenizer.encode_distribution(images)
        return torch.stack((gaussian.mean, gaussian.std), dim=1).to(torch.float16)

    return _encoded(gaussians, tokenizer, examples, "latents", count)


@torch.inference_mode()
def _encoded(encode: Callable, tokenizer, examples, name, count, batch_size=128):
    count, parts = len(examples) if count is None else min(count, len(examples)), []
    for start in tqdm(range(0, count, batch_size), desc=name, unit="batch"):
        images = examples.images(range(start, min(start + batch_size, count)))
        parts.append(encode(images.to(tokenizer.device)).cpu().numpy())
    return np.concatenate(parts)


def _key(source, tokenizer):
    return hashlib.sha256((sha256(weights_of(tokenizer)) + source.checksum).encode()).hexdigest()[:16]


def _cached(name, compute):
    file = cache_folder() / f"{name}.npy"
    if not file.is_file():
        write_array(file, compute())
    return np.load(file, mmap_mode="c")


def write_array(file: Path, array: np.ndarray) -> None:
    """Write an array into the cache folder, whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < array.nbytes:
            raise OSError(f"{array.nbytes >> 20} MiB are needed")
        with open(partial, "wb") as stream:
            np.save(stream, array)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StudioError(
            f"{file.parent} cannot hold the cache of {file.stem.split('-')[0]} ({error.strerror or error}): free some "
            "space, or set STUDIO_CACHE to another folder."
        ) from error
