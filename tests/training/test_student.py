"""The student's recipe at a tiny size, its pairs, and a student that learns what independent tokens cannot know."""

import numpy as np
import pytest
import torch

import studio
from studio import Distilled, LlamaGen, StudioError
from studio.data.emoji import EmojiSource
from studio.data.image_folder import ImageFolder
from studio.decoding.distilled import sample_pairs
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.models.distilled import DistilledStudent
from studio.training import pair_cache, student, train
from studio.training.pair_cache import Pairs
from studio.training.student import StudentRecipe, TrainableStudent


@pytest.fixture(autouse=True)
def small(monkeypatch, few_images):
    """Twenty images, chunks of four pairs, three pairs held out, and one measure."""
    few_images(20)
    monkeypatch.setattr(student, "HELD_OUT_PAIRS", 3)
    monkeypatch.setattr(pair_cache, "CHUNK", 4)
    monkeypatch.setattr(StudentRecipe, "quality", _agreement)


def _agreement(recipe, folder):
    return recipe.agreement(studio.load(folder, device="cpu").student)


def run(out, target, **options):
    given = {"steps": 1, "batch_size": 2, "model": {"pairs": 6}, "target": str(target), **options}
    return train(kind="student", out=out, **given)


def sampled(folder):
    pipe = studio.load(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", generator=generator, decoding=Distilled(), output_type="tokens").tokens


def test_what_is_exported_samples_in_one_call_beside_its_teacher(tiny_folder, tmp_path):
    result = run(tmp_path / "run", tiny_folder, steps=2, learning_rate=1e-3)
    quality = result["quality"]
    assert result["loss"] > 0 and 0 <= quality["token_agreement"] <= 1 and quality["code_distance"] > 0
    pipe = studio.load(result["folder"], device="cpu")
    for name, weight in studio.load(tiny_folder, device="cpu").transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name]), name
    assert pipe.student.config.num_layers == 1 < pipe.transformer.config.num_layers
    assert sampled(result["folder"]).shape == (1, 16)


def test_goes_on_from_a_student_and_resumes(tiny_folder, tmp_path):
    start = run(tmp_path / "run", tiny_folder)["folder"]
    further = run(tmp_path / "on", tiny_folder, learning_rate=1e-12, init_from=start)
    assert torch.equal(sampled(start), sampled(further["folder"]))
    before = sampled(start)
    resumed = run(tmp_path / "run", tiny_folder, resume=True)
    assert resumed["steps"] == 1 and torch.equal(sampled(resumed["folder"]), before)


def test_a_folder_without_a_student_is_no_start(tiny_folder, tmp_path):
    with pytest.raises(StudioError, match="no student"):
        run(tmp_path / "run", tiny_folder, init_from=str(tiny_folder))


def test_pairs_are_kept_and_decided_by_their_number(tiny_pipeline, monkeypatch):
    pairs = Pairs(tiny_pipeline, EmojiSource(16))
    tokens = pairs.tokens(6)
    assert tokens.shape == (6, 16) and len(list(pairs.folder.iterdir())) == 2
    caption, noise = pairs.inputs(5)
    assert caption == pairs.inputs(5)[0] and np.array_equal(noise, pairs.inputs(5)[1])
    expected = sample_pairs(
        tiny_pipeline.transformer,
        pairs.condition([caption]),
        torch.from_numpy(noise)[None],
        NoiseMap(pairs.codebook),
        sampling=Sampling(),
        guidance_scale=tiny_pipeline.config.default_guidance_scale,
    )
    assert torch.equal(tokens[5:], expected)
    (pairs.folder / "00001.npy").unlink()
    assert torch.equal(pairs.tokens(6), tokens)
    monkeypatch.setattr(Pairs, "_sampled", None)
    assert torch.equal(pairs.tokens(3), tokens[:3])


def test_pairs_of_classes_and_of_other_captions_are_others(tiny_class_pipeline, tiny_pipeline, image_folder):
    folder = image_folder(8, captions=True)
    first = Pairs(tiny_pipeline, ImageFolder(folder, 16)).folder
    metadata = folder / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("red", "green"))
    assert Pairs(tiny_pipeline, ImageFolder(folder, 16)).folder != first
    pairs = Pairs(tiny_class_pipeline, ImageFolder(image_folder(classes=("a", "b"), name="classes"), 16))
    subjects = {pairs.inputs(number)[0] for number in range(20)}
    assert subjects == {0, 1} and pairs.tokens(2).shape == (2, 16)


def test_a_student_learns_the_map():
    torch.manual_seed(0)
    teacher = LlamaGen(vocab_size=8, dim=32, num_layers=1, num_heads=2, grid_size=2, num_classes=2).eval()
    torch.nn.init.normal_(teacher.output.weight, std=0.3)
    torch.nn.init.normal_(teacher.tok_embeddings.weight)
    codebook = torch.randn(8, 3)
    noise, labels = torch.randn(2048, 4, 3), torch.randint(2, (2048,))
    tokens = sample_pairs(
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
