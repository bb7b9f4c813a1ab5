"""Next-scale decoding: going on from scales changes nothing, guidance and filters are VAR's, the student fits in."""

import pytest
import torch

from studio.decoding.distilled import few_step, hybrid
from studio.decoding.next_scale import next_scale
from studio.models.distilled_var import DistilledVAR
from studio.models.var import VAR
from studio.tokenizers.var import VARTokenizer
from tests.decoding.distributions import scale_probabilities

SCALES, LABELS = (1, 2, 3, 4), torch.tensor([1, 5])
NOTHING = torch.zeros(2, 0, dtype=torch.long)


def greedy(step, logits):
    return logits.argmax(dim=-1)


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    return VARTokenizer(
        base_channels=8, channel_multipliers=(1, 1), res_blocks=1, code_dim=4, codebook_size=24, scales=SCALES,
        norm_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = VAR(vocab_size=24, code_dim=4, depth=2, dim=32, num_heads=2, num_classes=6, scales=SCALES)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_going_on_from_scales_changes_nothing(guidance, model, tokenizer):
    options = {"guidance": guidance}
    whole = next_scale(model, tokenizer, LABELS, NOTHING, 4, greedy, **options)
    assert whole.shape == (2, 30)
    for begin in (1, 2, 3):
        prefix = whole[:, : model.bounds[begin]]
        assert torch.equal(next_scale(model, tokenizer, LABELS, prefix, 4, greedy, **options), whole)
        assert torch.equal(
            next_scale(model, tokenizer, LABELS, prefix, begin + 1, greedy, **options),
            whole[:, : model.bounds[begin + 1]],
        )


@torch.no_grad()
def test_logits_equal_the_teacher_forced_ones(model, tokenizer):
    seen = []

    def sample(step, logits):
        seen.append(logits)
        return logits.argmax(dim=-1)

    tokens = next_scale(model, tokenizer, LABELS, NOTHING, 4, sample, guidance=2.0)
    inputs, everything = tokenizer.inputs(tokenizer.codebook[tokens]), torch.ones(2, dtype=torch.bool)
    conditional, null = model(inputs, LABELS), model(inputs, LABELS, everything)
    for step, logits in enumerate(seen):
        part, strength = slice(model.bounds[step], model.bounds[step + 1]), 2.0 * step / 3
        torch.testing.assert_close(logits, (1 + strength) * conditional[:, part] - strength * null[:, part])


def test_filters():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()[None]
    assert scale_probabilities(logits, top_k=2).tolist()[0] == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert scale_probabilities(logits, top_p=0.75).tolist()[0] == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert scale_probabilities(logits, top_p=1e-6).tolist()[0] == pytest.approx([1, 0, 0, 0])


@torch.no_grad()
def test_a_student_samples_before_and_behind_the_teacher(model, tokenizer):
    torch.manual_seed(1)
    student = DistilledVAR.from_teacher(model).eval()
    noise, condition = torch.randn(2, 30, 4), {"class_labels": LABELS}
    codebook = tokenizer.codebook
    vectors, tokens = few_step(student, codebook, noise, condition, times=(0, 2), split=4)
    assert torch.equal(vectors, codebook[tokens])

    def teacher_samples(prefix):
        return next_scale(model, tokenizer, LABELS, prefix, 3, greedy, guidance=2.0)

    _, first = few_step(student, codebook, noise, condition, times=(0,), split=3)
    vectors, tokens = hybrid(student, codebook, noise, condition, teacher_samples, begin=2, end=3, split=3)
    assert torch.equal(tokens[:, :5], first[:, :5])
    assert torch.equal(tokens[:, :14], teacher_samples(first[:, :5]))
    assert torch.equal(vectors[:, :14], codebook[tokens[:, :14]]) and tokens.shape == (2, 30)


@torch.no_grad()
def test_images_there_and_back(tokenizer):
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 30) and tokens.max() < 24
    assert tokenizer.decode(tokens).shape == images.shape
