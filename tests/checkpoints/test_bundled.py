"""The models that ship: whole, and what their checksums say."""

from studio.checkpoints import bundled


def test_bundled_files_are_the_released_ones():
    released = bundled.read_checksums()
    assert set(released) == set(bundled.BUNDLED)
    folders = {path.name for path in bundled.ROOT.iterdir() if path.is_dir()} if bundled.ROOT.is_dir() else set()
    assert folders == set(released), "run `make checksums` after adding a bundled model"
    for name in released:
        folder = bundled.bundled_folder(name)
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(released[name]) == present, "run `make checksums` after changing bundled files"
