"""Questions about images, on a tiny random LLaVA-NeXT with its real processor: counts, clocks, pruning, refusals."""

import json
import time

import numpy as np
import pytest
from PIL import Image

from studio import VisualQuestionPipeline, cli, load
from studio.errors import StudioError


@pytest.fixture(scope="module")
def folder(tiny_reader, tmp_path_factory):
    """The model and its processor as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("vlm") / "tiny"
    for part in tiny_reader:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    loaded = load(folder, device="cpu")
    assert isinstance(loaded, VisualQuestionPipeline)
    return loaded


@pytest.fixture(scope="module")
def image():
    return Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def test_everything_is_read_without_a_method(pipe, image):
    answer = pipe(image, "what is at the left", max_new_tokens=5)
    inputs = pipe.processor(images=image, text="<image>\nwhat is at the left", return_tensors="pt")
    expected = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.answer == pipe.processor.decode(expected, skip_special_tokens=True).strip()
    assert answer.visual_tokens == answer.kept_tokens == int((inputs["input_ids"] == 4).sum())


BEFORE = ["divprune", "hired", "globalcom2", "scope", "coverage", "cdpruner", "mmtok", "random", "uniform"]


@pytest.mark.parametrize("method", BEFORE)
def test_pruning_shrinks_prompt_and_cache(pipe, image, method):
    whole = pipe(image, "how many", max_new_tokens=3)
    part = pipe(image, "how many", prune=method, keep=0.25, max_new_tokens=3)
    assert part.visual_tokens == whole.visual_tokens
    assert abs(part.kept_tokens - 0.25 * whole.visual_tokens) <= 1
    each = whole.cache_bytes / (1 + whole.visual_tokens + 2 + 2)
    assert part.cache_bytes == pytest.approx(whole.cache_bytes - each * (whole.visual_tokens - part.kept_tokens))
    assert set(part.seconds) == {"encode", "select", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in part.seconds.values())


@pytest.mark.parametrize(("method", "layer"), [("fastv", None), ("fastv", 1), ("divprune", 1)])
def test_pruning_behind_a_layer_shrinks_the_caches_that_follow(pipe, image, method, layer):
    layers = pipe.model.config.text_config.num_hidden_layers
    if layer is None and layers <= 2:
        with pytest.raises(StudioError, match=f"from 1 to {layers - 1}"):
            pipe(image, "how many", prune=method, keep=0.25)
        return
    whole = pipe(image, "how many", max_new_tokens=3)
    part = pipe(image, "how many", prune=method, keep=0.25, after_layer=layer, max_new_tokens=3)
    assert part.kept_tokens == round(0.25 * whole.visual_tokens) and part.visual_tokens == whole.visual_tokens
    each = whole.cache_bytes / (1 + whole.visual_tokens + 2 + 2) / layers
    gone = (whole.visual_tokens - part.kept_tokens) * (layers - (layer or 2))
    assert part.cache_bytes == pytest.approx(whole.cache_bytes - each * gone)
    assert sum(int(view.kept.sum()) for view in part.views) <= part.kept_tokens
    assert part.seconds["encode"] > 0


def test_vscan_shows_what_is_left_of_both_cuts(pipe, image):
    began = time.perf_counter()
    answer = pipe(image, "how many", prune="vscan", keep=0.25, max_new_tokens=3)
    assert answer.kept_tokens == round(0.25 * answer.visual_tokens) and answer.info.layouts
    content = int((answer.info.layouts[0].partition[answer.info.kept[0]] >= 0).sum())
    assert sum(int(view.kept.sum()) for view in answer.views) == content
    assert all(spent > 0 for spent in answer.seconds.values())
    assert sum(answer.seconds.values()) < time.perf_counter() - began


def test_a_memory_answers_many_questions(pipe, image, monkeypatch):
    questions = ["how many", "what is at the left", "how many"]
    alone = [pipe(image, question, max_new_tokens=4).answer for question in questions]
    memory = pipe.remember(image, keep=1.0)
    monkeypatch.setattr(pipe.model.model, "get_image_features", None)
    assert [pipe.ask(memory, question, max_new_tokens=4).answer for question in questions] == alone
    monkeypatch.undo()
    small = pipe.remember(image, keep=0.05)
    assert small.kept_tokens == round(0.05 * memory.visual_tokens)
    assert small.cache_bytes * (1 + memory.visual_tokens) == memory.cache_bytes * (1 + small.kept_tokens)
    first, again = (pipe.ask(small, "how many", max_new_tokens=4) for _ in range(2))
    assert first.answer == again.answer and first.cache_bytes == again.cache_bytes < memory.cache_bytes
    with pytest.raises(StudioError, match="empty"):
        pipe.ask(small, " ")
    with pytest.raises(StudioError, match="coverage"):
        pipe.remember(image, method="none")


def test_the_answer_grows_token_by_token_and_can_be_stopped(pipe, image):
    whole = pipe(image, "how many", max_new_tokens=4)
    seen = []
    again = pipe(image, "how many", max_new_tokens=4, on_step=seen.append)
    assert again.answer == whole.answer == seen[-1].answer
    assert seen[0].answer == "" and seen[0].views and len(seen) == 5
    assert all(later.answer.startswith(earlier.answer) for earlier, later in zip(seen, seen[1:]))
    few = []
    stopped = pipe(image, "how many", max_new_tokens=4, on_step=lambda answer: few.append(answer) or len(few) == 3)
    assert len(few) == 3 and stopped.answer == seen[2].answer
    unread = pipe(image, "how many", on_step=lambda answer: True)
    assert unread.answer == "" and unread.cache_bytes == 0 and unread.seconds["encode"] > 0


@pytest.mark.parametrize("size", [(96, 96), (192, 100), (60, 180)])
def test_kept_tokens_have_their_places_in_the_image(pipe, image, size):
    answer = pipe(image.resize(size), "how many", prune="divprune", keep=0.3, max_new_tokens=1)
    contents = len(answer.info.layouts[0].content)
    whole, crops = answer.views
    assert (whole.name, crops.name) == ("whole", "crops") and whole.box == (0, 0, 1, 1)
    assert int(whole.read.sum()) == whole.read.numel() == 144
    assert int(whole.read.sum() + crops.read.sum()) == contents
    newlines = int((answer.info.layouts[0].partition[answer.info.kept[0]] < 0).sum())
    assert int(whole.kept.sum() + crops.kept.sum()) == answer.kept_tokens - newlines
    assert not (crops.kept & ~crops.read).any()


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"question": " "}, "empty"),
        ({"question": "x" * 2001}, "2001"),
        ({"question": "an <image> or two"}, "contains <image>"),
        ({"prune": "nonsense"}, "divprune"),
        ({"prune": ""}, "divprune"),
        ({"prune": "divprune", "keep": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"prune": "divprune", "keep": 1.5}, "above 0 and at most 1, not 1.5"),
        ({"prune": "divprune", "keep": 0}, "at least 1 token"),
        ({"prune": "divprune", "keep": "much"}, "number of tokens or a fraction"),
        ({"prune": "vscan", "keep": 7}, "vscan .* needs a fraction"),
        ({"keep": 0.2}, "keep needs a method"),
        ({"keep": 0.2, "tokens": 4}, "keep needs a method"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"merge": "diffrate"}, "No rates were learned"),
        ({"merge": "half"}, "diffrate:36"),
        ({"merge": 145}, "can lose"),
    ],
)
def test_wrong_calls_are_refused(pipe, image, call, word):
    with pytest.raises(StudioError, match=word):
        pipe(image, **{"question": "what", **call})


def test_a_whole_number_is_one_of_tokens_and_another_number_a_share(pipe, image):
    whole = pipe(image, "how many", max_new_tokens=1).visual_tokens
    for keep, kept in ((1, 1), (7, 7), (np.int64(7), 7), (1.0, whole), (np.float32(1), whole), (10_000, whole)):
        for method, more in (("divprune", {}), ("divprune", {"after_layer": 1})):
            answer = pipe(image, "how many", prune=method, keep=keep, max_new_tokens=1, **more)
            assert (answer.kept_tokens, answer.visual_tokens) == (kept, whole)
        memory = pipe.remember(image, keep=keep)
        assert (memory.kept_tokens, memory.visual_tokens) == (kept, whole)


def run(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    return stopped.value.code, *capfd.readouterr()


def test_ask_prints_answer_and_counts(folder, image, tmp_path, capfd):
    image.save(tmp_path / "scene.png")
    call = ("ask", tmp_path / "scene.png", "how many", "--model", folder, "--max-new-tokens", 3)
    code, out, err = run(capfd, *call, "--prune", "divprune", "--keep", 0.2, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert set(document) == {"answer", "visual_tokens", "kept_tokens", "seconds", "cache_bytes", "tower"}
    assert document["tower"] is None and document["kept_tokens"] < document["visual_tokens"]
    code, out, err = run(capfd, *call, "--prune", "divprune", "--keep", 1, "--json")
    assert json.loads(out)["kept_tokens"] == document["visual_tokens"], err
    for merge in ((), ("--merge", "diffrate:40+9"), ("--merge", 9)):
        code, out, err = run(capfd, *call, *merge)
        assert code == 0 and f"{document['visual_tokens']} of {document['visual_tokens']}" in out, err
        assert ("tokens in the tower" in out) == bool(merge)


def test_ask_reads_the_image_once_for_several_questions(folder, image, tmp_path, capfd):
    image.save(tmp_path / "scene.png")
    call = ("ask", tmp_path / "scene.png", "how many", "what is at the left", "--model", folder, "--max-new-tokens", 3)
    code, out, err = run(capfd, *call, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["kept_tokens"] == document["visual_tokens"]
    for said in document["answers"]:
        code, out, err = run(capfd, "ask", call[1], said["question"], *call[4:], "--json")
        assert json.loads(out)["answer"] == said["answer"]
    code, out, err = run(capfd, *call, "--keep", 1, "--json")
    assert json.loads(out)["kept_tokens"] == document["visual_tokens"], err
    code, out, err = run(capfd, *call, "--keep", 0.1, "--json")
    assert json.loads(out)["kept_tokens"] == round(0.1 * document["visual_tokens"]) and document["tower"] is None
    code, out, err = run(capfd, *call, "--merge", "diffrate:40+9", "--json")
    merged = json.loads(out)
    assert merged["tower"]["tokens"] <= merged["tower"]["patches"]
    for said in merged["answers"]:
        code, out, err = run(capfd, "ask", call[1], said["question"], *call[4:], "--merge", "diffrate:40+9", "--json")
        assert json.loads(out)["answer"] == said["answer"] and json.loads(out)["tower"] == merged["tower"]
    code, out, err = run(capfd, *call, "--prune", "divprune")
    assert code == 2 and "one by one" in err


def test_ask_refuses_what_changes_nothing_and_what_cannot_read(folder, tiny_folder, image, tmp_path, capfd):
    image.save(tmp_path / "scene.png")
    for model, extra, word in (
        (folder, ("--keep", 0.2), "--prune"),
        (folder, ("--after-layer", 1), "--prune"),
        (folder, ("--merge", "half"), "diffrate:36+10,28+8, not 'half'"),
        (folder, ("--merge", "diffrate"), "studio train diffrate"),
        (folder, ("--merge", "diffrate:100+50"), "can lose 143"),
        (tiny_folder, (), "reads no images"),
        (tiny_folder / "text_encoder", (), "reads no images"),
    ):
        code, out, err = run(capfd, "ask", tmp_path / "scene.png", "what", "--model", model, *extra)
        assert code == 2 and out == "" and word in err and "Traceback" not in err
