"""Files of prompts: what a line may say, where seeds come from, and which line is to blame."""

import json
import os

import pytest

from studio import StudioError
from studio.commands.prompt_file import line_seed, read_prompts


def write(folder, *lines):
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return file


def test_lines_say_what_the_options_say(tmp_path):
    line = {
        "prompt": "a pear", "seed": 7, "num_images": 2, "guidance": 3, "cfg_interval": 4, "temperature": 0.5,
        "top_k": 8, "top_p": 0.9, "decoding": "lantern", "delta": 0.2, "k": 5,
    }  # fmt: skip
    [request] = read_prompts(write(tmp_path, line))
    assert (request.line, request.prompt, request.seed, request.num_images) == (1, "a pear", 7, 2)
    sampling = {"guidance_scale": 3, "cfg_interval": 4, "temperature": 0.5, "top_k": 8, "top_p": 0.9}
    assert request.settings == sampling
    assert request.decoding == {"name": "lantern", "delta": 0.2, "k": 5}


def test_options_fill_what_lines_leave_out(tmp_path):
    file = write(
        tmp_path, {"prompt": "a"}, {"prompt": "b", "num_images": 1, "top_k": None}, {"prompt": "c", "top_k": 9}
    )
    requests = read_prompts(file, options={"num_images": 3, "top_k": 4})
    assert [request.num_images for request in requests] == [3, 1, 3]
    assert [request.settings["top_k"] for request in requests] == [4, 4, 9]


def test_a_line_with_a_decoding_of_its_own_takes_no_options_of_another(tmp_path):
    file = write(tmp_path, {"prompt": "a"}, {"prompt": "b", "decoding": "ar"})
    first, second = read_prompts(file, options={"decoding": "lantern", "delta": 0.2})
    assert first.decoding == {"name": "lantern", "delta": 0.2} and second.decoding == {"name": "ar"}


def test_options_of_a_decoding_go_to_the_lines_that_have_it(tmp_path):
    file = write(tmp_path, {"prompt": "a", "decoding": "lantern"}, {"prompt": "b", "decoding": "lantern", "delta": 0.3})
    requests = read_prompts(file, options={"decoding": "lantern", "delta": 0.2})
    assert [request.decoding["delta"] for request in requests] == [0.2, 0.3]
    [request] = read_prompts(write(tmp_path, {"prompt": "a", "diffusion_steps": 9}), options={"steps": 4})
    assert request.decoding == {"name": None, "steps": 4, "diffusion_steps": 9}


@pytest.mark.parametrize(
    ("line", "options", "words"),
    [
        ({"decoding": "ar"}, {"decoding": "lantern", "delta": 0.2}, "none takes --delta: leave --delta out"),
        ({"decoding": "cspd"}, {"steps": 4, "diffusion_steps": 9}, "none takes --steps and --diffusion-steps"),
        ({"decoding": "lantern"}, {"delta": 0.2}, "--delta belongs to --decoding lantern: say which"),
        ({"decoding": "lantern"}, {"decoding": "ar", "delta": 0.2}, "--delta belongs to --decoding lantern, not ar"),
    ],
    ids=str,
)
def test_an_option_that_no_line_takes_is_refused(tmp_path, line, options, words):
    with pytest.raises(StudioError, match=words):
        read_prompts(write(tmp_path, {"prompt": "a", **line}), options=options)


def test_empty_lines_are_skipped_and_counted(tmp_path):
    requests = read_prompts(write(tmp_path, "", {"prompt": "a"}, "  ", "", {"prompt": "b"}, ""))
    assert [request.line for request in requests] == [2, 5]


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('\ufeff{"prompt": "a pêche"}\r\n{"prompt": "b"}\r\n'.encode())
    assert [request.prompt for request in read_prompts(tmp_path / "p.jsonl")] == ["a pêche", "b"]


def test_unset_seeds_follow_from_base_seed_and_line(tmp_path):
    file = write(tmp_path, {"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 5})
    seeds = [[request.seed for request in read_prompts(file, base)] for base in (0, 0, 1)]
    assert seeds[0] == seeds[1] == [line_seed(0, 1), line_seed(0, 2), 5]
    assert len({*seeds[0], *seeds[2]}) == 5
    many = {line_seed(0, line) for line in range(1, 10_001)}
    assert len(many) == 10_000 and max(many) < 2**48


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "JSON"),
        ("[]", "object"),
        ('"a pear"', "object"),
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "class_label": 1}, "prompt"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "'seed' is given twice"),
        ({"prompt": "a", "guidance-scale": 2}, "guidance"),
        ({"prompt": "a", "out": "x.png"}, "out"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "seed": 1.0}, "seed"),
        ({"prompt": "a", "seed": True}, "seed"),
        ({"prompt": "a", "num_images": 0}, "num_images"),
        ({"prompt": "a", "guidance": "3"}, "guidance"),
        ('{"prompt": "a", "guidance": NaN}', "guidance"),
        ('{"prompt": "a", "top_p": 1e999}', "top_p"),
        ({"prompt": "a", "decoding": "fast"}, "speculative"),
        ({"prompt": "a", "delta": 0.1}, "lantern"),
        ({"prompt": "a", "decoding": "lantern", "delta": 2}, "delta"),
    ],
    ids=str,
)
def test_a_wrong_line_is_named(tmp_path, line, word):
    with pytest.raises(StudioError, match=r"line 3: ") as refused:
        read_prompts(write(tmp_path, {"prompt": "a"}, "", line, "{"))
    assert word in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe{}"])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(StudioError, match="p.jsonl"):
        read_prompts(tmp_path / "p.jsonl")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StudioError, match="nowhere.jsonl cannot be read"):
        read_prompts(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b'{"prompt": "a", "guidance": 1' + b"0" * 400 + b"}", "guidance must be a finite number"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 400 + b"}", "seed must be a whole number"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b'{"prompt": "a", "num_images": 100000000000}', "num_images must be a whole number from 1 to 1000000"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"prompt": ' * 200_000, "nested too deeply"),
        (b'{"prompt": "a \\ud83c apple"}', "valid Unicode"),
        (b'{"prompt": "a", "' + b"x" * 100_000 + b'": 1}', "is unknown"),
        (b'{"prompt": "a \xff"}', "not UTF-8"),
    ],
)
def test_lines_of_any_bytes_are_one_short_sentence(tmp_path, line, word):
    (tmp_path / "prompts.jsonl").write_bytes(line)
    with pytest.raises(StudioError, match=word) as refusal:
        read_prompts(tmp_path / "prompts.jsonl")
    assert len(str(refusal.value)) < 1000


def test_only_a_regular_file_of_prompts_is_read(tmp_path):
    os.mkfifo(tmp_path / "prompts.jsonl")
    for path in (tmp_path / "prompts.jsonl", tmp_path, tmp_path / "none", "~nobody-here/x", "a" * 5000, "a\0b"):
        with pytest.raises(StudioError):
            read_prompts(path)


def test_a_run_of_more_images_than_it_can_plan_is_refused(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "num_images": 600000}\n' * 2)
    with pytest.raises(StudioError, match="asks for 1200000 images"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_settings_of_jacobi_decoding(tmp_path):
    jacobi = {"decoding": "jacobi", "window": 8, "coupling": "maximal"}
    lines = {"prompt": "a", **jacobi}, {"prompt": "b", "decoding": "exact"}
    first, second = read_prompts(write(tmp_path, *lines))
    assert first.decoding == {"name": "jacobi", "window": 8, "coupling": "maximal"}
    assert second.decoding == {"name": "exact"}
    for wrong, told in (
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": "wide"}, "whole number"),
    ):
        with pytest.raises(StudioError, match=told):
            read_prompts(write(tmp_path, {"prompt": "a", "decoding": "jacobi", **wrong}))
