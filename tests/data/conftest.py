"""What tests of data share."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """The cache folder of a test alone."""
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
