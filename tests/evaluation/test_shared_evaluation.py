"""`studio evaluate` in two real processes says what it says in one."""

import json

import pytest

from studio.evaluation import evaluate
from tests.two_processes import outputs

SAMPLES = 70


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tiny_folder, together):
    first, second = together("-m", "studio", "evaluate", tiny_folder, "--samples", SAMPLES, "--json")
    (said, errors), (also_said, _) = outputs([first, second], 900)
    assert (first.returncode, second.returncode, also_said) == (0, 0, ""), errors
    shared, alone = json.loads(said), evaluate(tiny_folder, samples=SAMPLES)
    assert shared.pop("frechet") == pytest.approx(alone.pop("frechet"), rel=1e-5)
    assert shared == alone
