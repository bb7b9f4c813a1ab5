"""`studio generate` with an RQ-Transformer, and what does not fit together."""

import json

import pytest
from PIL import Image


@pytest.mark.parametrize("options", [[], ["--decoding", "rq", "--top-p", 0.9, "--guidance", 2]], ids=str)
def test_sampling(run, tiny_rq_folder, tmp_path, options):
    code, out, err = run("generate", "a red apple", "--model", tiny_rq_folder, "--seed", 1, *options, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert (document["decoding"], document["tokens"], document["target_calls"]) == ("rq", 48, 16)
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])["call"]
    assert record["decoding"] == {"name": "rq"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--decoding", "ar"], "not Autoregressive"),
        (["--decoding", "resgen"], "not ResGenDecoding"),
        (["--decoding", "rq", "--steps", "4"], "--steps belongs to"),
        (["--steps", "4"], "--steps"),
        (["--cfg-interval", "3"], "no cfg_interval"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(run, tiny_rq_folder, tmp_path, options, word):
    code, out, err = run("generate", "a red apple", "--model", tiny_rq_folder, *options)
    assert code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts(run, tiny_rq_folder, tmp_path):
    lines = ('{"prompt": "a red apple"}', '{"prompt": "a pear", "decoding": "rq", "top_k": 4}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    code, _, err = run("generate", "--prompts", "prompts.jsonl", "--model", tiny_rq_folder, "--out", "sampled")
    assert code == 0, err
    assert len(list((tmp_path / "sampled").glob("*.png"))) == 2
