"""The drafter's recipe at a tiny size: what is exported drafts, and training teaches what the target will sample."""

import pytest
import torch

import studio
from studio import LlamaGen, Speculative, StudioError
from studio.decoding.drafts import TokenRecycling
from studio.decoding.eagle import AutoDrafts, DrafterDrafts
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import speculative
from studio.decoding.trees import StaticTree
from studio.models.drafter import Drafter
from studio.training import companion, train
from studio.training.drafter import TrainableDrafter


@pytest.fixture
def small(monkeypatch, few_images):
    """Forty images, and few captions to measure with."""
    few_images(40)
    monkeypatch.setattr(companion, "MEASURED", 2)


def run(out, target, **options):
    return train(kind="drafter", target=str(target), out=out, **{"steps": 1, "batch_size": 2, **options})


def test_what_is_exported_drafts_and_is_measured(small, tiny_folder, tmp_path):
    result = run(tmp_path / "run", tiny_folder, steps=2, batch_size=4)
    assert 1 <= result["quality"]["mean_accepted_length"] <= 16 and result["quality"]["images"] == 2
    pipe, target = studio.load(result["folder"], device="cpu"), studio.load(tiny_folder, device="cpu")
    assert isinstance(pipe.drafter, Drafter) and target.drafter is None
    for name, weight in target.transformer.state_dict().items():
        assert torch.equal(weight, pipe.transformer.state_dict()[name]), name
    call = {"temperature": 0.0, "guidance_scale": 2.0, "output_type": "tokens"}
    drafted, called = pipe.drafter.extend_tree, []
    pipe.drafter.extend_tree = lambda *args: called.append(1) or drafted(*args)
    sampled = pipe("a red apple", decoding=Speculative(drafts=AutoDrafts(), weights="plain"), **call)
    assert called and torch.equal(sampled.tokens, target("a red apple", **call).tokens)
    called.clear()
    assert torch.equal(
        pipe("a red apple", decoding=Speculative(drafts=TokenRecycling()), **call).tokens, sampled.tokens
    )
    assert not called


def test_goes_on_from_a_drafter(small, tiny_folder, tmp_path):
    start = run(tmp_path / "run", tiny_folder)["folder"]
    further = run(tmp_path / "on", tiny_folder, learning_rate=1e-12, init_from=start)
    before, after = (studio.load(folder, device="cpu").drafter.state_dict() for folder in (start, further["folder"]))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(StudioError, match="no drafter"):
        run(tmp_path / "none", tiny_folder, init_from=str(tiny_folder))


def test_a_target_of_words_needs_captions_and_one_of_classes_the_same_number(
    small, tiny_folder, tiny_class_folder, image_folder, tmp_path
):
    two, ten = image_folder(classes=("a", "b")), image_folder(classes="abcdefghij", name="ten")
    with pytest.raises(StudioError, match="conditioned on captions, which photos has not"):
        run(tmp_path / "run", tiny_folder, data=str(two))
    with pytest.raises(StudioError, match="conditioned on classes, which emoji has not"):
        run(tmp_path / "run", tiny_class_folder)
    with pytest.raises(StudioError, match="knows 10 classes, and photos has 2"):
        run(tmp_path / "run", tiny_class_folder, data=str(two))
    assert run(tmp_path / "run", tiny_class_folder, data=str(ten))["quality"]["mean_accepted_length"] >= 1


def tiny_target():
    torch.manual_seed(0)
    target = LlamaGen(
        vocab_size=32, dim=32, num_layers=2, num_heads=2, grid_size=4, caption_dim=16, caption_length=5,
        prefix_rope="identity", dropout=0.0, plan_size=2,
    )  # fmt: skip
    for weights in (target.output.weight, target.plan_embeddings.weight):
        torch.nn.init.normal_(weights, std=0.5)
    return target.eval()


@torch.no_grad()
def test_a_drafter_is_fed_as_drafts_are_made():
    """Row by row, what the recipe feeds gives the guess that decoding makes behind the first tokens of an image."""
    target = tiny_target()
    module = TrainableDrafter(Drafter.for_target(target).eval(), target)
    tokens, mask = torch.randint(32, (2, 16)), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    captions = torch.randn(2, 5, 16)
    drop = torch.tensor([False, True])
    fed, states, valid, plan = module.read(tokens, drop, captions=captions, caption_mask=mask)
    assert fed.shape == (2, 4 + 15) and states.shape == (2, 4 + 16, 32)
    cache = target.new_cache(2)
    prefix, _ = target.embed_condition(captions=captions, caption_mask=mask, drop=drop)
    torch.testing.assert_close(target.prefill(prefix, valid, cache), target.logits(states[:, 4]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(target.extend(tokens[:, :3], cache), target.logits(states[:, 5:8]), atol=1e-5, rtol=1e-5)
    assert fed[:, :4].eq(0).all() and torch.equal(fed[:, 4:], tokens[:, :-1])
    guesses = module.drafter.new_tree_cache(2, 7)
    guesses.mask_prefix(valid)
    guesses.region_conditioning = module.drafter.region_conditioning(plan)
    visible = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 7, 7)
    once = module.drafter.extend_tree(fed[:, :7], states[:, :7], guesses, torch.arange(7).expand(2, 7), visible)
    whole = module.drafter(fed, states[:, :-1], valid, plan)
    assert not torch.allclose(whole, module.drafter(fed, states[:, :-1], valid), atol=1e-3)
    torch.testing.assert_close(once[:, 4:], whole[:, 4:7], atol=1e-5, rtol=1e-5)


def test_training_makes_drafts_that_are_accepted():
    target = tiny_target()
    captions, mask = torch.randn(64, 5, 16), torch.ones(64, 5).bool()
    condition = {"captions": captions, "caption_mask": mask}
    shape = StaticTree(((0,), (0, 0), (0, 0, 0)))

    def sample(drafter, seed):
        generators = [torch.Generator().manual_seed(seed + row) for row in range(64)]
        settings = Speculative(drafts=DrafterDrafts(drafter, shape), weights="plain")
        return speculative(target, condition, generators=generators, sampling=Sampling(), settings=settings)

    module = TrainableDrafter(Drafter.for_target(target), target)
    before = sample(module.drafter.eval(), 0)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        loss = module.train()(before.tokens, torch.zeros(64, dtype=torch.bool), **condition)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not module.target.training and target.output.weight.grad is None
    after = sample(module.drafter.eval(), 1000)
    assert after.mean_accepted_length > before.mean_accepted_length + 0.1
