"""What the tests of benchmarks share."""

import pytest
import torch

from studio.evaluation import judge as judging
from studio.evaluation.judge import Judge


@pytest.fixture
def judge_for(monkeypatch):
    """A function that gives a benchmark a random judge of 16 px images, and 40 combinations to sample."""

    def give(bench):
        torch.manual_seed(0)
        judge = Judge(num_concepts=2000, widths=(8, 8, 8), feature_dim=8, sample_size=16).eval()
        monkeypatch.setattr(bench, "load_judge", lambda device=None: judge)
        few = judging.combinations(held_out=True)[:40]
        monkeypatch.setattr(judging, "combinations", lambda held_out: few)

    return give
