"""Tokens made for a question: the formula, what may change them, and the way through pipeline, folder and command."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import LlavaConfig

from studio import cli, load
from studio.data.scenes import draw_scene
from studio.errors import StudioError
from studio.evaluation import evaluate
from studio.evaluation.reading import IGNORED, compressed_logits, pack_questions, question_states
from studio.evaluation.scenes import evaluate_compressed
from studio.pipelines.visual_question import VisualQuestionPipeline
from studio.pruning.layout import Layout
from studio.pruning.quecc import FOLDER, Compressor, compress_inputs
from studio.training import quecc as training
from studio.training.options import merge

COUNTS = (1, 4, 16, 36)


def randomised(made):
    """With no weight at zero, as after training."""
    generator = torch.Generator().manual_seed(1)
    for weight in made.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5
    return made.eval()


@pytest.fixture
def small():
    return randomised(Compressor(width=8, text_width=6, side=12, num_heads=2, tokens=COUNTS))


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 144, 8, generator=generator), torch.randn(2, 3, 6, generator=generator)


@pytest.fixture(scope="module")
def pipe(tiny_reader):
    model, processor = tiny_reader
    return VisualQuestionPipeline(model, processor, randomised(Compressor.for_reader(model, tokens=COUNTS)))


@pytest.fixture(scope="module")
def scene():
    return draw_scene(np.random.default_rng(0))


def textbook(made, patches, question, tokens):
    """One square and one question, step by step: y = x + FFN(t), pooled, each token looks at its window of y."""
    root, size = int(tokens**0.5), made.config.side
    y = patches + made.from_question(question)
    square = y.T.reshape(1, -1, size, size)
    pooled = made.pool[str(tokens)](square)[0].flatten(1).T
    rows = torch.arange(size) // (size // root)
    window = (rows[:, None] * root + rows).flatten()
    out = []
    for number in range(tokens):
        inside = y[window == number]
        query, key, value = made.query(pooled[number]), made.key(inside), made.value(inside)
        scale = patches[window == number].square().mean() * (len(query) / made.config.num_heads) ** 0.5
        heads = [
            torch.softmax(key[:, part] @ query[part] / scale, dim=0) @ value[:, part]
            for part in torch.arange(len(query)).chunk(made.config.num_heads)
        ]
        out.append(pooled[number] + made.out(torch.cat(heads)))
    return made.linear_2(F.gelu(made.linear_1(torch.stack(out))))


@pytest.mark.parametrize("tokens", COUNTS)
def test_tokens_are_those_of_the_formula(small, given, tokens):
    patches, questions = given
    made = small(patches, questions, tokens)
    assert made.shape == (2, 3, tokens, 6)
    for row in range(2):
        for number in range(3):
            expected = textbook(small, patches[row], questions[row, number], tokens)
            torch.testing.assert_close(made[row, number], expected, atol=1e-5, rtol=1e-4)


def test_a_window_changes_its_own_token_alone_and_the_question_all(small, given):
    patches, questions = given
    plain = small(patches, questions, 16)
    changed = patches.clone()
    changed[0, 12 * 4 + 7] += 1.0  # row 4, column 7: window (1, 2) of 4 x 4
    moved = (small(changed, questions, 16) - plain).abs().amax(dim=(1, 3)) > 1e-5
    assert moved.nonzero().tolist() == [[0, 6]]
    other = questions.clone()
    other[1, 2] += 1.0
    moved = (small(patches, other, 16) - plain).abs().amax(dim=(2, 3)) > 1e-5
    assert moved.nonzero().tolist() == [[1, 2]]


def test_a_new_compressor_is_the_mean_of_each_window_through_the_projector(tiny_reader):
    """Whatever the question: the control of the test above."""
    model = tiny_reader[0]
    made = Compressor.for_reader(model)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, 576, 32, generator=generator)
    means = patches.unflatten(1, (4, 6, 4, 6)).mean(dim=(2, 4)).flatten(1, 2)
    expected = model.model.multi_modal_projector(means)[:, None].expand(-1, 2, -1, -1)
    torch.testing.assert_close(made(patches, torch.randn(1, 2, 32, generator=generator), 16), expected)


@pytest.mark.parametrize("tokens", COUNTS)
def test_places_are_the_middles_of_windows(pipe, tokens):
    layout, root = Layout.anyres(12, (2, 2), (192, 192)), int(tokens**0.5)
    places = pipe.compressor.places(tokens)
    assert len(layout) == pipe.compressor.prompt_tokens and (layout.partition[places] > 0).all()
    middles = (torch.arange(root) + 0.5) * 24 / root
    assert torch.equal(layout.row[places].view(root, root), middles.long()[:, None].expand(root, root))
    assert torch.equal(layout.column[places].view(root, root), middles.long().expand(root, root))


def test_the_square_is_in_raster_order(pipe, scene):
    """Where the lower left tile changes, so do the tokens of that quarter and no others."""
    image = Image.fromarray(scene.image)
    other = image.copy()
    other.paste((0, 90, 200), (10, 100, 60, 150))
    pixels = pipe.processor.image_processor([image, other], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        before, after = pipe.compressor.read(pipe.model, pixels)
    moved = ((before - after).abs().amax(dim=-1) > 1e-5).view(24, 24)
    quarter = torch.zeros(24, 24, dtype=torch.bool)
    quarter[12:, :12] = True
    assert torch.equal(moved, quarter)


@pytest.mark.parametrize("tokens", COUNTS)
def test_the_pipeline_reads_what_training_reads(pipe, scene, tokens):
    image = Image.fromarray(scene.image)
    texts = [(question.text, question.answer) for question in scene.questions[:3]]
    packed = pack_questions(pipe.processor.tokenizer, [[text] for text in texts])
    pixels = pipe.processor.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = pipe.compressor.read(pipe.model, pixels)
        logits = compressed_logits(pipe.model, pipe.compressor, patches, tokens, packed)
        for row, (question, _) in enumerate(texts):
            inputs = pipe.processor(images=image, text=f"<image>\n{question}", return_tensors="pt")
            alone = pipe.processor.tokenizer(question, return_tensors="pt")["input_ids"]
            short, info = compress_inputs(pipe.model, pipe.compressor, inputs, alone, tokens)
            assert (info.tokens_before, info.tokens_after) == ([744], [tokens])
            end = int(packed.ends(1)[row, 0])
            torch.testing.assert_close(pipe.model(**short).logits[0, -1], logits[row, end], atol=2e-4, rtol=1e-4)
            answer = pipe(image, question, tokens=tokens, max_new_tokens=1)
            best = pipe.processor.decode(logits[row, end].argmax(), skip_special_tokens=True)
            assert answer.answer == best.strip() and answer.kept_tokens == tokens
            assert answer.prompt_tokens == tokens + alone.shape[1]


@torch.enable_grad()
def test_the_question_is_read_without_gradient(pipe, scene, monkeypatch):
    """Control: outside, its state has one."""
    packed = pack_questions(pipe.processor.tokenizer, [[(scene.questions[0].text, "yes")]])
    assert question_states(pipe.model, packed, 1).requires_grad
    states, forward = [], Compressor.forward
    spied = lambda self, patches, question, tokens: states.append(question) or forward(self, patches, question, tokens)  # noqa: E731
    monkeypatch.setattr(Compressor, "forward", spied)
    logits = compressed_logits(pipe.model, pipe.compressor, torch.randn(1, 576, 32), 4, packed)
    assert logits.requires_grad and not states[0].requires_grad


def test_questions_are_read_alone_or_packed(pipe, scene):
    tokenizer = pipe.processor.tokenizer
    texts = [(question.text, question.answer) for question in scene.questions[:4]]
    with torch.no_grad():
        together = question_states(pipe.model, pack_questions(tokenizer, [texts]), 4)[0]
        for state, (question, _) in zip(together, texts, strict=True):
            ids = tokenizer(question, return_tensors="pt")["input_ids"]
            alone = pipe.model.model.language_model(input_ids=ids).last_hidden_state[0, -1]
            torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-4)


@torch.enable_grad()
def test_training_lowers_the_loss_and_leaves_the_reader(tiny_reader, monkeypatch):
    """Control: without steps the loss is the same."""
    monkeypatch.setattr(training, "QUESTIONS", 3)
    recipe = training.QueCCRecipe(merge({"kind": "quecc"}), torch.device("cpu"), None)
    recipe.processor, recipe.tokens = tiny_reader[1], (4,)
    batch = recipe.batch(np.random.default_rng(0), 2)
    assert "whole_ids" in batch
    recipe.share = 0.9
    assert "whole_ids" not in recipe.batch(np.random.default_rng(0), 2)
    reader = copy.deepcopy(tiny_reader[0])
    module = training.TrainableCompressor(Compressor.for_reader(reader, tokens=(4,)), reader).train()
    assert not reader.training and {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {
        "compressor"
    }
    losses = [module(**dict(batch)).item() for _ in range(2)]
    assert losses[0] == losses[1]
    optimizers = recipe.optimizers(module, 4e-3)
    for _ in range(30):
        module(**dict(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert module(**dict(batch)).item() < 0.8 * losses[0]
    for key, weight in tiny_reader[0].state_dict().items():
        assert torch.equal(weight, reader.state_dict()[key]), key


def test_the_teacher_answers_in_the_order_of_the_pupil(tiny_reader, monkeypatch):
    """The divergence is between rows of the same question: the targets behind both are the same tokens."""
    monkeypatch.setattr(training, "QUESTIONS", 3)
    recipe = training.QueCCRecipe(merge({"kind": "quecc"}), torch.device("cpu"), None)
    recipe.processor, recipe.tokens = tiny_reader[1], (4,)
    batch = recipe.batch(np.random.default_rng(0), 3)
    alone, whole = batch["targets"], batch["whole_targets"]
    assert torch.equal(alone[alone != IGNORED], whole[whole != IGNORED])


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("quecc") / "made"
    for part in (pipe.model, pipe.processor):
        part.save_pretrained(path)
    pipe.compressor.save_pretrained(path / FOLDER)
    return path


def test_a_folder_answers_as_before_it_was_saved(pipe, folder, scene):
    image = Image.fromarray(scene.image)
    again = load(folder, device="cpu")
    for question in scene.questions[:3]:
        ask = {"image": image.resize((300, 170)), "question": question.text, "max_new_tokens": 4}
        assert again(**ask, tokens=16).answer == pipe(**ask, tokens=16).answer
    assert again(image, "what", tokens=4, merge=10, max_new_tokens=1).kept_tokens == 4
    assert again(image, "what", max_new_tokens=1).kept_tokens == 744


def test_accuracy_is_that_of_the_answers(pipe, folder):
    pipe.model.generation_config.eos_token_id = pipe.processor.tokenizer.eos_token_id
    measured = evaluate_compressed(pipe, scenes=1)
    scene = draw_scene(np.random.default_rng((1_000_000_007, 0, 0)))
    image = Image.fromarray(scene.image)
    for tokens in (1, 16):
        right = [pipe(image, q.text, tokens=tokens, max_new_tokens=4).answer == q.answer for q in scene.questions]
        assert measured["accuracy"][str(tokens)] == np.mean(right)
    pipe.model.generation_config.eos_token_id = None
    assert evaluate(folder, samples=1)["compressed"] == measured["accuracy"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"tokens": 9}, "compresses an image to 1, 4, 16, 36 tokens, not to 9"),
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 4, "prune": "divprune"}, "exclude each other"),
        ({"tokens": 4, "after_layer": 1}, "after_layer needs a method"),
    ],
)
def test_wrong_calls_are_refused(pipe, scene, call, words):
    with pytest.raises(StudioError, match=words):
        pipe(Image.fromarray(scene.image), "what", **call)


def test_other_readers_are_refused(pipe, scene, folder, tmp_path):
    model, processor = pipe.model, pipe.processor
    with pytest.raises(StudioError, match="no compressor"):
        VisualQuestionPipeline(model, processor)(Image.fromarray(scene.image), "what", tokens=4)
    with pytest.raises(StudioError, match="not for llava"):
        other = torch.nn.Module()
        other.config = LlavaConfig()
        Compressor.for_reader(other)
    with pytest.raises(StudioError, match="images of 480 x 480 px"):
        Compressor.for_reader(model, tiles=5)
    with pytest.raises(StudioError, match="become 1, 4, 9, 16, 36, 64, 144, 576 tokens, not 25"):
        Compressor.for_reader(model, tokens=(25,))
    with pytest.raises(StudioError, match="divides"):
        Compressor(width=33, num_heads=2)
    Compressor(width=16, text_width=32, num_heads=2).save_pretrained(folder.parent / "wide" / FOLDER)
    for part in (model, processor):
        part.save_pretrained(folder.parent / "wide")
    with pytest.raises(StudioError, match="another reader: its width is not 32"):
        load(folder.parent / "wide", device="cpu")


def test_the_command(folder, scene, tmp_path, capfd):
    file = tmp_path / "scene.png"
    Image.fromarray(scene.image).save(file)

    def ask(*more):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["ask", str(file), "what is there", *more, "--model", str(folder), "--max-new-tokens", "2"])
        return stopped.value.code, *capfd.readouterr()

    code, out, err = ask("--tokens", "4", "--json")
    assert code == 0, err
    assert json.loads(out)["kept_tokens"] == 4
    for more, words in (
        (("--tokens", "5"), "not to 5"),
        (("and here", "--tokens", "4"), "for one question"),
        (("--tokens", "4", "--prune", "divprune"), "exclude each other"),
    ):
        code, out, err = ask(*more)
        assert code == 2 and out == "" and words in err and "Traceback" not in err
