"""`studio generate` with a ResGen: its decodings, their settings, and what does not fit together."""

import json

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("options", "name", "calls"),
    [
        ([], "resgen", 4),
        (["--decoding", "resgen", "--steps", 3, "--confidence", "level", "--confidence-temperature", 2], "resgen", 3),
        (["--decoding", "first-hitting", "--steps", 48, "--schedule", "circle", "--top-p", 0.9], "first-hitting", 48),
    ],
    ids=str,
)
def test_decodings(run, tiny_resgen_folder, tmp_path, options, name, calls):
    code, out, err = run("generate", "a red apple", "--model", tiny_resgen_folder, "--seed", 1, *options, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["decoding"], document["tokens"], document["target_calls"]) == (name, 48, calls)
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])["call"]
    assert record["decoding"]["name"] == name and record["decoding"].get("steps", 4) == calls


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--decoding", "ar"], "not Autoregressive"),
        (["--decoding", "bridge"], "not DimensionWise"),
        (["--decoding", "first-hitting", "--confidence", "cell"], "--confidence belongs to --decoding resgen"),
        (["--decoding", "resgen", "--confidence", "word"], "cell, level"),
        (["--decoding", "resgen", "--schedule", "linear"], "cosine, circle, arccos"),
        (["--decoding", "resgen", "--steps", "49"], "48 codes"),
        (["--cfg-interval", "3"], "no cfg_interval"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(run, tiny_resgen_folder, tmp_path, options, word):
    code, out, err = run("generate", "a red apple", "--model", tiny_resgen_folder, *options)
    assert code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "calls"), [("resgen", 3), ("first-hitting", 5)])
def test_the_ablation_samples_by_the_same_command(run, tiny_softmax_folder, name, calls):
    decoding = ("--decoding", name, "--steps", calls, "--top-k", 4)
    code, out, err = run("generate", "a red apple", "--model", tiny_softmax_folder, *decoding, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["decoding"], document["tokens"], document["target_calls"]) == (name, 48, calls)


def test_a_file_of_prompts(run, tiny_resgen_folder, tmp_path):
    lines = ('{"prompt": "a red apple"}', '{"prompt": "a pear", "decoding": "resgen", "confidence": "level"}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    code, _, err = run("generate", "--prompts", "prompts.jsonl", "--model", tiny_resgen_folder, "--out", "sampled")
    assert code == 0, err
    assert len(list((tmp_path / "sampled").glob("*.png"))) == 2
