"""The compiled library is kept in a private folder, loaded intact or compiled again, and missed with a warning."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studio.backends import native_library
from studio.files import cache_folder

PROGRAM = (
    f"FILE = {native_library.__file__!r}"
    + """
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("native_library", FILE)  # this file alone, because its package imports torch
native_library = module_from_spec(spec)
spec.loader.exec_module(native_library)
library = native_library.library()
print(library and library.studio_lanes())
print(native_library.state())
"""
)
COMPILER = """
import shutil, sys
open(sys.argv[1], "a").write("compiled\\n")
shutil.copy(sys.argv[2], sys.argv[sys.argv.index("-o") + 1])
"""
PLANTED = """
int studio_lanes(void) { return 99; }
void studio_blocks() {}
void studio_product() {}
void studio_denoise() {}
void studio_decode() {}
void studio_sums() {}
void studio_winners() {}
"""


@pytest.fixture(scope="module")
def whole():
    """A library that works, and what it answers."""
    library = native_library.library()
    return Path(library._name), str(library.studio_lanes())


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A library that tells that it was executed."""
    source = tmp_path_factory.mktemp("planted") / "planted.c"
    source.write_text(PLANTED)
    made = source.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(made)], check=True, capture_output=True)
    return made.read_bytes()


@pytest.fixture
def ask(tmp_path, repository, whole):
    """Ask a process of its own, whose compiler copies a library and counts: (answer, state, stderr, compilations)."""
    script, calls = tmp_path / "compiler.py", tmp_path / "calls"
    script.write_text(COMPILER)
    compiler = f"'{sys.executable}' '{script}' '{calls}' '{whole[0]}'"

    def ask(cache, before="", **environment):
        environment = {"PYTHONPATH": str(repository), "STUDIO_CACHE": str(cache), "CC": compiler, **environment}
        done = subprocess.run(
            [sys.executable, "-c", before + PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        answer, state = done.stdout.splitlines()
        return answer, state, done.stderr, calls.read_text().count("compiled") if calls.exists() else 0

    return ask


@pytest.fixture
def kept(ask, tmp_path, whole):
    """The file that a first process kept in a cache of its own."""
    assert ask(tmp_path / "cache") == (whole[1], "ok", "", 1)
    (file,) = (tmp_path / "cache" / "native").glob("*.so")
    return file


def test_it_is_compiled_once_into_a_private_folder(ask, kept, whole):
    assert ask(kept.parents[1]) == (whole[1], "ok", "", 1)
    assert kept.parent.stat().st_mode & 0o777 == 0o700 and kept.stat().st_mode & 0o022 == 0
    assert sorted(path.suffix for path in kept.parent.iterdir()) == [".sha256", ".so"]


def damage(file, how):
    content, checksum = bytearray(file.read_bytes()), file.with_suffix(".sha256")
    if how == "cut":
        file.write_bytes(content[:4096])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    elif how == "no checksum":
        checksum.unlink()
    elif how == "damaged checksum":
        checksum.write_bytes(b"\xff" * 64)
    elif how == "writable":
        file.chmod(0o722)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped bit", "gone", "no checksum", "damaged checksum", "writable"])
def test_a_damaged_library_is_compiled_anew(how, ask, kept, whole):
    damage(kept, how)
    assert ask(kept.parents[1]) == (whole[1], "ok", "", 2)
    assert ask(kept.parents[1]) == (whole[1], "ok", "", 2)
    assert kept.read_bytes() == whole[0].read_bytes()


def plant(kept, content):
    kept.write_bytes(content)
    kept.with_suffix(".sha256").write_text(hashlib.sha256(content).hexdigest())


def test_a_folder_of_ones_own_is_trusted(ask, kept, planted):
    """The control for the next test: what is planted there with its checksum would be executed."""
    plant(kept, planted)
    assert ask(kept.parents[1])[0] == "99"


@pytest.mark.parametrize("how", ["everybody's", "the group's", "a link", "a file", "beside everybody's", "another's"])
def test_nothing_is_executed_from_a_folder_that_others_can_write_to(how, ask, kept, planted, whole, tmp_path):
    plant(kept, planted)
    folder, cache, before = kept.parent, kept.parents[1], ""
    if how == "everybody's":
        folder.chmod(0o777)
    elif how == "the group's":
        folder.chmod(0o770)
    elif how == "a link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif how == "a file":
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("")
    elif how == "beside everybody's":
        cache.chmod(0o777)
    else:
        before = "import os; os.geteuid = lambda: 12345\n"
    answer, state, warned, compiled = ask(cache, before)
    assert (answer, state, compiled) == (whole[1], "ok", 2)
    assert len(warned.splitlines()) == 1 and "cannot be kept" in warned


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler", "'unclosed"])
def test_a_compiler_that_fails_is_missed_aloud(compiler, ask, tmp_path):
    answer, state, warned, _ = ask(tmp_path / "cache", CC=compiler)
    assert answer == "None" and state.startswith("no working C compiler")
    assert len(warned.splitlines()) == 1 and "without the compiled step" in warned
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_no_compiler_at_all_is_missed_aloud(ask, tmp_path):
    answer, state, warned, _ = ask(tmp_path / "cache", CC="", PATH=str(tmp_path))
    assert answer == "None" and "cc, gcc and clang are not on the path" in state and state.split(": ")[1] in warned


def test_a_compiler_may_have_options(tmp_path, repository):
    """The real compiler, which the name with its options is not."""
    folder = {"STUDIO_CACHE": str(tmp_path), "CC": "cc -m64 -O1", "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **folder}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1] == "ok" and done.stderr == ""


def test_it_can_be_turned_off(ask, tmp_path):
    assert ask(tmp_path, STUDIO_NATIVE="0") == ("None", "off, because STUDIO_NATIVE is 0", "", 0)


def test_a_user_without_a_home_has_a_cache(monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("STUDIO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "studio"
    monkeypatch.delenv("XDG_CACHE_HOME")
    folder = cache_folder()
    assert folder == cache_folder() and folder.stat().st_mode & 0o777 == 0o700
