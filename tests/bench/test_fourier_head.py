"""Heads trained on frozen states: the states are what the head meets in training, and both kinds learn."""

import numpy as np
import pytest
import torch

from studio import StudioError
from studio.bench import fourier_head as bench
from studio.bench.guidance import bench_guidance
from studio.data.source import Examples
from studio.models.fourier_head import FourierHead


class Random(Examples):
    """Random images of one caption."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 12

    def images(self, indices):
        rng = torch.Generator().manual_seed(0)
        return torch.rand(12, 3, self.size, self.size, generator=rng)[torch.tensor(indices)] * 2 - 1

    def captions(self, indices, rng=None):
        return ["a red apple"] * len(indices)


def test_both_heads_learn_from_the_same_states(tiny_bridge_pipeline):
    pipe = tiny_bridge_pipeline
    side = pipe.transformer.config.grid_size * pipe.image_tokenizer.downsample_factor
    states, levels = bench.frozen_states(pipe, Random(side), 12, np.random.default_rng(0))
    cells = int(0.7 * pipe.transformer.num_tokens)  # as many as are always masked
    assert len(states) == len(levels) == 12 * cells and levels.shape[1] == pipe.transformer.config.token_dim
    before = [weight.clone() for weight in pipe.transformer.parameters()]
    nats = {}
    for frequencies in (0, 2):
        head = bench._new_head(pipe.transformer, frequencies, seed=0)
        assert all(isinstance(layer, FourierHead) == bool(frequencies) for layer in head.channel_heads)
        untrained = bench._measured(head, states, levels)[0]
        bench._train(head, states, levels, 60, 32, 3e-3, seed=0)
        nats[frequencies], roughness = bench._measured(head, states, levels)
        assert nats[frequencies] < untrained - 0.05 and roughness > 0
    assert nats[0] != nats[2]
    own = bench._row("own", pipe.transformer.head, (states, levels), (states, levels))
    assert own["nats"] == own["train_nats"] > nats[0]
    assert all(torch.equal(*pair) for pair in zip(before, pipe.transformer.parameters(), strict=True))


def test_other_models_and_scales_are_refused():
    with pytest.raises(StudioError, match="no text-conditional TokenBridge"):
        bench.bench_fourier_head("emoji-vq", device="cpu")
    with pytest.raises(StudioError, match="is not text-conditional"):
        bench_guidance(["emoji-vq"], device="cpu")
    with pytest.raises(StudioError, match="above 1"):
        bench_guidance(["emoji-vq"], scales=[1.0])
