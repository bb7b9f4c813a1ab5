"""The authors' acceptance rules, exact distributions, drafter and whole greedy runs, recorded."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from studio.checkpoints.drafter import drafter_from_state_dict
from studio.checkpoints.llamagen import gpt_from_state_dict
from studio.decoding import trees
from studio.decoding.autoregressive import Guidance
from studio.decoding.drafts import DraftContext, Progress
from studio.decoding.eagle import DrafterDrafts
from studio.decoding.lantern import neighbour_table
from studio.decoding.sampling import Sampling
from studio.decoding.speculative import Speculative, speculative
from studio.decoding.trees import DynamicTree, StaticTree, Tree
from studio.decoding.verification import Lossless, verify, verify_greedy
from studio.reference.lantern import AuthorsLantern, AuthorsRelaxation
from tests.parity.recordings import Recording, find, stem

CLOSE = {"atol": 2e-6, "rtol": 2e-6}
DYNAMIC, STATIC, DISTRIBUTIONS = (
    find("lantern_accept_dynamic"),
    find("lantern_accept_static"),
    find("lantern_exact_law"),
)


class Arrays:
    """A recording of numpy arrays: `info`, arrays by name, and those of case N without its prefix."""

    def __init__(self, path):
        self.info = json.loads(path.read_text())
        self.arrays = {name: torch.from_numpy(array) for name, array in np.load(path.with_suffix(".npz")).items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def case(self, case):
        prefix = f"c{case['id']}."
        return {name[len(prefix) :]: array for name, array in self.arrays.items() if name.startswith(prefix)}


def rule_of(case, neighbours):
    if not case["lantern"]:
        return Lossless()
    delta = case["delta"]
    budget = {"tv_budget": delta} if delta <= 1 else {"ratio_budget": delta}
    return AuthorsRelaxation(neighbours.long(), min(case["k"], neighbours.shape[1]), **budget)


def sampling_of(case):
    return Sampling(temperature=case["temperature"], top_k=case["top_k"], top_p=case["top_p"], order="lantern")


def check(case, result, arrays):
    assert result.paths == [case["accepted_nodes"]]
    assert len(result.paths[0]) - 1 == case["accept_length"]
    ratios = torch.tensor(result.ratios[0], dtype=torch.float64)
    assert len(ratios) == case["uniforms_used"]
    torch.testing.assert_close(ratios, arrays["accept_ratio"].double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.distribution[0], arrays["sample_p"].float(), **CLOSE)


@pytest.mark.parametrize("path", DYNAMIC + STATIC + DISTRIBUTIONS, ids=stem)
def test_neighbours(path):
    recording = Arrays(path)
    expected = recording["neighbours"].int()
    table = neighbour_table(recording["codebook"], expected.shape[1], normalise=False)
    assert torch.equal(table, expected)


@pytest.mark.parametrize("path", DYNAMIC, ids=stem)
def test_deterministic_drafts(path):
    recording = Arrays(path)
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays, rule = recording.case(case), rule_of(case, recording["neighbours"])
        tree = Tree(arrays["tokens"][None].long(), arrays["parents"][None].long())
        logits = arrays["tree_logits"][None]
        if case["greedy"]:
            result = verify_greedy(tree, logits, rule)
            assert result.paths == [case["accepted_nodes"]], case["id"]
            following = logits[0, result.last[0]]
            assert int(following.argmax()) == case["next_token_argmax"]
            torch.testing.assert_close(following, arrays["next_logits"])
        else:
            uniforms = arrays["uniforms"][None]
            check(case, verify(tree, logits, uniforms, sampling_of(case), rule), arrays)


@pytest.mark.parametrize("path", STATIC, ids=stem)
def test_sampled_drafts(path):
    recording = Arrays(path)
    shape = StaticTree(tuple(map(tuple, recording.info["tree_choices"])))
    assert shape.parents == recording["parents"].tolist()
    assert shape.ranks[1:] == recording["sibling_rank"].tolist()[1:]
    assert shape.depths == recording["tree_position_ids"].tolist()
    assert shape.expanded == recording["draft_rows_node"].tolist()
    proposal_rows = torch.full((shape.nodes,), -1)
    proposal_rows[torch.tensor(shape.expanded)] = torch.arange(len(shape.expanded))
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays = recording.case(case)
        parents = recording["parents"][None].long()
        tree = Tree(arrays["tokens"][None].long(), parents, arrays["draft_q"][None], proposal_rows)
        assert torch.equal(tree.ancestors[0].to(torch.uint8), recording["tree_attn_mask"])
        rule, uniforms = rule_of(case, recording["neighbours"]), arrays["uniforms"][None]
        check(case, verify(tree, arrays["tree_logits"][None], uniforms, sampling_of(case), rule), arrays)


@pytest.mark.parametrize("path", DISTRIBUTIONS, ids=stem)
def test_exact_distributions(path):
    recording = Arrays(path)
    assert recording.info["cases"]
    for case in recording.info["cases"]:
        arrays = recording.case(case)
        p, tokens = arrays["logits"].softmax(dim=-1), arrays["tokens"].long()
        acceptance = rule_of(case, recording["neighbours"]).probs(p[None], tokens[None])
        torch.testing.assert_close(acceptance.ratios[0].double(), arrays["accept_ratio"].double(), atol=1e-5, rtol=1e-5)
        distribution, reached = torch.zeros_like(p, dtype=torch.float64), 1.0
        for token, ratio in zip(tokens, acceptance.ratios[0].double().clamp(max=1)):
            distribution[token] += reached * ratio
            reached = reached * (1 - ratio)
        distribution += reached * (acceptance.residual[0] / acceptance.residual[0].sum()).double()
        torch.testing.assert_close(distribution, arrays["law"], **CLOSE)
        distance = float((distribution - p.double()).clamp(min=0).sum())
        assert distance == pytest.approx(case["tv_from_target"], abs=CLOSE["atol"])


DRAFTERS, RUNS = find("lantern_drafter"), find("lantern_e2e_greedy")


class Head(torch.nn.Module):
    """What a drafter uses of its target."""

    def __init__(self, weight, prefix_length, **config):
        super().__init__()
        self.weight, self.prefix_length = weight, prefix_length
        self.config = type("Config", (dict,), {"__getattr__": dict.__getitem__})(config)

    def logits(self, states):
        return states @ self.weight.T


class Drafted:
    """A recorded drafter, its target's head, and the authors' trees."""

    def __init__(self, path):
        recording = Recording(path)
        self.info, self.io, config = recording.info, recording.io, recording.info["config"]
        self.prefix = config["rope_zero_prefix"] + 1
        self.drafter = drafter_from_state_dict(
            recording.state,
            num_heads=config["heads"],
            grid_size=config["grid"],
            prefix_length=self.prefix,
            norm_eps=config["rms_norm_eps"],
            rope_base=float(config["rope_base"]),
        )
        sizes = {name: self.drafter.config[name] for name in ("vocab_size", "dim", "grid_size")}
        self.head = Head(recording.state["lm_head.weight"], self.prefix, **sizes)
        self.scale, self.vocab = config["cfg_scale"], config["vocab"]
        self.dynamic = DynamicTree(config["total_tokens_arg"], config["depth"] + 1, config["top_k"])

    def candidates(self, tree, sampling):
        source = DrafterDrafts(self.drafter, tree)
        return source.candidate_generator(DraftContext(self.head, None, 1, sampling, Guidance(self.scale, -1, 2)))

    def progress(self, ids, states):
        """`ids` (2, T + sampled tokens) and the states of all positions before the last one."""
        tokens = torch.zeros(1, self.drafter.config.grid_size**2, dtype=torch.long)
        length = ids.shape[1] - self.prefix
        tokens[0, :length] = ids[0, self.prefix :]
        max_depth = torch.tensor([tokens.shape[1] - length - 1])
        return Progress(tokens, torch.tensor([length]), max_depth, [torch.Generator()], states)


@pytest.mark.parametrize("path", DRAFTERS, ids=stem)
@torch.no_grad()
def test_drafter_forward(path):
    case = Drafted(path)
    tokens, states = case.io["fwd.input_ids"], case.io["fwd.hidden_states"]
    out = case.drafter(tokens, states)
    torch.testing.assert_close(out, case.io["fwd.output"], atol=1e-4, rtol=0)
    logits = Guidance(case.scale, -1, 2).combine(case.head.logits(out), torch.zeros(1, out.shape[1]))
    torch.testing.assert_close(logits[0], case.io["fwd.cfg_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", DRAFTERS, ids=stem)
@torch.no_grad()
def test_dynamic_trees(path):
    case = Drafted(path)
    modes = {name.split(".")[0] for name in case.io if name.endswith(".draft_tokens")}
    assert modes
    for mode in modes:
        sampling = Sampling(temperature=0)
        if mode == "sampling":
            sampling = Sampling(temperature=0.9, top_k=case.vocab // 2, order="lantern")
        candidates, states = case.candidates(case.dynamic, sampling), None
        calls = sorted({int(name.split(".")[1]) for name in case.io if name.startswith(f"{mode}.")})
        for call in calls:
            io = {name: case.io[f"{mode}.{call}.{name}"] for name in ("input_ids", "hidden_states")}
            new = io["hidden_states"]
            states = new if states is None else torch.cat((states, new), dim=1)
            tree = candidates.get_candidates(case.progress(io["input_ids"], states))
            expected = {name: case.io[f"{mode}.{call}.{name}"] for name in ("draft_tokens", "tree_mask")}
            assert torch.equal(tree.tokens, expected["draft_tokens"])
            assert torch.equal(tree.ancestors[0].float(), expected["tree_mask"][0, 0])
            assert torch.equal(tree.depths[0], case.io[f"{mode}.{call}.tree_position_ids"])


@pytest.mark.parametrize("path", DRAFTERS, ids=stem)
@torch.no_grad()
def test_static_trees(path):
    case = Drafted(path)
    names = {name.split(".")[0] for name in case.io if name.endswith(".top_tokens")}
    assert names
    for name in names:
        shape = StaticTree(tuple(map(tuple, case.info["static_tree_choices"])))
        top = case.io[f"{name}.top_tokens"]
        candidates = case.candidates(shape, Sampling(temperature=0))
        tree = candidates.get_candidates(case.progress(case.io[f"{name}.input_ids"], case.io[f"{name}.hidden_states"]))
        assert len(top) == len(shape.expanded)
        for node in range(1, shape.nodes):
            row = shape.expanded.index(shape.parents[node])
            assert tree.tokens[0, node] == top[row, shape.ranks[node]]


def authors_selection(count, roots, scores, tokens, parents):
    """The authors' choice out of the pool: of equal scores any, so that a child can lose its parent to another's."""
    order = scores.topk(count, dim=1).indices.sort(dim=1).values
    above = parents.gather(1, order)
    above = torch.where(above < 0, 0, torch.searchsorted(order, above) + 1)
    start = torch.full_like(roots[:, None], -1)
    return Tree(torch.cat((roots[:, None], tokens.gather(1, order)), dim=1), torch.cat((start, above), dim=1))


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_whole_greedy_runs(path, monkeypatch):
    """With the authors' trees, corrupt where scores tie; ours must sample the same where acceptance is lossless."""
    info = json.loads(path.read_text())
    arrays = load_file(path.with_suffix(".safetensors"))

    def weights(part):
        found = {name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")}
        return {name: array for name, array in found.items() if "kv_cache" not in name}

    sizes, drafting = info["target"], info["drafter"]
    model = gpt_from_state_dict(
        weights("target"), num_heads=sizes["n_head"], grid_size=drafting["grid"], norm_eps=sizes["norm_eps"]
    )
    drafter = drafter_from_state_dict(
        weights("drafter"),
        num_heads=sizes["n_head"],
        grid_size=drafting["grid"],
        prefix_length=drafting["rope_zero_prefix"] + 1,
        norm_eps=drafting["rms_norm_eps"],
    )
    condition = {"captions": arrays["io.text_emb_rightpad"], "caption_mask": arrays["io.text_mask_rightpad"].bool()}
    tree = DynamicTree(drafting["total_tokens_arg"], drafting["depth"] + 1, drafting["top_k"])
    plain, length = arrays["io.plain_greedy"], info["length"]
    assert info["runs"]

    def sample(settings):
        return speculative(
            model,
            condition,
            generators=[torch.Generator()],
            sampling=Sampling(temperature=0),
            guidance_scale=info["cfg_scale"],
            settings=settings,
            codebook=arrays["io.codebook"],
            on_step=lambda index, tokens: index + 1 == length,
            editable=False,
        )

    assert torch.equal(sample(Speculative(drafts=DrafterDrafts(drafter, tree))).tokens, plain)
    monkeypatch.setattr(trees, "_best", authors_selection)
    for number, run in enumerate(info["runs"]):
        settings = Speculative(drafts=DrafterDrafts(drafter, tree))
        if run["lantern"]:
            delta, more = run["lantern_delta"], {}
            if delta > 1:
                delta, more = None, {"ratio": delta}
            settings = AuthorsLantern(run["lantern_k"], delta, drafts=DrafterDrafts(drafter, tree), **more)
        sampled = sample(settings)
        assert torch.equal(sampled.tokens, arrays[f"io.run{number}.tokens"]), run
        assert torch.equal(sampled.tokens, plain) == run["equals_plain_greedy"]
        known = 1 + (arrays[f"io.run{number}.accept_lengths"] + 1).cumsum(dim=0)
        assert sampled.target_calls - 1 == 1 + int((known < length).sum())
