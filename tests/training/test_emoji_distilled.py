"""The student's recipe at a tiny size, its pairs, and a student that learns what independent tokens cannot know."""

import numpy as np
import pytest
import torch

from studio import LlamaGen
from studio.decoding.distilled import draw_pairs
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.models.distilled import DistilledStudent
from studio.training import emoji_distilled, pair_cache
from studio.training.emoji_distilled import EmojiDistilled, TrainableStudent
from studio.training.loop import Settings, train
from studio.training.pair_cache import Pairs


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_pipeline):
    """A tiny teacher and a dozen pairs."""
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji_distilled, "load", lambda name, device: tiny_pipeline.to(device))
    monkeypatch.setattr(emoji_distilled, "PAIRS", 6)
    monkeypatch.setattr(emoji_distilled, "HELD_OUT_PAIRS", 3)
    monkeypatch.setattr(pair_cache, "CHUNK", 4)
    return tiny_pipeline


def test_trains_exports_and_goes_on(small, tmp_path):
    settings = Settings("emoji-distilled", steps=2, batch_size=4, learning_rate=1e-3, seed=0)
    result = train(EmojiDistilled(), settings, tmp_path / "run")
    assert result["loss"] > 0 and 0 <= result["quality"]["token_agreement"] <= 1
    student = DistilledStudent.from_pretrained(result["folder"])
    further = Settings(
        "emoji-distilled", steps=1, batch_size=2, learning_rate=1e-12, seed=0, init_from=result["folder"]
    )
    again = DistilledStudent.from_pretrained(train(EmojiDistilled(), further, tmp_path / "further")["folder"])
    for name, weight in student.state_dict().items():
        assert torch.allclose(weight, again.state_dict()[name], atol=1e-2), name


def test_pairs_are_kept_and_decided_by_their_number(small, monkeypatch):
    pairs = Pairs(small)
    tokens = pairs.tokens(6)
    assert tokens.shape == (6, 16) and len(list(pairs.folder.iterdir())) == 2
    caption, noise = pairs.inputs(5)
    assert caption == pairs.inputs(5)[0] and np.array_equal(noise, pairs.inputs(5)[1])
    expected = draw_pairs(
        small.transformer,
        pairs.condition([caption]),
        torch.from_numpy(noise)[None],
        NoiseMap(pairs.codebook),
        sampling=Sampling(),
        guidance_scale=small.config.default_guidance_scale,
    )
    assert torch.equal(tokens[5:], expected)
    (pairs.folder / "00001.npy").unlink()
    assert torch.equal(pairs.tokens(6), tokens)
    monkeypatch.setattr(Pairs, "_draw", None)
    assert torch.equal(pairs.tokens(3), tokens[:3])


def test_a_student_learns_the_map():
    torch.manual_seed(0)
    teacher = LlamaGen(vocab_size=8, dim=32, num_layers=1, num_heads=2, grid_size=2, num_classes=2).eval()
    torch.nn.init.normal_(teacher.output.weight, std=0.3)
    torch.nn.init.normal_(teacher.tok_embeddings.weight)
    codebook = torch.randn(8, 3)
    noise, labels = torch.randn(2048, 4, 3), torch.randint(2, (2048,))
    tokens = draw_pairs(
        teacher, {"class_labels": labels}, noise, NoiseMap(codebook), sampling=Sampling(), guidance_scale=1.0
    )
    module = TrainableStudent(DistilledStudent.from_teacher(teacher, codebook), codebook)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(300):
        rows = torch.randint(1536, (128,))
        loss = module(noise[rows], tokens[rows], torch.full((128,), step % 3), class_labels=labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fresh = slice(1536, None)
    with torch.no_grad():
        vectors, logits = module.student(noise[fresh], 0, class_labels=labels[fresh])
    right = (logits.argmax(dim=-1) == tokens[fresh]).float().mean()
    blind = torch.stack([tokens[:, i].bincount(minlength=8).max() / len(tokens) for i in range(4)]).mean()
    assert right > 2 * blind
    distance = (vectors - codebook[tokens[fresh]]).square().sum(dim=-1).mean()
    assert distance < 0.7 * (codebook[tokens] - codebook[tokens].mean(dim=0)).square().sum(dim=-1).mean()
