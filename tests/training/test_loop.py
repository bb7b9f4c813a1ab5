"""The loop on a tiny recipe: deterministic, resumable to the same weights, and careful with earlier runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from studio.errors import StudioError
from studio.training import loop
from studio.training.recipe import Defaults, Recipe
from studio.training.schedule import learning_rate_factor


class Regression(Recipe):
    """Learns the sum of three numbers."""

    name = "regression"
    data = "random numbers"
    defaults = Defaults(steps=6, batch_size=4, learning_rate=0.1, warmup=2)
    stop_at = None

    def build(self, device):
        self.drawn = 0
        return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).to(device)

    def batch(self, rng, batch_size, device):
        self.drawn += 1
        if self.drawn == self.stop_at:
            raise KeyboardInterrupt
        return {"input": torch.from_numpy(rng.random((batch_size, 3), dtype="float32")).to(device)}

    def load(self, module, folder):
        module.load_state_dict(load_file(folder / "weights.safetensors"))

    def loss(self, module, batch):
        return (module(batch["input"]).squeeze(-1) - batch["input"].sum(-1)).square().mean()

    def export(self, module, folder):
        save_file(module.state_dict(), folder / "weights.safetensors")

    def quality(self, folder):
        return {"finite": all(bool(v.isfinite().all()) for v in load_file(folder / "weights.safetensors").values())}


def settings(**changes):
    return loop.Settings(
        **{"recipe": "regression", "steps": 6, "batch_size": 4, "learning_rate": 0.1, "seed": 3, **changes}
    )


def weights(out):
    return load_file(out / "model" / "weights.safetensors")


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("made", [[], ["other.safetensors"], ["weights.safetensors"]], ids=str)
def test_weights_that_cannot_be_started_from_are_one_sentence_and_leave_nothing(tmp_path, made):
    source = tmp_path / "source"
    source.mkdir()
    for name in made:
        save_file({"bias": torch.zeros(2)}, source / name)
    with pytest.raises(StudioError, match="holds no weights of regression"):
        loop.train(Regression(), settings(init_from=str(source)), tmp_path / "runs" / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("out", ["/proc/nowhere", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_written_is_refused(out):
    with pytest.raises(StudioError, match=f"{out} cannot be written"):
        loop.train(Regression(), settings(), Path(out))


def test_same_seed_same_weights_and_another_seed_others(tmp_path):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        loop.train(Regression(), settings(seed=seed), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_a_resumed_run_equals_an_unbroken_one(tmp_path, monkeypatch):
    loop.train(Regression(), settings(), tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", -1)
    broken = Regression()
    broken.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        loop.train(broken, settings(), tmp_path / "broken")
    assert not (tmp_path / "broken" / "model").exists()
    result = loop.train(Regression(), settings(), tmp_path / "broken", resume=True)
    assert result["steps"] == 6 and same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_card_tells_command_data_and_quality(tmp_path):
    loop.train(Regression(), settings(), tmp_path / "run", command="studio train regression")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "`studio train regression`" in card and "random numbers" in card and "| finite | True |" in card


def test_earlier_runs_are_not_overwritten_and_resume_needs_the_same_settings(tmp_path):
    with pytest.raises(StudioError, match="no state"):
        loop.train(Regression(), settings(), tmp_path / "run", resume=True)
    loop.train(Regression(), settings(), tmp_path / "run")
    with pytest.raises(StudioError, match="--resume"):
        loop.train(Regression(), settings(), tmp_path / "run")
    with pytest.raises(StudioError, match="another learning_rate"):
        loop.train(Regression(), settings(learning_rate=0.2), tmp_path / "run", resume=True)


def test_learning_rate_warms_up_holds_and_falls():
    factors = [learning_rate_factor(step, 100, 10, 0.3) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:70] == [1.0] * 61 and factors[-1] == pytest.approx(1 / 30)
