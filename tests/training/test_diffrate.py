"""Rates that are learned: what the distributions say, masks in place of removals, and what the loss teaches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from studio import StudioError, cli, load, merge_tokens
from studio.data.scenes import draw_scene
from studio.evaluation import evaluate
from studio.training import diffrate, reader_network
from studio.training.diffrate import MaskedTower, Rates, TrainableRates, operations
from tests.pruning.tiny_models import ready

RANKS = pytest.mark.parametrize("rank", diffrate.RANKS)


@pytest.fixture(scope="module")
def reader():
    """A random LLaVA-NeXT of 36 patches that reads four of its five layers, and its processor."""
    sizes = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_network, "TOWER", sizes)
        patch.setattr(reader_network, "TEXT", {**sizes, "num_hidden_layers": 1})
        patch.setattr(reader_network, "PATCH", 16)
        torch.manual_seed(0)
        processor = reader_network.build_processor()
        model = ready(reader_network.build_model(len(processor.tokenizer)))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return model, processor


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def rates():
    made = Rates(torch.tensor([0.2, 0.5, 0.7]), 36)
    torch.nn.init.normal_(made.theta, std=2, generator=torch.Generator().manual_seed(0))
    return made


def test_the_mean_probability_to_go_is_the_rate(rates):
    goes = rates.goes()
    torch.testing.assert_close(goes.mean(dim=-1), rates.shares())
    assert (goes[..., 0] == 0).all() and (goes.diff(dim=-1) >= 0).all()
    chances = rates.theta.softmax(dim=-1)
    torch.testing.assert_close(goes[0, 1, 30], chances[0, 1, 6:].sum())  # of 36 ranks the 31st goes if 6 or more do


def test_hard_numbers_are_the_rounded_rates_and_never_fall(rates):
    with torch.no_grad():
        shares = torch.tensor([[0.1, 0.3, 0.2], [0.25, 0.28, 0.6]])
        rates.theta.fill_(-1e4)
        rates.theta.scatter_(2, (shares * 36).round().long()[..., None], 0)  # 4, 11, 7 pruned; 9, 10, 22 gone
    assert rates.counts() == ([5, 0, 11], [4, 2, 0])
    left = torch.tensor([37, 28, 26, 15]).double()
    behind = torch.tensor([28, 26, 15, 15]).double()
    each = 4 * left * 32**2 + 2 * left**2 * 32 + 8 * behind * 32**2
    whole = 12 * 37 * 32**2 + 2 * 37**2 * 32
    assert float(operations(left, 32)) == pytest.approx(float(each.sum() / whole / 4))
    assert rates.operations(32).item() == pytest.approx(float(operations(left, 32)), abs=1e-5)


@RANKS
@pytest.mark.parametrize("shares", [((0.1, 0.3, 0.2), (0.25, 0.28, 0.6)), ((0, 0, 0), (0.5, 0.7, 0.9))])
def test_masked_tokens_are_as_removed_ones(reader, pixels, rates, rank, shares, monkeypatch):
    """Control: tokens that go on being attended to are not."""
    model = reader[0]
    rates.start_at(torch.tensor(shares))
    merged, pruned = rates.counts()
    masked = MaskedTower(model.model.vision_tower, 4, rank)
    with torch.no_grad():
        with merge_tokens(model, merged, pruned=pruned, rank=rank, method="diffrate"):
            removed = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(masked(pixels, rates), removed, atol=1e-5, rtol=1e-5)
        plain = diffrate._masked_attention
        monkeypatch.setattr(diffrate, "_masked_attention", lambda *given: plain(*given[:3], torch.ones_like(given[3])))
        assert (masked(pixels, rates) - removed).abs().max() > 1e-3


@pytest.mark.parametrize("target", [0.5, 0.8])
def test_the_rates_alone_learn_and_reach_their_target(reader, pixels, target):
    before = {name: weight.clone() for name, weight in reader[0].state_dict().items()}
    made = TrainableRates(reader[0], target, 5.0, "likeness")
    made.rates.start_at(torch.full((2, 3), 0.4))
    assert [name for name, part in made.named_parameters() if part.requires_grad] == ["rates.theta"]
    with torch.no_grad():
        whole = made.tower.tower(pixels, output_hidden_states=True).hidden_states[-2]
    optimizer = torch.optim.Adam(made.rates.parameters(), diffrate.DiffRateRecipe.defaults.learning_rate)
    for _ in range(150):
        task = (made.tower(pixels, made.rates) - whole).square().mean() / whole.square().mean()
        (task + made.weight * (made.share() - target).square()).backward()
        optimizer.step()
        optimizer.zero_grad()
    left = 37 - torch.tensor([(0, 0), *zip(*made.rates.counts())]).sum(dim=1).cumsum(dim=0)
    assert abs(float(operations(left.double(), 32)) - target) < 0.05
    assert all(torch.equal(weight, before[name]) for name, weight in reader[0].state_dict().items())


def test_what_is_lost_by_going_holds_rates_back(reader):
    """Patches that go read another state than that of the whole tower, so the loss falls with their rate."""
    pixels = torch.randn(12, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    made = TrainableRates(reader[0], 0.6, 0.0, "likeness")
    with torch.no_grad():
        whole = made.tower.tower(pixels, output_hidden_states=True).hidden_states[-2]
    (made.tower(pixels, made.rates) - whole).square().mean().backward()
    slope = (made.rates.theta.grad * torch.arange(36)).sum(dim=-1)
    assert (slope[:, 0] > 0).all()


def test_a_batch_is_read_as_the_reader_reads(reader):
    """Where hardly a token goes, the loss is that of the whole reader; the hook on the tower is gone afterwards."""
    model, processor = reader
    made = TrainableRates(model, 0.6, 0.0)
    with torch.no_grad():
        made.rates.theta.fill_(-1e4)[..., 0] = 0
    scenes = [draw_scene(np.random.default_rng(number), (1, 1), 3) for number in range(2)]
    given = processor.image_processor([Image.fromarray(scene.image) for scene in scenes], return_tensors="pt")
    texts = [[(question.text, question.answer) for question in scene.questions] for scene in scenes]
    packed = diffrate.pack_questions(processor.tokenizer, texts).tensors()
    given = {"pixel_values": given["pixel_values"], "image_sizes": torch.as_tensor(given["image_sizes"])}
    with torch.no_grad():
        loss = made(**given, **packed)
        made.encode = lambda original, *arguments, **more: original(*arguments, **more)
        whole = made(**given, **packed)
    torch.testing.assert_close(loss, whole)
    assert "forward" not in vars(model.model.vision_tower)


def test_a_folder_is_measured_with_what_it_has_learned(reader, tmp_path):
    model, processor = reader
    for part in reader:
        part.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pruning"]["diffrate"] = {"merged": [20, 9, 3], "pruned": [0, 1, 0], "rank": "likeness"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    measured = evaluate(tmp_path, samples=1)
    pipe = load(tmp_path, device="cpu")
    scene = draw_scene(np.random.default_rng((1_000_000_007, 0, 0)))
    image = Image.fromarray(scene.image)
    for merge in ("diffrate", "diffrate:20,9+1,3"):
        answers = [pipe(image, q.text, merge=merge, max_new_tokens=4).answer == q.answer for q in scene.questions]
        assert measured["diffrate"] == np.mean(answers)


def test_other_readers_are_refused(reader):
    model = reader[0]
    with pytest.raises(StudioError, match="flops must be a finite number above 0.25"):
        TrainableRates(model, 0.2)
    with pytest.raises(StudioError, match="rank is one of"):
        TrainableRates(model, 0.6, rank="size")
    for name, value, words in (
        ("vision_feature_layer", 1, "fewer than two"),
        ("vision_feature_layer", [-2, -3], "for this llava_next"),
        ("model_type", "llava", "for this llava"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(StudioError, match=words):
            patch.setattr(model.config, name, value)
            TrainableRates(model)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "name it with --target"),
        (("--target", "emoji-vq"), "for a reader such as emoji-vlm"),
        (("--target", "emoji-vlm", "--layers", "2"), "does not take --layers"),
        (("--target", "emoji-vlm", "--config", "half.toml"), "flops must be a finite number above 0.25"),
    ],
)
def test_the_command_refuses(more, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.toml").write_text("[model]\nflops = 0.1\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "diffrate", "--steps", "1", "--out", "run", *more])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2 and not out and words in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
