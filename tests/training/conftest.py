"""What tests of recipes share."""

import pytest

from studio.data.splits import combinations
from studio.training import emoji_judge, latent_cache, token_cache


@pytest.fixture
def few_pictures(monkeypatch, tmp_path):
    """A function: recipes see that many training pictures from then on, and their caches are empty."""

    def only(count):
        few = combinations(held_out=False)[:count]
        for module in (emoji_judge, latent_cache, token_cache):
            monkeypatch.setattr(module, "combinations", lambda held_out: few)
        monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))

    return only
