"""Pairs that a student of Distilled Decoding (arXiv:2412.17153) learns from, made once and kept on disk.

A pair is a caption or a class of the training data, a row of Gaussian noise, and the tokens to which the teacher and
the noise map lead. Only the tokens are stored, in files of `CHUNK` pairs, so that an interrupted run goes on where it
stopped.
"""

import hashlib
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.data.source import Source
from studio.decoding.autoregressive import Autoregressive
from studio.decoding.distilled import sample_pairs
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.files import cache_folder
from studio.training.caches import write_array

CHUNK = 128
_SEED = 2412


class Pairs:
    """The pairs of one teacher.

    Args:
        pipe: the teacher's pipeline; its own guidance and filters are what a student learns.
        source: where captions or classes come from.
    """

    def __init__(self, pipe: Any, source: Source):
        self.pipe, self.source = pipe, source
        self.codebook = pipe.image_tokenizer.codebook.detach().float()
        config = pipe.config
        self.guidance_scale = config.default_guidance_scale
        self.decoding = Autoregressive(guidance_schedule=config.default_guidance_schedule)
        self.sampling = Sampling(
            temperature=config.default_temperature, top_k=config.default_top_k, top_p=config.default_top_p
        )
        self.folder = cache_folder() / f"pairs-{self._key()}"

    def inputs(self, number: int) -> tuple[str | int, np.ndarray]:
        """Caption or class, and noise (n, C), of a pair."""
        rng = np.random.default_rng((_SEED, number))
        index = [int(rng.integers(len(self.source.train)))]
        subject: str | int
        if self.pipe.takes_text:
            subject = self.source.train.captions(index, rng)[0]
        else:
            subject = int(self.source.train.labels(index)[0])
        shape = (self.pipe.transformer.num_tokens, self.codebook.shape[1])
        return subject, rng.standard_normal(shape, dtype=np.float32)

    def condition(self, subjects: list) -> dict[str, torch.Tensor]:
        """What the teacher and the student are given for captions or classes, in float32."""
        name = "prompt" if self.pipe.takes_text else "class_labels"
        given = self.pipe.condition(**{name: list(subjects)})
        return {key: value.float() if value.is_floating_point() else value for key, value in given.items()}

    def tokens(self, count: int) -> torch.Tensor:
        """Tokens (count, n), int64, of the first pairs; those that are not on disk yet are sampled."""
        chunks, noise_map = [], NoiseMap(self.codebook)
        for chunk in tqdm(range(-(-count // CHUNK)), desc="pairs", unit="chunk"):
            file = self.folder / f"{chunk:05}.npy"
            if not file.is_file():
                write_array(file, self._sampled(chunk, noise_map))
            chunks.append(np.load(file))
        return torch.from_numpy(np.concatenate(chunks)[:count].astype(np.int64))

    def _sampled(self, chunk, noise_map):
        subjects, noise = zip(*(self.inputs(chunk * CHUNK + index) for index in range(CHUNK)))
        teacher = self.pipe.transformer
        condition = {
            name: value.to(teacher.dtype) if value.is_floating_point() else value
            for name, value in self.condition(subjects).items()
        }
        tokens = sample_pairs(
            teacher,
            condition,
            torch.from_numpy(np.stack(noise)).to(teacher.device),
            noise_map,
            sampling=self.sampling,
            guidance_scale=self.guidance_scale,
            settings=self.decoding,
        )
        return tokens.cpu().numpy().astype(np.uint16)

    def _key(self):
        """Of everything that the tokens follow from: data, weights, codebook, guidance, filters."""
        how = f"{self.guidance_scale} {self.decoding.guidance_schedule} {self.sampling}"
        found = hashlib.sha256(f"{self.source.checksum} {how} {CHUNK}".encode())
        for module in (self.pipe.text_encoder, self.pipe.transformer):
            for name, weight in sorted(module.state_dict().items()) if module is not None else ():
                found.update(name.encode() + weight.detach().float().cpu().numpy().tobytes())
        found.update(self.codebook.cpu().numpy().tobytes())
        return found.hexdigest()[:16]
