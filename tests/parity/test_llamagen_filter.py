"""The authors' sampling filter, recorded."""

import pytest
import torch

from studio.decoding.sampling import filter_logits
from tests.parity.recordings import Recording, find, stem


@pytest.mark.parametrize("path", find("llamagen_filter"), ids=stem)
def test_filter(path):
    recording = Recording(path)
    assert recording.info["cases"]
    for index, case in enumerate(recording.info["cases"]):
        logits = recording.io["logits"].clone()
        probabilities = filter_logits(logits, **case).softmax(dim=-1)
        torch.testing.assert_close(probabilities, recording.io[f"probs_{index}"], atol=1e-6, rtol=1e-5)
        assert torch.equal(probabilities == 0, recording.io[f"probs_{index}"] == 0)
        assert torch.equal(probabilities.argmax(-1, keepdim=True), recording.io[f"argmax_{index}"])
        assert torch.equal(logits, recording.io["logits"])
