"""Names of files, and what happens to what is there already."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from studio import StudioError
from studio.saving import check_writable, holds, plan_paths, png_writer, save_all, save_new, slug

TITLES = ["赤いりんご", "красное яблоко", "تفاحة حمراء", "लाल सेब", "빨간 사과", "a red apple", "Ärger & Öl"]
TITLES += ["🍎", "!!!", "🍏", "x" * 500]


def text(content):
    return lambda path: path.write_text(content)


def png(call, seed, colour="red"):
    return png_writer(Image.new("RGB", (4, 4), colour), call, seed)


def test_titles_of_any_script_have_names_of_their_own():
    names = [slug(title) for title in TITLES]
    assert len(set(names)) == len(TITLES)
    assert names[:5] == ["赤いりんご", "красное-яблоко", "تفاحة-حمراء", "लाल-सेब", "빨간-사과"]
    assert all(len(name) <= 60 and len(name.encode()) <= 120 and name[0] not in ".-" for name in names)
    assert slug("語" * 200) == "語" * 40 and slug("a/../b\0\ud83c") == "a-b"


def test_the_same_call_keeps_its_name_and_another_takes_the_next(tmp_path):
    [path], _ = plan_paths(tmp_path, "a red apple", [7])
    calls = [{"guidance": 1.0}, {"guidance": 2.0}, {"guidance": 3.0}]
    for call in (*calls, *calls):
        save_new({path: png(call, 7)}, {path: (call, 7)})
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "a-red-apple-7-2.png", "a-red-apple-7-3.png", "a-red-apple-7.png",
    ]  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"mine", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_none_of_ours_keeps_its_name(tmp_path, content):
    (tmp_path / "x-1.png").write_bytes(content)
    path = tmp_path / "x-1.png"
    assert save_new({path: png({}, 1)}, {path: ({}, 1)}) == [tmp_path / "x-1-2.png"]
    assert path.read_bytes() == content


def test_runs_at_the_same_moment_never_take_the_same_name(tmp_path):
    """All look at the folder before any writes: each name must be claimed by exactly one of them."""
    path, runs = tmp_path / "new" / "x-1.png", 8
    barrier = threading.Barrier(runs)

    def run(number):
        def write(part):
            barrier.wait(timeout=20)
            png({"run": number}, 1)(part)

        return save_new({path: write}, {path: ({"run": number}, 1)})[0]

    with ThreadPoolExecutor(runs) as pool:
        paths = list(pool.map(run, range(runs)))
    assert len(set(paths)) == runs == len(list(path.parent.iterdir()))
    assert all(holds(each, {"run": number}, 1) for number, each in enumerate(paths))


def test_a_failure_gives_claimed_names_back(tmp_path):
    def fail(part):
        raise OSError("no space")

    paths = [tmp_path / "new" / "a.png", tmp_path / "new" / "b.png"]
    with pytest.raises(StudioError, match="cannot be written"):
        save_new({paths[0]: png({}, 1), paths[1]: fail}, {path: ({}, 1) for path in paths})
    assert not list(tmp_path.iterdir())


def test_a_part_of_somebody_else_survives(tmp_path):
    (tmp_path / "x.png.part").write_text("mine")
    save_all({tmp_path / "x.png": text("new")})
    assert (tmp_path / "x.png.part").read_text() == "mine" and (tmp_path / "x.png").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(tmp_path, exists):
    target, link = tmp_path / "there" / "real.png", tmp_path / "link.png"
    if exists:
        target.parent.mkdir()
        target.write_text("old")
    link.symlink_to(target)
    check_writable(link)
    assert save_all({link: text("new")}) == ([link] if exists else [])
    assert link.is_symlink() and target.read_text() == "new"


def test_links_that_lead_nowhere_and_what_is_no_file_are_refused(tmp_path):
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("loop.png", "pipe.png"):
        with pytest.raises(StudioError):
            check_writable(tmp_path / name)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe.png").st_mode)


def test_what_is_replaced_is_told_and_equal_content_is_not(tmp_path):
    path = tmp_path / "x.png"
    assert save_all({path: text("one")}) == []
    assert save_all({path: text("one")}) == []
    assert save_all({path: text("two")}) == [path]


def test_nothing_is_left_of_files_that_cannot_all_be_written(tmp_path):
    def fail(path):
        raise OSError("full")

    (tmp_path / "a.png").write_text("old")
    with pytest.raises(StudioError):
        save_all({tmp_path / "a.png": text("new"), tmp_path / "b" / "c.png": fail})
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_text() == "old"
