"""A student in C against its torch network: hidden states, logits, padding and the batch."""

import pytest
import torch

from studio import backends
from studio.backends.cpu_c_student import NativeStudent
from studio.models.distilled import DistilledStudent

SIZES = {"vocab_size": 48, "code_dim": 5, "dim": 32, "num_layers": 2, "num_heads": 2, "grid_size": 4}


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(**changed):
    torch.manual_seed(0)
    student = DistilledStudent(**SIZES, **changed).eval()
    torch.nn.init.normal_(student.output.weight, std=0.3)
    return student


def captions(rows):
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    return {"captions": random(3, 5, 16, seed=1)[rows], "caption_mask": mask[rows]}


@torch.no_grad()
@pytest.mark.parametrize("known", [0, 5])
@pytest.mark.parametrize("given", ["classes", "captions", "regions"])
def test_equals_torchs_and_single_calls(given, known):
    more = {"caption_dim": 16, "caption_length": 5} if given != "classes" else {"num_classes": 10}
    student = student_of(**more, plan_size=2 if given == "regions" else 0)
    native, vectors, rows = backends.select_student(student), random(3, 16, 5), torch.arange(3)
    assert isinstance(native, NativeStudent)

    def condition(some):
        return {"class_labels": torch.tensor([1, 7, 3])[some]} if given == "classes" else captions(some)

    hidden, context = native.hidden_states(vectors, known, **condition(rows))
    expected, same = student.hidden_states(vectors, known, **condition(rows))
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(context, same)
    logits = native.classify(hidden, context)
    torch.testing.assert_close(logits, student.classify(expected, context), atol=1e-3, rtol=1e-3)
    assert torch.equal(native.regress(hidden, context), student.regress(hidden, context))
    for row in rows.split(1):
        alone, _ = native.hidden_states(vectors[row], known, **condition(row))
        torch.testing.assert_close(alone, hidden[row], atol=1e-5, rtol=1e-5)


def test_is_built_anew_for_other_weights():
    student = student_of(num_classes=10)
    before = backends.select_student(student)
    assert backends.select_student(student) is before
    student.output.weight.data *= 2
    assert backends.select_student(student) is not before
    assert backends.select_student(student.bfloat16()) is student
