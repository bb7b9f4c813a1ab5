"""The authors' residual quantiser, RQ-VAE and RQ-Transformer, recorded; names and shapes of the published files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from studio.checkpoints.residual import (
    _rvq_config,
    _transformer_config,
    residual_codebooks,
    rq_transformer_from_state_dict,
    rvq_from_state_dict,
)
from studio.decoding.rq_transformer import rq_decoding
from studio.decoding.sampling import Sampling
from studio.models.rq_transformer import RQTransformer
from studio.tokenizers.residual_quantizer import ResidualQuantizer, distances
from studio.tokenizers.rvq import RVQTokenizer, depth_to_space, space_to_depth
from tests.parity.recordings import find, stem
from tests.tokenizers.rq_vae_training import CodebookAverages, learn_codebooks, soft_codes

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
QUANTIZERS, AUTOENCODERS, TRANSFORMERS = find("rq_quantizer"), find("rqvae"), find("rqtransformer")
quantizers = pytest.mark.parametrize("path", QUANTIZERS, ids=stem)
autoencoders = pytest.mark.parametrize("path", AUTOENCODERS, ids=stem)
transformers = pytest.mark.parametrize("path", TRANSFORMERS, ids=stem)
official = pytest.mark.parametrize(
    ("name", "entry"),
    [(name, entry) for path in find("rq_official_keys") for name, entry in json.loads(path.read_text()).items()],
)


def close(ours, recorded, **tolerance):
    torch.testing.assert_close(ours, recorded, **{**CLOSE, **tolerance})


def under(arrays, prefix):
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


class Case:
    """A recording: its configuration, arrays, and official weights."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.config = self.info["config"]
        self.arrays = load_file(path.with_suffix(".safetensors"))
        self.state = under(self.arrays, "state.")

    def __getitem__(self, name):
        return self.arrays[name]

    @property
    def cell(self):
        """Rows and columns of features that a stack of codes stands for."""
        latent, codes = self.config["latent_shape"], self.config["code_shape"]
        return latent[0] // codes[0], latent[1] // codes[1]


class QuantizerCase(Case):
    """A recorded quantiser, and its latents as vectors of cells."""

    def __init__(self, path):
        super().__init__(path)
        self.depth = self.config["code_shape"][2]
        state, sizes = residual_codebooks(self.state, "")
        assert sizes["depth"] == self.depth
        assert sizes["shared_codebook"] == self.config["shared_codebook"] or self.depth == 1
        codes = self.config["n_embed"]
        codes = [codes] * self.depth if isinstance(codes, int) else codes
        self.quantizer = ResidualQuantizer(tuple(codes), math.prod(self.cell) * self.config["latent_shape"][2],
                                           self.config["shared_codebook"])  # fmt: skip
        self.quantizer.load_state_dict(state)
        self.vectors = self.cells("z")

    def cells(self, name):
        return space_to_depth(self[name].movedim(-1, 1), self.cell)

    def latent(self, vectors):
        return depth_to_space(vectors, self.cell).movedim(1, -1)

    def trained(self, form, monkeypatch):
        """What one recorded step of training gives, and the official state that it leaves.

        Restarted codes may be equal but for rounding: a recorded code is taken when none is nearer by more than that.
        """
        decay, chosen = self.config["decay"], iter(self[f"{form}_codes"].flatten(0, 2).unbind(1))
        decays = decay if isinstance(decay, list) else [decay]
        averages = []
        for level, table in enumerate(self.quantizer.codebooks):
            averages.append(CodebookAverages(table.weight, decay=decays[level % len(decays)]))
            names = ("cluster_size_ema", "embed_ema")
            averages[-1].load_state_dict({name: self.state[f"codebooks.{level}.{name}"] for name in names})

        def recorded_code(rest, table):
            code, found = next(chosen), distances(rest, table)
            close(found.gather(1, code[:, None])[:, 0], found.min(dim=1).values)
            return code

        monkeypatch.setattr("tests.tokenizers.rq_vae_training.nearest", recorded_code)
        orders = iter(self.arrays.get(f"{form}_perms", ()))
        pool = (lambda rest, count: rest[next(orders)[:count]]) if f"{form}_perms" in self.arrays else None
        quantized = learn_codebooks(self.quantizer, averages, self.vectors, pool)
        state = {}
        for level, table in enumerate(self.quantizer.tables):
            prefix = f"codebooks.{level}."
            state[prefix + "weight"] = F.pad(table, (0, 0, 0, 1))
            state |= {prefix + name: array for name, array in averages[level % len(averages)].state_dict().items()}
        return quantized, state


@quantizers
@torch.no_grad()
def test_codes_and_sums(path):
    case = QuantizerCase(path)
    codes = case.quantizer.encode(case.vectors)
    assert torch.equal(codes, case["codes"])
    quantized = case.quantizer(case.vectors)
    close(case.latent(quantized.vectors), case["z_q"])
    close(quantized.commitment, case["commitment_loss"].squeeze())
    levels = case.quantizer.lookup(codes)
    close(levels, case["embed_code_with_depth"])
    close(levels.cumsum(dim=-2), case["partial_sums"])
    close(case.latent(levels.sum(dim=-2)), case["embed_code"])
    close((case.vectors[..., None, :] - levels.cumsum(dim=-2)).norm(dim=-1), case["residual_norms"])
    for form, part in (("select", levels), ("add", levels.cumsum(dim=-2))):
        recorded = under(case.arrays, f"embed_partial_{form}_")
        assert recorded
        for level, array in recorded.items():
            close(case.latent(part[..., int(level), :]), array)


@quantizers
@torch.no_grad()
def test_soft_codes(path):
    case = QuantizerCase(path)
    recorded = under(case.arrays, "soft_codes_temp")
    assert recorded or len(set(map(len, case.quantizer.tables))) > 1
    for temperature, distribution in recorded.items():
        ours, codes = soft_codes(case.quantizer, case.vectors, float(temperature))
        close(ours, distribution)
        assert torch.equal(codes, case["codes"])


@quantizers
@pytest.mark.parametrize("form", ["ema_norestart", "ema_restart"])
def test_a_step_of_training(path, form, monkeypatch):
    case = QuantizerCase(path)
    quantized, state = case.trained(form, monkeypatch)
    assert torch.equal(quantized.codes, case[f"{form}_codes"])
    recorded = under(case.arrays, f"{form}.")
    assert recorded.keys() == state.keys()
    for name, array in recorded.items():
        close(state[name], array)
    if f"{form}_loss" in case.arrays:
        close(quantized.commitment, case[f"{form}_loss"].squeeze())


@autoencoders
@torch.no_grad()
def test_rq_vae(path):
    case = Case(path)
    config, options = case.config, case.config["ddconfig"]
    model = rvq_from_state_dict(case.state, cell=case.cell)
    assert list(model.config.channel_multipliers) == options["ch_mult"]
    assert model.config.shared_codebook == config["shared_codebook"] or model.config.depth == 1
    assert model.config.depth == config["code_shape"][2]
    image, codes = case["image"], case["codes"]
    close(depth_to_space(model.encode_features(image), case.cell).movedim(1, -1), case["z_e"])
    assert torch.equal(model.encode(image), codes)
    restored, commitment = model(image)
    close(restored, case["recon"], atol=1e-4)
    close(commitment, case["commitment_loss"].squeeze())
    close((restored - image).square().mean() + config["latent_loss_weight"] * commitment, case["loss_total"].squeeze())
    close(model.decode(codes), case["decode_code"], atol=1e-4)
    partial = under(case.arrays, "decode_partial_add_")
    assert partial
    for level, array in partial.items():
        close(model.decode(codes, depth=int(level) + 1), array, atol=1e-4)
        close(model.decode(codes[..., : int(level) + 1]), array, atol=1e-4)


class TransformerCase(Case):
    """A recorded transformer, and what it is called with."""

    def __init__(self, path):
        super().__init__(path)
        config = self.config
        *grid, depth = config["block_size"]
        self.model = rq_transformer_from_state_dict(
            self.state,
            grid=tuple(grid),
            spatial_heads=config["body"]["block"]["n_head"],
            depth_heads=config["head"]["block"]["n_head"],
            depth_reads_sums=config["cumsum_depth_ctx"],
            activation={"v1": "gelu", "v2": "quick_gelu"}[config["body"]["block"]["gelu"]],
            **({"vocab_size": tuple(config["vocab_size"])} if isinstance(config["vocab_size"], list) else {}),
        )
        assert self.model.config.depth == depth
        self.codebooks = [self["aux_codebook"]] * depth if "aux_codebook" in self.arrays else None


@transformers
@torch.no_grad()
def test_logits(path):
    case = TransformerCase(path)
    logits, words = case.model(case["codes"], case["cond"], case.codebooks)
    close(logits, case["logits"])
    close(F.cross_entropy(logits.flatten(0, 3), case["codes"].flatten()), case["ce_loss"].squeeze())
    assert (words is None) == ("cond_logits" not in case.arrays)
    if words is not None:
        close(words, case["cond_logits"])


@transformers
def test_greedy_codes(path):
    case = TransformerCase(path)
    generators = [torch.Generator() for _ in case["cond"]]
    sampled = rq_decoding(
        case.model, case["cond"], case.codebooks, generators=generators, sampling=Sampling(temperature=0)
    )
    assert torch.equal(sampled, case["greedy_codes"])


@official
def test_names_and_shapes(name, entry):
    with torch.device("meta"):
        published = {key: torch.empty(shape) for key, (shape, _) in entry["keys"].items()}
        if name.startswith("rqvae"):
            state, codebooks = residual_codebooks(published, "quantizer.")
            model = RVQTokenizer(**_rvq_config(state) | codebooks)
            padding = model.codebooks[0].shape[1] * len(model.quantizer.codebooks)
        else:
            state, padding = published, 0
            model = RQTransformer(**_transformer_config(state))
    assert {key: weight.shape for key, weight in model.state_dict().items()} == {
        key: weight.shape for key, weight in state.items()
    }
    assert sum(weight.numel() for weight in model.parameters()) + padding == entry["n_params"]
