"""`studio generate` with a MAR: its decodings, what they are called, and what does not fit together."""

import json

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "mar"),
        (["--decoding", "mar", "--steps", 3, "--diffusion-steps", 4, "--temperature", 0.9], "mar"),
        (["--steps", 3, "--diffusion-steps", 4], "mar"),
        (["--order", "gtr"], "mar"),
        (["--annealing", "cosine", "--cache", "lazy", "--refresh-every", 2, "--warm-steps", 0], "mar (approximate)"),
        (["--decoding", "cspd"], "cspd"),
        (["--decoding", "cspd", "--order", "gtr"], "cspd"),
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
    assert record["decoding"].get("steps", 3) == 3 and ("steps" in record["decoding"]) == ("--steps" in options)
    is_relaxed = "relaxed" in shown
    assert record["decoding"].get("approximate", False) == ("approximate" in shown)
    assert ("Warning: Relaxed decoding was not validated with 4 steps for 16 tokens" in err) == is_relaxed


@pytest.mark.parametrize(
    ("model", "options", "word"),
    [
        ("mar", ["--decoding", "ar"], "not Autoregressive"),
        ("mar", ["--decoding", "speculative"], "not Speculative"),
        ("mar", ["--decoding", "lantern"], "not Lantern"),
        ("mar", ["--decoding", "mar", "--mode", "relaxed"], "--mode belongs to --decoding cspd, not mar: leave"),
        ("mar", ["--mode", "relaxed"], "--mode belongs to --decoding cspd: say which"),
        ("mar", ["--steps", "17"], "16 tokens"),
        ("mar", ["--decoding", "cspd", "--cache", "lazy"], "--cache belongs to --decoding mar, not cspd: leave"),
        (
            "mar",
            ["--decoding", "cspd", "--annealing", "linear"],
            "--annealing belongs to --decoding mar, not cspd: leave",
        ),
        ("mar", ["--refresh-every", "2"], 'refresh_every goes with cache="lazy"'),
        ("mar", ["--last-diffusion-steps", "2"], "last_diffusion_steps goes with annealing"),
        ("mar", ["--annealing", "linear", "--last-diffusion-steps", "6"], "at most diffusion_steps, 5, not 6"),
        ("mar", ["--order", "gtr", "--steps", "2"], "at least 3 steps"),
        ("ar", ["--order", "gtr"], "--order belongs to --decoding mar or cspd, not exact"),
        ("mar", ["--steps", "4", "--dtype", "int8"], "not ar: leave --steps out"),
        ("mar", ["--dtype", "int8"], "--dtype int8 is for LlamaGen models: leave it out for"),
        ("mar", ["--schedule", "circle"], "--schedule belongs to --decoding resgen or first-hitting, not mar"),
        ("ar", ["--steps", "2"], "--steps belongs to --decoding distilled: say which"),
        ("ar", ["--delta", "0.1"], "--delta belongs to --decoding lantern: say which"),
        ("ar", ["--diffusion-steps", "2"], "--diffusion-steps belongs to --decoding mar or cspd, not exact: leave"),
        ("ar", ["--tolerance", "0.1"], "--tolerance belongs to --decoding auto: say which"),
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
    lines = ('{"prompt": "a red apple", "decoding": "cspd", "mode": "exact"}', '{"prompt": "a pear", "steps": 3}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    call = ("generate", "--prompts", "prompts.jsonl", "--model", tiny_mar_folder, "--diffusion-steps", 4)
    code, _, err = run(*call, "--out", "sampled")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "sampled" / "manifest.jsonl").read_text().splitlines()]
    assert [row["decoding"] for row in rows] == [
        {"name": "cspd", "mode": "exact"},
        {"name": "mar", "steps": 3, "diffusion_steps": 4},
    ]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a pear", "schedule": "circle"}')
    code, _, err = run(*call, "--out", "refused")
    assert code == 2 and "line 1: --schedule belongs to --decoding resgen or first-hitting, not mar" in err


def test_evaluate_gives_options_to_the_plain_decoding(run, tiny_mar_folder, monkeypatch):
    from studio import MaskedAutoregressive

    seen = []
    monkeypatch.setattr(
        "studio.evaluation.generators.evaluate_generator", lambda pipe, decoding, shared: seen.append(decoding) or {}
    )
    for options in ([], ["--steps", 3]):
        code, _, err = run("evaluate", tiny_mar_folder, *options)
        assert code == 0, err
    assert seen == [None, MaskedAutoregressive(steps=3)]
    code, _, err = run("evaluate", tiny_mar_folder, "--mode", "exact")
    assert code == 2 and "--mode belongs to --decoding cspd: say which" in err and len(seen) == 2


def test_the_help_calls_relaxed_approximate(run):
    code, out, _ = run("generate", "--help")
    assert code == 0 and "relaxed is approximate" in " ".join(out.replace("│", " ").split())


def test_convert_refuses_what_is_no_checkpoint(run, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"no checkpoint")
    code, _, err = run("convert", "mar", "model.pt", "converted", "--tokenizer", "model.pt")
    assert code == 2 and "model.pt" in err and [path.name for path in tmp_path.iterdir()] == ["model.pt"]
