"""`studio generate --prompts` in one process: what it samples, and what a second run adds to a broken first one."""

import json

import pytest
from PIL import Image

from studio import cli
from studio.commands import generate_batch as many
from studio.commands.prompt_file import Request
from studio.saving import make_sheet

LINES = [
    {"prompt": "a red apple", "num_images": 2},
    {"prompt": "a green pear", "seed": 7, "guidance": 2},
    {"prompt": "blue sky", "seed": 8, "decoding": "speculative"},
    {"prompt": "a flat apple", "seed": 9},
]


@pytest.fixture
def run(tmp_path, monkeypatch, capfd, tiny_folder):
    """Sample the lines into a folder; return `(exit code, JSON document or None, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def call(lines, out, *options, model=tiny_folder):
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        command = ["generate", "--prompts", "prompts.jsonl", "--model", model, "--out", out, *options, "--json"]
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in command])
        printed = capfd.readouterr()
        return stopped.value.code, json.loads(printed.out), printed.err

    return call


def images(folder):
    return {path.name: Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))}


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_every_line_is_sampled_and_the_manifest_is_in_order(run, tmp_path):
    code, document, err = run(LINES, "out")
    assert code == 0, err
    rows = manifest(tmp_path / "out")
    assert [(row["line"], row["index"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    assert [row["path"] for row in rows] == list(images(tmp_path / "out"))
    assert rows[1]["seed"] == rows[0]["seed"] + 1 and rows[2]["guidance_scale"] == 2
    assert rows[3]["decoding"] == {"name": "speculative"}
    assert (document["prompts"], document["images"], document["sampled"], document["sampled_before"]) == (4, 5, 5, 0)
    assert "5/5" in err and not list((tmp_path / "out").glob("*.part"))


def test_images_are_those_of_single_calls_whatever_is_sampled_together(run, tmp_path):
    run(LINES, "out", "--batch-size", 3)
    run(LINES, "one", "--batch-size", 1)
    assert images(tmp_path / "out") == images(tmp_path / "one")
    row, model = manifest(tmp_path / "out")[2], manifest(tmp_path / "out")[2]["model"]
    with pytest.raises(SystemExit):
        cli.main(["generate", row["prompt"], "--model", model, "--seed", "7", "--guidance", "2", "--out", "single.png"])
    single, sampled = Image.open("single.png"), Image.open(tmp_path / "out" / row["path"])
    assert single.tobytes() == sampled.tobytes()
    record = json.loads(sampled.text["studio"])
    assert record["seed"] == 7 and record["call"]["prompt"] == "a green pear" and record["call"]["guidance_scale"] == 2


def test_a_sheet_holds_all_images_in_order(run, tmp_path):
    code, document, err = run(LINES, "out", "--sheet")
    assert code == 0 and document["sheet"] == "out/sheet.png", err
    paths = [tmp_path / "out" / row["path"] for row in manifest(tmp_path / "out")]
    expected = make_sheet([Image.open(path) for path in paths])
    assert Image.open(tmp_path / "out/sheet.png").tobytes() == expected.tobytes()
    (tmp_path / "out/sheet.png").unlink()
    assert run(LINES, "out", "--sheet")[1]["sampled"] == 0 and (tmp_path / "out/sheet.png").is_file()


def test_a_sheet_of_too_many_images_is_refused_at_once(run, tmp_path):
    code, _, err = run([{"prompt": "a red apple", "num_images": 401}], "out", "--sheet")
    assert code == 2 and "A sheet holds 400 images at most" in err and not (tmp_path / "out").exists()


def test_a_base_seed_changes_unset_seeds_only(run, tmp_path):
    run(LINES, "a")
    run(LINES, "b", "--seed", 1)
    changed = [a["seed"] != b["seed"] for a, b in zip(manifest(tmp_path / "a"), manifest(tmp_path / "b"))]
    assert changed == [True, True, False, False, False]


def test_a_second_run_samples_what_is_missing_and_nothing_else(run, tmp_path):
    run(LINES, "out", "--batch-size", 2)
    before, out = images(tmp_path / "out"), tmp_path / "out"
    rows = manifest(out)
    lost = [rows[0]["path"], rows[3]["path"], rows[4]["path"]]
    (out / "manifest.jsonl").unlink()
    (out / lost[0]).unlink()
    (out / lost[1]).rename(out / f".{lost[1]}.part")
    (out / lost[2]).unlink()
    [records] = (out / "records").iterdir()
    records.write_bytes(records.read_bytes()[:-20])  # a kill in the middle of a line
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    code, document, err = run(LINES, "out", "--batch-size", 2)
    assert code == 0 and document["sampled"] == 3 and document["sampled_before"] == 2, err
    assert images(out) == before and manifest(out) == rows
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(out.glob("*.part"))


def test_a_damaged_record_costs_one_image(run, tmp_path):
    run(LINES, "out")
    before, out = images(tmp_path / "out"), tmp_path / "out"
    [records] = (out / "records").iterdir()
    lines = records.read_bytes().split(b"\n")
    records.write_bytes(b"\n".join([lines[0][:-9] + b"\xff", b"[]", *lines[1:]]))
    code, document, err = run(LINES, "out")
    assert code == 0 and document["sampled"] == 1 and images(out) == before, err


def test_a_file_of_somebody_else_is_left_alone(run, tmp_path):
    run(LINES, "other")
    [name, *_] = [row["path"] for row in manifest(tmp_path / "other")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"mine")
    code, _, err = run(LINES, "out")
    assert code == 2 and "did not write" in err and (tmp_path / "out" / name).read_bytes() == b"mine"


def test_added_lines_are_sampled_beside_the_earlier_ones(run, tmp_path):
    run(LINES[:2], "out")
    _, document, _ = run(LINES, "out")
    assert document["sampled"] == 2 and document["sampled_before"] == 3 and len(manifest(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ([{"prompt": "a red apple", "num_images": 2, "top_k": 3}, *LINES[1:]], []),
        (LINES[:1], []),
        (LINES, ["--seed", 1]),
        (LINES, ["--temperature", 0.5]),
    ],
    ids=["another setting", "fewer lines", "another seed", "another option"],
)
def test_a_folder_of_another_run_is_refused(run, tmp_path, lines, options):
    run(LINES[:2], "out")
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    code, document, _ = run(lines, "out", *options)
    assert code == 2 and "another --out" in document["error"]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before


def test_options_of_no_decoding_of_the_model_are_refused_in_int8_too(run):
    for dtype, usual in (("float32", "exact"), ("int8", "ar")):
        code, document, _ = run([{"prompt": "a pear", "diffusion_steps": 4}], "out", "--dtype", dtype)
        told = f"line 1: --diffusion-steps belongs to --decoding mar or cspd, not {usual}"
        assert code == 2 and told in document["error"]


def test_int8_is_refused_for_other_models(run, tiny_mar_folder):
    code, document, _ = run([{"prompt": "a pear"}], "out", "--dtype", "int8", model=tiny_mar_folder)
    assert code == 2 and document["error"].startswith("--dtype int8 is for LlamaGen models: leave it out for")


def test_a_folder_that_another_run_writes_to_is_refused(run, tmp_path):
    records = many.Records(tmp_path / "out" / "records", 0)
    code, document, _ = run(LINES, "out")
    records.close()
    assert code == 2 and "Another run" in document["error"]


@pytest.mark.parametrize(
    ("lines", "options", "words"),
    [
        ([*LINES, {"prompt": "a", "colour": 1}], [], ["line 5", "colour"]),
        ([*LINES, {"prompt": " "}], [], ["line 5", "empty"]),
        ([*LINES, {"prompt": "a", "top_p": 2}], [], ["line 5", "top_p"]),
        ([*LINES, {"prompt": "a", "decoding": "lantern"}], [], ["line 5", "64 codes"]),
        ([*LINES, {"prompt": "a", "decoding": "distilled"}], [], ["line 5", "student"]),
        ([*LINES, {"class_label": 3}], [], ["line 5", "text-conditional"]),
        (LINES, ["--dtype", "int8"], ["line 3", "int8"]),
        (LINES, ["a pear"], ["--prompts"]),
        (LINES, ["--decoding", "auto"], ["auto"]),
        (LINES, ["--batch-size", 0], ["--batch-size"]),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_before_anything_is_sampled(run, tmp_path, lines, options, words):
    code, document, _ = run(lines, "out", *options)
    assert code == 2 and all(word in document["error"] for word in words), document
    assert not (tmp_path / "out").exists()


def test_out_is_a_folder(run, tmp_path):
    code, document, _ = run(LINES, "out.png")
    assert code == 2 and "folder" in document["error"]
    code, document, _ = run(LINES, "/proc/nowhere")
    assert code == 2 and "/proc/nowhere" in document["error"]


def test_the_file_of_prompts_is_not_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.jsonl").symlink_to("../prompts.jsonl")
    code, document, _ = run(LINES[:1], "out")
    assert code == 2 and "over the file that is read" in document["error"]
    assert json.loads((tmp_path / "prompts.jsonl").read_text()) == LINES[0]


def test_class_models_draw_class_labels(run, tmp_path, tiny_class_folder):
    code, _, err = run([{"class_label": 3, "seed": 1}, {"class_label": 4}], "out", model=tiny_class_folder)
    assert code == 0, err
    assert [row["class_label"] for row in manifest(tmp_path / "out")] == [3, 4]


def test_batches_do_not_depend_on_the_processes_and_are_shared_evenly(monkeypatch):
    requests = [Request(line, "a", None, line, 1, {"top_k": line // 5}, {"name": "ar"}) for line in range(1, 21)]
    plan = many.plan_images(requests)
    monkeypatch.setattr(many, "process_count", lambda: 3)
    shares = []
    for index in range(3):
        monkeypatch.setattr(many, "process_index", lambda index=index: index)
        shares.append(many.share(plan, {plan[0].path, plan[1].path}, batch_size=2))
    lines = sorted([image.request.line for image in batch] for batches in shares for batch in batches)
    assert lines == [[3, 4], [5, 6], [7, 8], [9], [10, 11], [12, 13], [14], [15, 16], [17, 18], [19], [20]]
    assert [len(batches) for batches in shares] == [4, 4, 3]


def test_few_images_are_sampled_one_by_one_and_many_in_batches():
    assert [many.usual_batch_size(images) for images in (1, 100, 300, 10**6)] == [1, 1, 4, 8]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe{}\n", b"[]\n", b"[" * 100_000 + b"\n", b'{"path": 3}\n', b"9" * 5000 + b"\n"]
)
def test_damaged_records_are_sampled_again(run, tmp_path, damage):
    lines = [{"prompt": "a red apple", "seed": 1, "num_images": 3}]
    run(lines, "out")
    whole = images(tmp_path / "out")
    (file,) = (tmp_path / "out/records").glob("*.jsonl")
    records = file.read_bytes().splitlines(keepends=True)
    flipped = records[1].replace(b'"seed": 2', b'"seed": 3')
    assert flipped != records[1]
    file.write_bytes(records[0] + damage + flipped + records[2])
    (tmp_path / "out" / sorted(whole)[1]).unlink()
    code, document, err = run(lines, "out")
    assert (code, document["sampled"], document["sampled_before"]) == (0, 1, 2)
    assert "2 damaged lines" in err and images(tmp_path / "out") == whole
