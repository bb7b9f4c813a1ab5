"""Sampling with a student: a perfect one returns the teacher's sampling whatever the schedule; calls; refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from studio import LlamaGen, StudioError
from studio.decoding.autoregressive import Autoregressive, autoregressive
from studio.decoding.distilled import (
    Distilled,
    distilled,
    few_step,
    nearest,
    sample_noise,
    sample_pairs,
    spread_times,
    teacher_tokens,
    trajectory,
)
from studio.decoding.noise_map import NoiseMap
from studio.decoding.sampling import Sampling
from studio.models.distilled import DistilledStudent

N, BATCH = 16, 3
CONDITION = {"class_labels": torch.tensor([1, 7, 3])}
SCALE, SAMPLING = 2.0, Sampling(top_k=20)


def streams():
    return [torch.Generator().manual_seed(seed) for seed in range(BATCH)]


def streams_behind_the_noise():
    generators = streams()
    sample_noise(generators, N, 5, "cpu")
    return generators


@pytest.fixture(scope="module")
def codebook():
    return F.normalize(torch.randn(48, 5, generator=torch.Generator().manual_seed(0)), dim=-1)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = LlamaGen(vocab_size=48, dim=32, num_layers=2, num_heads=2, grid_size=4, num_classes=10)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def student(teacher, codebook):
    torch.manual_seed(1)
    return DistilledStudent.from_teacher(teacher, codebook).eval()


@pytest.fixture(scope="module")
def noise():
    return sample_noise(streams(), N, 5, "cpu")


@pytest.fixture(scope="module")
def sampling(teacher, codebook, noise):
    return sample_pairs(teacher, CONDITION, noise, NoiseMap(codebook), sampling=SAMPLING, guidance_scale=SCALE)


class Perfect:
    """A student that knows the end of the trajectory of `noise`, and only of that."""

    horizon, bounds = 5 / 8, range(N + 1)
    device, config = torch.device("cpu"), type("Config", (), {"split": None})

    def __init__(self, tokens, codebook, noise):
        self.tokens, self.codebook, self.noise = tokens, codebook, noise

    def hidden_states(self, vectors, known, **condition):
        point = trajectory(self.noise, self.codebook[self.tokens], known)
        torch.testing.assert_close(vectors, point[:, : vectors.shape[1]], atol=0, rtol=0)
        return F.one_hot(self.tokens, len(self.codebook)).float()[:, : vectors.shape[1]], None

    def classify(self, hidden, context):
        return hidden

    def regress(self, hidden, context):
        return hidden @ self.codebook


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 1}, {"steps": 3}, {"steps": 3, "split": 4}, {"times": (0, 6, 12), "split": 9}, {"split": 0},
        {"times": [0, N]}, {"teacher_steps": (1, 5)}, {"teacher_steps": (4, 9), "split": 2},
        {"teacher_steps": [6, N + 1]}, {"teacher_steps": (1, N + 1)}, {"snap": "nearest", "split": 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_perfect_student_returns_the_sampling(settings, teacher, codebook, noise, sampling):
    sampled = distilled(
        teacher,
        CONDITION,
        student=Perfect(sampling, codebook, noise),
        codebook=codebook,
        generators=streams(),
        sampling=SAMPLING,
        guidance_scale=SCALE,
        settings=Distilled(**settings, **({"teacher_sample": "map"} if "teacher_steps" in settings else {})),
    )
    assert torch.equal(sampled.noise, noise)
    assert torch.equal(sampled.tokens, sampling)
    torch.testing.assert_close(sampled.latents, codebook[sampling])


def test_pairs_have_the_distribution_of_the_teacher():
    torch.manual_seed(0)
    table = LlamaGen(vocab_size=3, dim=16, num_layers=1, num_heads=1, grid_size=2, num_classes=2)
    torch.nn.init.normal_(table.output.weight, std=0.5)
    torch.nn.init.normal_(table.tok_embeddings.weight, std=0.5)
    table, codebook = table.eval(), torch.randn(3, 2, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(temperature=0.7)
    every = torch.tensor([*itertools.product(range(3), repeat=2)])
    logits = table(every, class_labels=torch.zeros(9, dtype=torch.long))
    probs = sampling.probabilities(logits.flatten(0, 1)).view(9, 3, 3)
    exact = probs[:, 0].gather(1, every[:, :1])[:, 0] * probs[:, 1].gather(1, every[:, 1:])[:, 0]
    count = 4000
    noise = torch.randn(count, 4, 2, generator=torch.Generator().manual_seed(4))
    labels = {"class_labels": torch.zeros(count, dtype=torch.long)}
    tokens = sample_pairs(
        table,
        labels,
        noise,
        NoiseMap(codebook),
        sampling=sampling,
        guidance_scale=1.0,
        settings=Autoregressive(weights="plain"),
    )
    found = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=9)
    marginal = torch.outer(exact.view(3, 3).sum(1), exact.view(3, 3).sum(0)).flatten()

    def chi_square(expected):
        return float(((found - count * expected) ** 2 / (count * expected)).sum())

    assert chi_square(exact.detach()) < 31.8  # once in ten thousand at 8 degrees of freedom
    assert chi_square(marginal.detach()) > 31.8, "the test would not notice independent tokens"


def test_samples_as_the_plain_loop_where_the_teacher_samples_all(teacher, student, codebook):
    options = {"sampling": SAMPLING, "guidance_scale": SCALE}
    for interval in (-1, 4):
        generators = streams_behind_the_noise()
        plain = autoregressive(teacher, CONDITION, generators=generators, cfg_interval=interval, **options)
        sampled = distilled(
            teacher, CONDITION, student=student, codebook=codebook, generators=streams(), cfg_interval=interval,
            settings=Distilled(teacher_steps=(1, N + 1)), **options,
        )  # fmt: skip
        assert torch.equal(sampled.tokens, plain.tokens)
        assert (sampled.target_calls, sampled.row_calls) == (plain.target_calls, plain.row_calls)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("weights", ["plain", "auto"])
def test_the_teacher_goes_on_from_a_prefix(scale, weights, teacher):
    def greedy(index, logits):
        return logits.argmax(dim=-1)

    options = {"guidance_scale": scale, "settings": Autoregressive(weights=weights)}
    nothing = torch.zeros(BATCH, 0, dtype=torch.long)
    whole = teacher_tokens(teacher, CONDITION, nothing, N, greedy, **options)
    assert torch.equal(teacher_tokens(teacher, CONDITION, whole[:, :7], N, greedy, **options), whole)


@pytest.mark.parametrize(
    ("settings", "calls", "by_student"),
    [({}, 1, 1), ({"steps": 3}, 3, 3), ({"teacher_steps": (1, 5)}, 5, 1), ({"teacher_steps": (4, 9)}, 7, 2),
     ({"teacher_steps": (4, N + 1)}, N - 2, 1), ({"teacher_steps": (1, N + 1)}, N, 0)],
    ids=str,
)  # fmt: skip
def test_calls(settings, calls, by_student, teacher, student, codebook):
    ends, settings = [], Distilled(**settings)
    sampled = distilled(
        teacher, CONDITION, student=student, codebook=codebook, generators=streams(), settings=settings,
        on_step=lambda index, tokens: ends.append((index, tokens.shape[1])),
    )  # fmt: skip
    assert (sampled.target_calls, sampled.student_calls) == (calls, by_student)
    assert sampled.tokens.shape == (BATCH, N) and sampled.latents.shape == (BATCH, N, 5)
    assert len(ends) == calls - (settings.teacher_steps is not None and settings.teacher_steps[0] > 1)
    assert all(index + 1 == length for index, length in ends) and ends[-1][1] == N


def test_a_batch_equals_its_single_calls(teacher, student, codebook):
    for settings in (Distilled(steps=2, split=5), Distilled(teacher_steps=(3, 8))):
        options = {"student": student, "codebook": codebook, "settings": settings, "guidance_scale": SCALE}
        together = distilled(teacher, CONDITION, generators=streams(), **options)
        for row, generator in enumerate(streams()):
            own = {"class_labels": CONDITION["class_labels"][row : row + 1]}
            single = distilled(teacher, own, generators=[generator], **options)
            assert torch.equal(single.tokens[0], together.tokens[row])
            torch.testing.assert_close(single.latents[0], together.latents[row])


def test_a_callback_changes_and_stops(teacher, student, codebook):
    options = {"student": student, "codebook": codebook, "generators": streams()}

    def paint(index, tokens):
        tokens[:, 0] = 11

    sampled = distilled(None, CONDITION, settings=Distilled(steps=2, split=4), on_step=paint, **options)
    assert (sampled.tokens[:, 0] == 11).all()
    torch.testing.assert_close(sampled.latents[:, 0], codebook[11].expand(BATCH, -1))
    stopped = distilled(None, CONDITION, settings=Distilled(steps=3), on_step=lambda *_: True, **options)
    assert stopped.student_calls == 1 and stopped.tokens.shape == (BATCH, N)
    halfway = distilled(
        teacher, CONDITION, settings=Distilled(teacher_steps=(4, 12)), on_step=lambda index, _: index == 6, **options
    )
    assert halfway.tokens.shape == (BATCH, 7) and halfway.latents.shape == (BATCH, 7, 5)


def test_the_image_decoder_takes_the_latents(tiny_vq):
    student = DistilledStudent(vocab_size=64, code_dim=4, dim=32, num_layers=1, num_heads=2, grid_size=4, num_classes=9)
    sampled = distilled(
        None, CONDITION, student=student.eval(), codebook=tiny_vq.codebook, generators=streams(),
        settings=Distilled(split=3, snap="nearest"),
    )  # fmt: skip
    with torch.no_grad():
        images = tiny_vq.decode_features(sampled.latents.transpose(1, 2).unflatten(2, (4, 4)))
        torch.testing.assert_close(images, tiny_vq.decode(sampled.tokens.view(-1, 4, 4)))


def test_known_steps_and_the_rest_of_the_noise_stay(codebook, noise, sampling, student):
    vectors = codebook[sampling]
    for known in (0, 5, N):
        point = trajectory(noise, vectors, known)
        assert torch.equal(point[:, :known], vectors[:, :known]) and torch.equal(point[:, known:], noise[:, known:])
    rows = trajectory(noise, vectors, torch.tensor([0, 5, N]))
    assert torch.equal(rows[0], noise[0]) and torch.equal(rows[2], vectors[2])
    seen = []

    def on_call(ends, tokens):
        seen.append(ends)
        return ends, False

    with torch.no_grad():
        few_step(student, codebook, noise, CONDITION, times=(0, 6), split=3, on_call=on_call)
    assert torch.equal(seen[0][:, :6], seen[1][:, :6])
    assert torch.equal(nearest(vectors, codebook), sampling)


def test_schedules():
    assert spread_times(1, 256, 5 / 8) == (0,)
    assert spread_times(2, 256, 5 / 8) == (0, 80)
    assert spread_times(4, 256, 5 / 8) == (0, 40, 80, 120)
    assert spread_times(2, 10, 1.0) == (0, 5)


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"steps": True}, {"times": ()}, {"times": (1, 2)}, {"times": (0, 3, 3)}, {"times": (0, 2.5)},
     {"steps": 3, "times": (0, 4)}, {"teacher_steps": (0, 4)}, {"teacher_steps": (4, 4)}, {"teacher_steps": (1, 2, 3)},
     {"steps": 2, "teacher_steps": (1, 4)}, {"times": (0, 2), "teacher_steps": (1, 4)}, {"split": -1}, {"snap": "yes"},
     {"teacher_sample": "best"}, {"filter_order": "none"}, {"weights": "float8"},
     {"teacher_sample": "map"}, {"filter_order": "lantern"}, {"weights": "plain"}],
    ids=str,
)  # fmt: skip
def test_refuses_settings(settings):
    with pytest.raises(StudioError):
        Distilled(**settings)


def test_refuses_what_the_student_cannot_serve(teacher, student, codebook):
    def call(model=teacher, **settings):
        return distilled(
            model, CONDITION, student=student, codebook=codebook, generators=streams(), settings=Distilled(**settings)
        )

    for settings in ({"steps": 40}, {"times": (0, 17)}, {"split": 17}, {"teacher_steps": (3, 18)}):
        with pytest.raises(StudioError):
            call(**settings)
    with pytest.raises(StudioError, match="teacher"):
        call(model=None, teacher_steps=(1, 3))
