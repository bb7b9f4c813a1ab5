"""The models that ship: whole, and what their checksums say."""

import pytest

from studio.checkpoints import bundled


@pytest.mark.parametrize("name", bundled.BUNDLED)
def test_bundled_files_are_the_released_ones(name):
    folder = bundled.bundled_folder(name)
    listed = set(bundled.read_checksums()[name])
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed == present, "run `make checksums` after changing bundled files"
