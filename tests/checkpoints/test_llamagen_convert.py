"""Checkpoints in the authors' layout become folders that load; anything else is refused in one sentence."""

import argparse

import pytest
import torch
from safetensors.torch import load_file, save_file

import studio
from studio import DistilledStudent, LlamaGen, LlamaGenPipeline, StudioError, VQTokenizer
from studio.checkpoints.llamagen import convert_llamagen, convert_llamagen_vq, gpt_from_state_dict

SIZES = {"vocab_size": 64, "dim": 64, "num_layers": 2, "num_heads": 1, "grid_size": 4}


def gpt(**condition):
    torch.manual_seed(0)
    model = LlamaGen(**SIZES, **condition)
    torch.nn.init.normal_(model.output.weight, std=0.3)
    return model.eval()


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    vq = VQTokenizer(
        base_channels=32,
        channel_multipliers=(1, 1, 2),
        encoder_res_blocks=1,
        decoder_res_blocks=2,
        z_channels=32,
        codebook_size=64,
    )
    state = {**vq.state_dict(), "quantize.codebook_used": torch.zeros(10)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "vq.pt")
    torch.save({"model": gpt(num_classes=10).state_dict(), "steps": 3}, tmp_path / "c2i.pt")
    text = {**gpt(caption_dim=16, caption_length=8).state_dict(), "freqs_cis": torch.zeros(3)}
    torch.save({"module": text}, tmp_path / "t2i.pt")
    return tmp_path


def test_vq(files):
    convert_llamagen_vq(files / "vq.pt", files / "out")
    loaded = studio.load(files / "out", device="cpu")
    assert loaded.config.decoder_res_blocks == 2 and loaded.downsample_factor == 4
    official = torch.load(files / "vq.pt", weights_only=False)["model"]
    assert all(torch.equal(weight, official[name]) for name, weight in loaded.state_dict().items())


def test_c2i(files):
    convert_llamagen(files / "c2i.pt", files / "deep" / "out", "c2i", tokenizer=files / "vq.pt", grid_size=4)
    pipe = studio.load(files / "deep" / "out", device="cpu")
    out = pipe(class_labels=3, generator=torch.Generator().manual_seed(0))
    assert out.images[0].size == (16, 16)
    assert pipe.config.default_guidance_scale == 4.0 and pipe.config.default_top_k == 2000
    assert sorted(path.name for path in (files / "deep").iterdir()) == ["out"]


def test_a_checkpoint_of_a_thousand_classes_knows_their_names(files):
    torch.save({"model": gpt(num_classes=1000).state_dict()}, files / "imagenet.pt")
    convert_llamagen(files / "imagenet.pt", files / "out", "c2i", tokenizer=files / "vq.pt", grid_size=4)
    pipe = studio.load(files / "out", device="cpu")
    assert len(pipe.id2label) == 1000 and pipe.class_index("tench") == 0 and pipe.class_index("toilet paper") == 999
    assert pipe.class_index("Golden Retriever") == 207
    convert_llamagen(files / "c2i.pt", files / "ten", "c2i", tokenizer=files / "vq.pt", grid_size=4)
    assert studio.load(files / "ten", device="cpu").id2label == {}


def helpers(files, **drafter):
    """Files of a drafter in LANTERN's layout and of a student in the authors', both for the transformer in c2i.pt."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (64, 64),
        "fc.weight": (64, 128),
        "layers.0.post_attention_layernorm.weight": (64,),
    }
    shapes |= {f"layers.0.self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
    shapes |= {f"layers.0.mlp.{part}_proj.weight": (96, 64) for part in ("gate", "up")}
    shapes |= {"layers.0.mlp.down_proj.weight": (64, 96)} | drafter
    torch.save({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, files / "drafter.bin")
    codebook = torch.randn(64, 8, generator=generator)
    torch.save(
        {"model": DistilledStudent.from_teacher(gpt(num_classes=10), codebook).state_dict()}, files / "student.pt"
    )
    return {"drafter": files / "drafter.bin", "student": files / "student.pt"}


def test_helpers_go_into_the_folder(files):
    call = {"tokenizer": files / "vq.pt", "grid_size": 4, **helpers(files)}
    convert_llamagen(files / "c2i.pt", files / "out", "c2i", **call)
    pipe = studio.load(files / "out", device="cpu")
    assert (pipe.drafter.config.prefix_length, pipe.drafter.config.grid_size) == (1, 4)
    call_of = {"class_labels": 3, "generator": torch.Generator().manual_seed(0), "output_type": "tokens"}
    assert pipe(**call_of, decoding=studio.Speculative()).tokens.shape == (1, 16)
    assert pipe(**call_of, decoding=studio.Distilled(steps=2)).stats.target_calls == 2
    again = {"drafter": files / "out" / "drafter", "student": files / "out" / "student"}
    convert_llamagen(files / "c2i.pt", files / "again", "c2i", **{**call, **again})
    both = (LlamaGenPipeline.from_pretrained(files / name) for name in ("out", "again"))
    first, second = ({**pipe.drafter.state_dict(), **pipe.student.state_dict()} for pipe in both)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_helpers_of_other_models_are_refused(files):
    given = {"tokenizer": files / "vq.pt", "grid_size": 4, **helpers(files, **{"embed_tokens.weight": (32, 64)})}
    with pytest.raises(StudioError, match="The drafter has vocab_size 32, the model 64"):
        convert_llamagen(files / "c2i.pt", files / "out", "c2i", **given)
    other = DistilledStudent.from_teacher(gpt(num_classes=7), torch.randn(64, 8))
    torch.save({"model": other.state_dict()}, given["student"])
    given |= {"drafter": None}
    with pytest.raises(StudioError, match="The student has num_classes 7, the transformer 10"):
        convert_llamagen(files / "c2i.pt", files / "out", "c2i", **given)
    assert not (files / "out").exists()


def test_t2i(files, tiny_pipeline):
    tiny_pipeline.text_encoder.save_pretrained(files / "t5")
    tiny_pipeline.tokenizer.save_pretrained(files / "t5")
    call = {"tokenizer": files / "vq.pt", "text_encoder": files / "t5", "grid_size": 4}
    convert_llamagen(files / "t2i.pt", files / "out", "t2i", **call)
    pipe = LlamaGenPipeline.from_pretrained(files / "out")
    assert pipe("a red apple", generator=torch.Generator().manual_seed(0)).tokens.shape == (1, 16)
    assert studio.load(files / "out", device="cpu").takes_text


def test_a_text_encoder_that_lacks_weights_is_refused(files, tiny_pipeline):
    tiny_pipeline.text_encoder.save_pretrained(files / "t5")
    tiny_pipeline.tokenizer.save_pretrained(files / "t5")
    weights = load_file(files / "t5" / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, files / "t5" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudioError, match="encoder.final_layer_norm"):
        call = {"tokenizer": files / "vq.pt", "text_encoder": files / "t5", "grid_size": 4}
        convert_llamagen(files / "t2i.pt", files / "out", "t2i", **call)
    assert not (files / "out").exists()


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_wrappers(files, wrapper):
    state = gpt(num_classes=10).state_dict()
    torch.save(state if wrapper is None else {wrapper: state}, files / "wrapped.pt")
    convert_llamagen(files / "wrapped.pt", files / "out", "c2i", tokenizer=files / "vq.pt", grid_size=4)


def test_lantern_layout():
    model = gpt(num_classes=10)
    names = {
        "tok_embeddings": "model.embed_tokens",
        "norm": "model.norm",
        "output": "lm_head",
        "cls_embedding.embedding_table": "model.cls_embedding.embedding_table",
    }
    parts = {
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    state = {}
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight")
        if name.endswith("wqkv"):
            layer = name.split(".")[1]
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] = rows
        elif name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            state[f"model.layers.{layer}.{parts[part]}.weight"] = weight
        else:
            state[f"{names[name]}.weight"] = weight
    converted = gpt_from_state_dict(state, grid_size=4)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in converted.state_dict().items())


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_what_is_no_checkpoint(files, capsys):
    (files / "text.pt").write_text("hello")
    torch.save({"model": Evil()}, files / "evil.pt")
    torch.save([1, 2], files / "list.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, files / "other.pt")
    for name in ("text.pt", "evil.pt", "list.pt", "other.pt", "absent.pt", "vq.pt"):
        with pytest.raises(StudioError):
            convert_llamagen(files / name, files / "out", "c2i", tokenizer=files / "vq.pt")
    for name in ("text.pt", "evil.pt", "list.pt", "other.pt", "absent.pt", "c2i.pt"):
        with pytest.raises(StudioError):
            convert_llamagen_vq(files / name, files / "out")
    assert "unpickled" not in capsys.readouterr().out
    assert not (files / "out").exists()


def test_keys_are_strict(files):
    state = gpt(num_classes=10).state_dict()
    torch.save({**state, "extra.weight": torch.zeros(1)}, files / "more.pt")
    del state["layers.1.attention.wo.weight"]
    torch.save(state, files / "less.pt")
    with pytest.raises(StudioError, match=r"unknown weights, extra\.weight"):
        convert_llamagen(files / "more.pt", files / "out", "c2i", tokenizer=files / "vq.pt")
    with pytest.raises(StudioError, match=r"missing weights, layers\.1\.attention\.wo"):
        convert_llamagen(files / "less.pt", files / "out", "c2i", tokenizer=files / "vq.pt")


def test_parts_that_do_not_fit(files, tiny_pipeline):
    with pytest.raises(StudioError, match="convert it as c2i"):
        convert_llamagen(files / "c2i.pt", files / "out", "t2i", tokenizer=files / "vq.pt", text_encoder=files)
    with pytest.raises(StudioError, match="convert it as t2i"):
        convert_llamagen(files / "t2i.pt", files / "out", "c2i", tokenizer=files / "vq.pt")
    with pytest.raises(StudioError, match="T5 encoder"):
        convert_llamagen(files / "t2i.pt", files / "out", "t2i", tokenizer=files / "vq.pt", text_encoder=files)
    with pytest.raises(StudioError, match="text encoder"):
        convert_llamagen(files / "t2i.pt", files / "out", "t2i", tokenizer=files / "vq.pt")
    with pytest.raises(StudioError, match="another architecture"):
        tiny_pipeline.transformer.save_pretrained(files / "transformer")
        convert_llamagen(files / "c2i.pt", files / "out", "c2i", tokenizer=files / "transformer")
    with pytest.raises(StudioError, match="not a checkpoint"):
        (files / "empty").mkdir()
        convert_llamagen(files / "c2i.pt", files / "out", "c2i", tokenizer=files / "empty")
    (files / "full").mkdir()
    (files / "full" / "file").touch()
    with pytest.raises(StudioError, match="exists already"):
        convert_llamagen_vq(files / "vq.pt", files / "full")
