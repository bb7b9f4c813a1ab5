"""The student's recipe at a tiny size, its pairs, and a student that learns what independent tokens cannot know."""

from functools import partial

import numpy as np
import pytest
import torch

import studio
from studio import Distilled, LlamaGen, StudioError
from studio.decoding.distilled import draw_pairs
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.evaluation.generators import evaluate_generator
from studio.models.distilled import DistilledStudent
from studio.training import emoji_distilled, pair_cache
from studio.training.emoji_distilled import TrainableStudent
from studio.training.pair_cache import Pairs
from studio.training.recipes import run


@pytest.fixture
def small(monkeypatch, tmp_path, tiny_pipeline, tiny_folder):
    """A tiny teacher, a dozen pairs, and few pictures for the judge."""
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(emoji_distilled, "TEACHER", str(tiny_folder))
    monkeypatch.setattr(emoji_distilled, "evaluate_generator", partial(evaluate_generator, samples=70))
    monkeypatch.setattr(emoji_distilled, "PAIRS", 6)
    monkeypatch.setattr(emoji_distilled, "NUM_LAYERS", 1)
    monkeypatch.setattr(emoji_distilled, "HELD_OUT_PAIRS", 3)
    monkeypatch.setattr(pair_cache, "CHUNK", 4)
    return tiny_pipeline


def draw(folder):
    pipe = studio.load(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", generator=generator, decoding=Distilled(), output_type="tokens").tokens


def test_what_is_exported_draws_and_is_measured_in_one_call(small, tiny_folder, tmp_path):
    result = run("emoji-distilled", out=tmp_path / "run", steps=2, batch_size=4, learning_rate=1e-3)
    assert result["loss"] > 0
    quality = result["quality"]
    assert 0 <= quality["token_agreement"] <= 1 and quality["code_distance"] > 0
    pipe = studio.load(result["folder"], device="cpu")
    pipe.set_progress_bar_config(disable=True)
    again = evaluate_generator(pipe, samples=70, decoding=Distilled(steps=1))
    assert again == {name: quality[name] for name in again}
    for name, weight in studio.load(tiny_folder, device="cpu").transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name]), name
    assert pipe.student.config.num_layers == emoji_distilled.NUM_LAYERS < pipe.transformer.config.num_layers


@pytest.mark.slow
def test_goes_on_from_a_student_and_resumes(small, tmp_path):
    start = run("emoji-distilled", out=tmp_path / "run", steps=1, batch_size=2)["folder"]
    further = run("emoji-distilled", out=tmp_path / "on", steps=1, batch_size=2, learning_rate=1e-12, init_from=start)
    assert torch.equal(draw(start), draw(further["folder"]))
    resumed = run("emoji-distilled", out=tmp_path / "run", steps=1, batch_size=2, resume=True)
    assert resumed["steps"] == 1 and torch.equal(draw(resumed["folder"]), draw(start))


def test_a_folder_without_a_student_is_no_start(small, tiny_folder, tmp_path):
    with pytest.raises(StudioError, match="no student"):
        run("emoji-distilled", out=tmp_path / "run", steps=1, batch_size=2, init_from=str(tiny_folder))


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
