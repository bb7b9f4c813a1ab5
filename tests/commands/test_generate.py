"""`studio generate` on tiny random models: what it writes, what it prints, and how it refuses."""

import json
import os
import shutil

import pytest
from PIL import Image

from studio import LlamaGenPipeline
from tests.command_results import files, refused


def test_generate_writes_one_image_a_seed(run, tiny_folder, tmp_path):
    code, out, err = run("generate", "a red apple", "--model", tiny_folder, "--num-images", 2, "--seed", 7)
    assert code == 0, err
    assert files(tmp_path) == ["out", "out/a-red-apple-7.png", "out/a-red-apple-8.png"]
    assert "seed 7" in out and "seed 8" in out and "seconds" in out and "tokens per second" in out


def test_generate_json_is_one_document_on_stdout(run, tiny_folder, tmp_path):
    call = ("generate", "a red apple", "--model", tiny_folder, "--num-images", 2, "--seed", 7, "--json")
    code, out, err = run(*call, "--decoding", "ar")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {
        "model", "decoding", "images", "tokens", "target_calls", "mean_accepted_length", "seconds",
    }  # fmt: skip
    assert [image["seed"] for image in document["images"]] == [7, 8]
    assert all((tmp_path / image["path"]).is_file() for image in document["images"])
    assert document["tokens"] == 32 and document["target_calls"] == 16 and document["mean_accepted_length"] == 1.0
    assert document["seconds"]["total"] > 0


def test_what_a_prompt_leaves_open_is_said(run, tiny_pipeline, tmp_path):
    choices = [{"named": "red|green", "one_of": ["red", "green"]}]
    LlamaGenPipeline(**tiny_pipeline.components, prompt_completion=choices).save_pretrained(tmp_path / "open")
    call = ("generate", "apple", "--model", "open", "--num-images", 3, "--seed", 1)
    code, out, _ = run(*call, "--json")
    document = json.loads(out)
    assert code == 0 and len(document["prompts"]) == 3 and set(document["prompts"]) <= {"apple, red", "apple, green"}
    code, out, err = run(*call)
    assert all(words in out + err for words in document["prompts"])
    _, out, _ = run("generate", "red apple", "--model", "open", "--json")
    assert "prompts" not in json.loads(out)


def test_out_with_png_names_the_file(run, tiny_folder, tmp_path):
    code, _, err = run("generate", "a red apple", "--model", tiny_folder, "--out", "new/folder/apple.png")
    assert code == 0, err
    assert files(tmp_path / "new/folder") == ["apple.png"]


def test_out_with_png_numbers_several_files(run, tiny_folder, tmp_path):
    code, _, err = run(
        "generate", "a red apple", "--model", tiny_folder, "--out", "apple.png", "--num-images", 2, "--sheet"
    )
    assert code == 0, err
    assert files(tmp_path) == ["apple-0.png", "apple-1.png", "apple-sheet.png"]


def test_image_carries_call_seed_and_versions(run, tiny_folder, tmp_path):
    run("generate", "a red apple", "--model", tiny_folder, "--seed", 3, "--top-k", 5, "--out", "apple.png")
    record = json.loads(Image.open(tmp_path / "apple.png").text["studio"])
    assert record["seed"] == 3
    assert record["call"]["prompt"] == "a red apple" and record["call"]["top_k"] == 5
    assert {"studio", "torch", "diffusers", "transformers"} <= set(record["versions"])


def test_an_unset_seed_is_sampled_and_reproduces_the_image(run, tiny_folder, tmp_path):
    _, out, _ = run("generate", "a red apple", "--model", tiny_folder, "--out", "one.png", "--json")
    [image] = json.loads(out)["images"]
    run("generate", "a red apple", "--model", tiny_folder, "--out", "two.png", "--seed", image["seed"])
    assert Image.open(tmp_path / "one.png").tobytes() == Image.open(tmp_path / "two.png").tobytes()


def test_second_image_equals_a_call_with_the_next_seed(run, tiny_folder, tmp_path):
    run("generate", "a red apple", "--model", tiny_folder, "--out", "both.png", "--num-images", 2, "--seed", 4)
    run("generate", "a red apple", "--model", tiny_folder, "--out", "single.png", "--seed", 5)
    assert Image.open(tmp_path / "both-1.png").tobytes() == Image.open(tmp_path / "single.png").tobytes()


def test_sheet_holds_all_images(run, tiny_folder, tmp_path):
    run("generate", "a red apple", "--model", tiny_folder, "--num-images", 4, "--seed", 0, "--sheet")
    sheet = Image.open(tmp_path / "out/a-red-apple-0-sheet.png")
    assert sheet.width == sheet.height == 2 * 256 + 3 * 8


def test_class_label_samples_with_a_class_model(run, tiny_class_folder, tmp_path):
    code, _, err = run("generate", "--class-label", 3, "--model", tiny_class_folder, "--seed", 1)
    assert code == 0, err
    assert files(tmp_path / "out") == ["class-3-1.png"]


def test_every_sampling_option_is_taken(run, tiny_folder):
    options = ["--guidance", 2, "--cfg-interval", 3, "--temperature", 0.9, "--top-k", 8, "--top-p", 0.9]
    code, _, err = run("generate", "a pear", "--model", tiny_folder, *options, "--device", "cpu", "--dtype", "float32")
    assert code == 0, err


@pytest.fixture
def student_folder(tiny_pipeline, tmp_path_factory):
    """The tiny pipeline with a student of random weights."""
    from studio import DistilledStudent, LlamaGenPipeline

    student = DistilledStudent.from_teacher(tiny_pipeline.transformer, tiny_pipeline.image_tokenizer.codebook)
    folder = tmp_path_factory.mktemp("models") / "student"
    LlamaGenPipeline(**{**tiny_pipeline.components, "student": student}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("decoding", "options"),
    [
        ("ar", []),
        ("jacobi", []),
        ("jacobi", ["--window", 4, "--coupling", "maximal"]),
        ("speculative", []),
        ("speculative", ["--drafts", "own"]),
        ("lantern", ["--delta", 0.2, "--k", 8]),
        ("lantern", ["--k", 8, "--drafts", "own"]),
        ("lantern++", []),
        ("lantern++", ["--ratio", 2, "--k", 8, "--drafts", "own"]),
        ("distilled", []),
        ("distilled", ["--steps", 2]),
        ("distilled", ["--steps", 1, "--teacher-steps", 3, "--guidance", 2]),
    ],
)
def test_every_decoding_is_taken(run, student_folder, tmp_path, decoding, options):
    model = ("--model", student_folder)
    call = ("generate", "a red apple", *model, "--seed", 1, "--decoding", decoding, *options, "--json")
    code, out, err = run(*call)
    document = json.loads(out)
    assert code == 0 and document["decoding"] == decoding, err
    assert document["tokens"] == 16 and 1 <= document["target_calls"] <= 16
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])
    assert record["call"]["decoding"]["name"] == decoding
    assert ("window" in document) == (decoding not in ("ar", "distilled") and "own" not in options)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--decoding", "jacobi", "--coupling", "eagle"], "coupling is one of seed, none, maximal, gumbel"),
        (["--decoding", "lantern", "--drafts", "eagle"], "drafts is one of jacobi, own"),
        (["--window", 4], "--window belongs to --decoding jacobi: say which decoding you mean"),
        (["--decoding", "ar", "--window", 4], "--window belongs to --decoding jacobi, not ar"),
    ],
    ids=str,
)
def test_what_jacobi_decoding_cannot_do_is_refused(run, tiny_folder, options, word):
    refused(run("generate", "a red apple", "--model", tiny_folder, *options), word)


def test_by_default_the_faster_of_plain_and_jacobi_decoding_is_taken(run, tiny_folder, tmp_path, monkeypatch):
    """Each is timed as often as is needed; the image is the same whichever is taken."""
    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    call = ("generate", "a red apple", "--model", tiny_folder, "--seed", 7, "--device", "cpu", "--json")
    _, plain, _ = run(*call, "--decoding", "ar")
    [image] = json.loads(plain)["images"]
    pixels, taken = Image.open(tmp_path / image["path"]).tobytes(), []
    for _ in range(7):
        _, out, err = run(*call)
        document = json.loads(out)
        taken.append(document["decoding"])
        assert f"{taken[-1]} decoding" in err
        original = Image.open(tmp_path / document["images"][0]["path"])
        assert original.tobytes() == pixels
        assert json.loads(original.text["studio"])["call"]["decoding"] == {"name": "exact"}
    assert sorted(taken[:6]) == ["ar"] * 3 + ["jacobi"] * 3
    [file] = (tmp_path / "cache" / "decodings").iterdir()
    seconds = json.loads(file.read_text())["seconds"]
    assert taken[6] == min(seconds, key=lambda name: min(seconds[name]))
    _, out, _ = run(*call, "--dtype", "bfloat16")
    assert json.loads(out)["decoding"] == "ar"


def test_a_student_needs_few_calls(run, student_folder):
    for options, calls in (([], 1), (["--steps", 3], 3), (["--teacher-steps", 4], 5)):
        call = ("generate", "a red apple", "--model", student_folder, "--decoding", "distilled", *options, "--json")
        assert json.loads(run(*call)[1])["target_calls"] == calls


def test_evaluate_samples_as_it_is_told(run, student_folder):
    plain, student = (
        json.loads(run("evaluate", student_folder, "--samples", 70, *options, "--json")[1])
        for options in ([], ["--decoding", "distilled"])
    )
    assert plain.keys() == student.keys() and plain["frechet"] != student["frechet"]
    refused(run("evaluate", student_folder, "--steps", 2), "--decoding distilled")
    refused(run("evaluate", student_folder, "--decoding", "auto"), "studio generate")


def test_auto_takes_the_fastest_that_was_measured_here(run, student_folder, tmp_path, monkeypatch):
    import torch

    from studio.checkpoints.measured import save_measured

    monkeypatch.setenv("STUDIO_CACHE", str(tmp_path / "cache"))
    call = ("generate", "a red apple", "--model", student_folder, "--device", "cpu", "--decoding", "auto", "--json")
    code, out, err = run(*call)
    assert code == 0 and json.loads(out)["decoding"] == "ar" and "studio bench decoding" in err
    rows = [
        {"decoding": name, "settings": settings, "seconds_per_image": seconds, "speedup": 1 / seconds}
        | {"judge_top1": quality, "batch": 1, "dtype": "float32"}
        for name, settings, seconds, quality in (
            ("ar", {}, 1.0, 0.6),
            ("lantern", {"delta": 0.2, "k": 8}, 0.5, 0.58),
            ("distilled", {"steps": 1, "teacher_steps": 0}, 0.1, 0.4),
        )
    ]
    save_measured(str(student_folder), torch.device("cpu"), rows)
    for options, name in (([], "lantern"), (["--tolerance", 0], "ar"), (["--tolerance", 0.5], "distilled")):
        code, out, err = run(*call, *options)
        assert code == 0 and json.loads(out)["decoding"] == name, err
        assert f"auto: {name}" in err
    refused(run(*call[:-1], "--tolerance", 2), "tolerance")


@pytest.mark.parametrize(
    ("options", "word"),
    [(["--guidance", 2], "guidance"), (["--top-k", 3], "top_k"), (["--steps", 2, "--teacher-steps", 3], "steps"),
     (["--teacher-steps", 17], "teacher_steps"), (["--steps", 40], "16 steps")],
    ids=str,
)  # fmt: skip
def test_what_a_student_cannot_do_is_refused(run, student_folder, options, word):
    refused(run("generate", "a red apple", "--model", student_folder, "--decoding", "distilled", *options), word)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--decoding", "fast"], "speculative"),
        (["--delta", "0.1"], "lantern"),
        (["--ratio", "2"], "lantern++"),
        (["--decoding", "lantern", "--ratio", "2"], "lantern++"),
        (["--decoding", "lantern++", "--delta", "0.1"], "--delta"),
        (["--decoding", "lantern++", "--ratio", "0.5"], "ratio"),
        (["--decoding", "lantern++", "--ratio", "nan"], "--ratio"),
        (["--steps", "2"], "distilled"),
        (["--decoding", "speculative", "--teacher-steps", "2"], "--teacher-steps"),
        (["--decoding", "distilled", "--steps", "0"], "--steps"),
        (["--decoding", "distilled", "--dtype", "int8"], "int8"),
        (["--decoding", "distilled"], "needs a student"),
        (["--decoding", "speculative", "--k", "5"], "lantern"),
        (["--decoding", "speculative", "--dtype", "int8"], "int8"),
        (["--decoding", "lantern", "--delta", "2"], "delta"),
        (["--decoding", "auto", "--delta", "0.1"], "--delta"),
        (["--decoding", "auto", "--dtype", "int8"], "int8"),
        (["--tolerance", "0.1"], "--decoding auto"),
        (["--num-images", "0"], "--num-images"),
        (["--num-images", "two"], "--num-images"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--seed", str(2**63 - 1), "--num-images", "2"], f"give at most {2**63 - 2}"),
        (["--top-k", str(10**20)], f"from 0 to {2**63 - 1}"),
        (["--decoding", "mar"], "FastestExact (exact), Jacobi (jacobi)"),
        (["--model", "emoji-vlm"], "use studio ask"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "-inf"], "--top-p"),
        (["--top-p", "1.5"], "top_p"),
        (["--top-k", "-1"], "--top-k"),
        (["--nonsense"], "--nonsense"),
        (["--model", "emoji-ra"], "emoji-ar"),
        (["--model", "no/such"], "no/such"),
        (["--model", "no such"], "no such"),
        (["--device", "quantum"], "quantum"),
        (["--dtype", "float1"], "float1"),
        (["--out", "/proc/nowhere/image.png"], "/proc/nowhere"),
        (["--out", "/dev/null/image.png"], "/dev/null"),
        (["--out", "/dev/null"], "/dev/null"),
        (["--out", "x" * 300 + ".png"], "long"),
    ],
)
def test_wrong_options_are_refused(run, tiny_folder, tmp_path, arguments, word):
    result = run("generate", "a red apple", *([] if "--model" in arguments else ["--model", tiny_folder]), *arguments)
    refused(result, word)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ([""], "empty"),
        (["   "], "empty"),
        (["x" * 2001], "2000"),
        ([], "Say what to sample"),
        (["a pear", "--class-label", "1"], "a prompt or a class"),
    ],
)
def test_wrong_prompts_are_refused(run, tiny_folder, tmp_path, prompt, word):
    refused(run("generate", *prompt, "--model", tiny_folder), word)
    assert files(tmp_path) == []


@pytest.mark.parametrize("wrong", [["x" * 2001], ["a zorblax", "--temperature", "-1"]], ids=["prompt", "setting"])
def test_a_call_that_is_refused_warns_of_nothing_else(run, tiny_folder, tmp_path, wrong):
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / "concepts.json").write_text(json.dumps({"words": ["a", "pear"], "concepts": ["pear"]}))
    code, _, err = run("generate", *wrong, "--model", model)
    assert code == 2 and len(err.splitlines()) == 1


@pytest.mark.parametrize(("name", "number"), [("Golden Retriever", 3), ("toilet paper", 7), ("7", 8), ("cardigan", 5)])
def test_a_class_is_given_by_name(run, tiny_class_folder, tmp_path, name, number):
    code, _, err = run(
        "generate", "--class-label", name, "--model", tiny_class_folder, "--seed", 1, "--out", "named.png"
    )
    assert code == 0, err
    assert json.loads(Image.open(tmp_path / "named.png").info["studio"])["call"]["class_label"] == number
    run("generate", "--class-label", "golden retriever", "--model", tiny_class_folder, "--seed", 1)
    assert files(tmp_path / "out") == ["class-golden-retriever-1.png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("goldn retriever", "did you mean golden retriever"),
        ("crane", "2 or 6"),
        ("unicorn", "0 to 9"),
        ("-1", "0 to 9"),
    ],
)
def test_a_class_that_is_not_there_or_named_twice_is_refused(run, tiny_class_folder, tmp_path, name, words):
    refused(run("generate", f"--class-label={name}", "--model", tiny_class_folder), *words.split(" or "))
    assert not (tmp_path / "out").exists()


def test_class_label_out_of_range_is_refused(run, tiny_class_folder, tmp_path):
    refused(run("generate", "--class-label", 10, "--model", tiny_class_folder), "10")
    assert files(tmp_path) == []


def test_a_prompt_for_a_class_model_is_refused(run, tiny_class_folder):
    refused(run("generate", "a red apple", "--model", tiny_class_folder))


def test_a_tokenizer_cannot_sample(run, tiny_folder):
    refused(run("generate", "a red apple", "--model", tiny_folder / "image_tokenizer"), "cannot sample")


def test_a_file_is_not_a_model(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    refused(run("generate", "a red apple", "--model", "model.pt"), "model.pt")


def test_a_folder_in_the_way_of_the_image_is_refused(run, tiny_folder, tmp_path):
    (tmp_path / "apple.png").mkdir()
    refused(run("generate", "a red apple", "--model", tiny_folder, "--out", "apple.png"), "folder")
    assert files(tmp_path) == ["apple.png"]


def test_a_disk_that_fills_up_leaves_nothing(run, tiny_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(run("generate", "a red apple", "--model", tiny_folder, "--num-images", 2, "--out", "a/b"), "No space left")
    assert files(tmp_path) == []
