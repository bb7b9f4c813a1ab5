"""`studio generate` with a MAR: its decodings, what they are called, and what does not fit together."""

import json

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "mar"),
        (["--decoding", "mar", "--steps", 3, "--diffusion-steps", 4, "--temperature", 0.9], "mar"),
        (["--decoding", "cspd"], "cspd"),
        (["--decoding", "cspd", "--mode", "exact", "--prefill", 0.3], "cspd"),
        (["--decoding", "cspd", "--mode", "relaxed", "--draft-steps", 2], "cspd relaxed (approximate)"),
    ],
    ids=str,
)
def test_decodings(run, tiny_mar_folder, tmp_path, options, shown):
    code, out, err = run("generate", "a red apple", "--model", tiny_mar_folder, "--seed", 1, *options, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["decoding"] == shown and document["tokens"] == 16
    assert ("acceptance" in document) == shown.startswith("cspd")
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])["call"]
    is_relaxed = "relaxed" in shown
    assert record["decoding"].get("approximate", False) == is_relaxed
    assert ("Warning: Relaxed decoding was not validated with 4 steps for 16 tokens" in err) == is_relaxed


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ("mar", ["--decoding", "ar"], "not Autoregressive"),
        ("mar", ["--decoding", "speculative"], "not Speculative"),
        ("mar", ["--decoding", "lantern"], "not Lantern"),
        ("mar", ["--decoding", "mar", "--mode", "relaxed"], "--mode belongs to --decoding cspd"),
        ("mar", ["--decoding", "cspd", "--mode", "sloppy"], "exact, relaxed"),
        ("mar", ["--decoding", "cspd", "--draft-steps", "2"], 'mode="relaxed"'),
        ("mar", ["--decoding", "mar", "--steps", "17"], "16 tokens"),
        ("mar", ["--top-k", "5"], "no top_k"),
        ("mar", ["--cfg-interval", "3"], "no cfg_interval"),
        ("ar", ["--decoding", "mar"], "not MaskedAutoregressive"),
        ("ar", ["--decoding", "cspd"], "not ContinuousSpeculative"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(run, tiny_mar_folder, tiny_folder, tmp_path, model, options, word):
    folder = {"mar": tiny_mar_folder, "ar": tiny_folder}[model]
    code, out, err = run("generate", "a red apple", "--model", folder, *options)
    assert code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts(run, tiny_mar_folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red apple", "decoding": "cspd", "mode": "exact"}\n')
    code, _, err = run("generate", "--prompts", "prompts.jsonl", "--model", tiny_mar_folder, "--out", "drawn")
    assert code == 0, err
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 1


def test_the_help_calls_relaxed_approximate(run):
    code, out, _ = run("generate", "--help")
    assert code == 0 and "relaxed (approximate" in " ".join(out.replace("│", " ").split())


def test_convert_refuses_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    code, _, err = run("convert", "mar", "model.pt", "converted", "--tokenizer", "model.pt")
    assert code == 2 and "model.pt" in err and [path.name for path in tmp_path.iterdir()] == ["model.pt"]
