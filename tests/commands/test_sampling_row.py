"""`studio generate --num-tokens` with a model over rows of tokens, and where it is refused."""

import json

import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ("ar", "jacobi")),
        (["--decoding", "speculative"], ("speculative",)),
        (["--temperature", 0], ("ar", "jacobi")),
    ],
    ids=str,
)
def test_a_length(run, tiny_row_folder, tmp_path, options, names):
    call = ("generate", "a red apple", "--model", tiny_row_folder, "--seed", 1, "--num-tokens", 3, *options, "--json")
    code, out, err = run(*call)
    assert code == 0, err
    document = json.loads(out)
    assert document["decoding"] in names and document["tokens"] == 3 and document["target_calls"] <= 3
    record = json.loads(Image.open(tmp_path / document["images"][0]["path"]).text["studio"])["call"]
    assert record["num_tokens"] == 3


@pytest.mark.parametrize(
    ("model", "length", "words"),
    [
        ("tiny_row_folder", 7, "from 1 to 6, not 7"),
        ("tiny_folder", 3, "num_tokens is for rows of tokens"),
        ("tiny_resgen_folder", 3, "no num_tokens"),
    ],
)
def test_a_length_that_does_not_fit_is_refused(run, request, tmp_path, model, length, words):
    folder = request.getfixturevalue(model)
    code, out, err = run("generate", "a red apple", "--model", folder, "--num-tokens", length)
    assert code == 2 and words in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_file_of_prompts_has_lengths_of_its_own(run, tiny_row_folder, tmp_path):
    lines = ('{"prompt": "a red apple"}', '{"prompt": "a pear", "num_tokens": 5}')
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    call = ("generate", "--prompts", "prompts.jsonl", "--model", tiny_row_folder, "--out", "sampled", "--num-tokens", 2)
    code, _, err = run(*call)
    assert code == 0, err
    manifest = (tmp_path / "sampled" / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["num_tokens"] for line in manifest] == [2, 5]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red apple", "num_tokens": 0}')
    code, _, err = run(*call)
    assert code == 2 and "line 1: num_tokens must be a whole number of at least 1" in err.splitlines()[-1]
