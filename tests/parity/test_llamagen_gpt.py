"""The authors' transformer, recorded: logits, greedy tokens, guidance interval, sampled tokens, training loss."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from studio import backends
from studio.checkpoints.llamagen import gpt_from_state_dict
from studio.decoding.autoregressive import autoregressive, guided_logits, is_guided
from studio.decoding.sampling import Sampling, sample_rows
from studio.reference.autoregressive import textbook
from tests.parity.recordings import Recording, find, stem

TOLERANCE = 1e-4
C2I, T2I = find("llamagen_gpt_c2i"), find("llamagen_gpt_t2i")
both = pytest.mark.parametrize("path", C2I + T2I if C2I and T2I else [], ids=stem)
c2i = pytest.mark.parametrize("path", C2I, ids=stem)
t2i = pytest.mark.parametrize("path", T2I, ids=stem)


class Case:
    """A recording, the model with its weights, and its condition."""

    def __init__(self, path):
        recording = Recording(path)
        self.info, self.io, self.config = recording.info, recording.io, recording.info["config"]
        heads = self.config["n_head"]
        self.model = gpt_from_state_dict(
            recording.state,
            num_heads=heads,
            num_kv_heads=self.config.get("n_kv_head") or heads,
            grid_size=math.isqrt(self.config["block_size"]),
            norm_eps=self.config["norm_eps"],
            rope_base=float(self.config["rope_base"]),
        )
        if "class_ids" in self.io:
            self.condition = {"class_labels": self.io["class_ids"]}
        else:
            self.condition = {"captions": self.io["text_emb_rightpad"], "caption_mask": self.io["text_mask_rightpad"]}
        self.tokens = self.io["tokens"]

    def generators(self):
        return [torch.Generator().manual_seed(row) for row in range(len(self.tokens))]

    def stepped(self, scale=1.0, interval=-1, weights="auto"):
        """Logits (B, N, V) of the cached loop fed the recorded tokens."""
        network = backends.select(self.model, weights)
        rows, batch = (2 if scale != 1 else 1), len(self.tokens)
        condition = {name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in self.condition.items()}
        drop = torch.arange(rows * batch) >= batch
        with torch.no_grad():
            prefix, valid = self.model.embed_condition(**condition, drop=drop)
            cache = network.new_cache(len(prefix))
            logits, steps = network.prefill(prefix, valid, cache), []
            for index in range(self.tokens.shape[1]):
                steps.append(guided_logits(logits, scale) if len(logits) > batch else logits)
                if index + 1 < self.tokens.shape[1]:
                    if not is_guided(index + 1, scale, interval):
                        cache.keep_rows(batch)
                    fed = self.tokens[:, index : index + 1].repeat(cache.rows // batch, 1)
                    logits = network.extend(fed, cache)[:, -1]
        return torch.stack(steps, dim=1)

    def forward(self, **changed):
        with torch.no_grad():
            return self.model(self.tokens[:, :-1], **{**self.condition, **changed})

    def greedy(self, scale, interval=-1):
        return autoregressive(
            self.model,
            self.condition,
            generators=self.generators(),
            sampling=Sampling(temperature=0),
            guidance_scale=scale,
            cfg_interval=interval,
        ).tokens


def close(ours, recorded):
    torch.testing.assert_close(ours, recorded, atol=TOLERANCE, rtol=0)


def number(text):
    return float(text.replace("p", "."))


def scale_and_interval(name, prefix):
    """`..._cfg7p5_interval4` -> (7.5, 4)."""
    scale, _, interval = name.removeprefix(prefix).removeprefix("_").removeprefix("cfg").partition("_interval")
    return (number(scale) if scale else 1.0), (int(interval) if interval else -1)


@both
def test_rope_table(path):
    case = Case(path)
    close(case.model.rope(), case.io["rope_table"])


@c2i
def test_forward_of_classes(path):
    case = Case(path)
    close(case.forward(), case.io["logits_full"])
    close(case.forward(drop=torch.ones(len(case.tokens), dtype=torch.bool)), case.io["logits_full_null"])


@t2i
def test_left_padding(path):
    case = Case(path)
    captions, mask = case.model.left_pad(
        **{"captions": case.condition["captions"], "mask": case.condition["caption_mask"]}
    )
    torch.testing.assert_close(captions, case.io["cond_emb"], atol=0, rtol=0)
    assert torch.equal(mask.long(), case.io["cond_mask"])


@t2i
def test_forward_of_captions(path):
    case = Case(path)
    close(case.forward(), case.io["logits_full_masked"])
    close(case.forward(captions=case.io["cond_emb"], caption_mask=None), case.io["logits_full_causal_nomask"])


@both
@pytest.mark.parametrize("weights", ["plain", "auto"])
def test_cached_steps(path, weights):
    case = Case(path)
    names = [name for name in case.io if name.startswith("logits_step_kv")]
    assert names
    for name in names:
        close(case.stepped(*scale_and_interval(name, "logits_step_kv"), weights), case.io[name])


@both
def test_greedy_tokens(path):
    case = Case(path)
    names = [name for name in case.io if name.startswith("greedy")]
    assert names
    for name in names:
        scale, interval = scale_and_interval(name, "greedy")
        assert torch.equal(case.greedy(scale, interval), case.io[name]), name


@both
def test_sampled_tokens(path):
    case = Case(path)
    note = case.info["notes"]["io.sample_*"]
    scale = float(note.split("cfg ")[1].split()[0].rstrip(","))
    settings = json.loads(note[note.index("{") : note.index("}") + 1].replace("'", '"'))
    sampling, seen = Sampling(**settings), []

    def sample(index, logits):
        seen.append(sampling.probabilities(logits))
        return sample_rows(seen[-1], noise=case.io["sample_noise"][index])

    tokens = textbook(case.model, case.condition, generators=case.generators(), guidance_scale=scale, on_logits=sample)
    assert torch.equal(tokens, case.io["sample_tokens"])
    close(torch.stack(seen, dim=1), case.io["sample_probs"])


@both
def test_training_forward(path):
    case = Case(path)
    model = case.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = case.forward(drop=torch.zeros(len(case.tokens), dtype=torch.bool))
    if "train_logits" in case.io:
        close(logits, case.io["train_logits"])
        loss = F.cross_entropy(logits.flatten(0, 1), case.tokens.flatten())
        close(loss, case.io["train_loss"].squeeze())
    else:
        loss = F.cross_entropy(logits[:-1].flatten(0, 1), case.tokens[:-1].flatten())
        close(loss, case.io["train_loss_last_sample_invalid"].squeeze())
