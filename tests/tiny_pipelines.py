"""Fixtures: tiny random pipelines, tokenizers and a reader of real classes, once for all tests of a run."""

import pytest

CLASSES = ["tench, Tinca tinca", "goldfish", "crane", "golden retriever", "Cardigan, Cardigan Welsh corgi", "cardigan"]
CLASSES += ["crane", "toilet tissue, toilet paper", "7", "tabby, tabby cat"]
WORDS = "a red apple green pear blue sky on flat 3d style background".split()


@pytest.fixture(scope="session")
def tiny_text_tokenizer():
    """A Hugging Face tokenizer of a dozen words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{word: index + 3 for index, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=8
    )


@pytest.fixture(scope="session")
def tiny_vq():
    """A random VQTokenizer: 16 px images, a 4x4 grid of 64 codes."""
    import torch

    from studio import VQTokenizer

    torch.manual_seed(0)
    return VQTokenizer(
        base_channels=8,
        channel_multipliers=(1, 1, 2),
        encoder_res_blocks=1,
        decoder_res_blocks=1,
        z_channels=8,
        code_dim=4,
        codebook_size=64,
        norm_groups=4,
        sample_size=16,
    ).eval()


@pytest.fixture(scope="session")
def tiny_one_d():
    """A random OneDPieceTokenizer: 16 px images, 6 tokens of 32 codes, weights that bfloat16 holds."""
    import torch

    from studio import OneDPieceTokenizer

    torch.manual_seed(0)
    tokenizer = OneDPieceTokenizer(
        sample_size=16,
        patch_size=4,
        num_tokens=6,
        encoder_width=16,
        encoder_layers=1,
        encoder_heads=2,
        decoder_width=16,
        decoder_layers=1,
        decoder_heads=2,
        code_dim=4,
        codebook_size=32,
        pixel_stage="patches",
    )
    return tokenizer.to(torch.bfloat16).float().eval()


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_vq, tiny_text_tokenizer):
    """A random text-to-image pipeline that samples 16 px images."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from studio import LlamaGen, LlamaGenPipeline

    torch.manual_seed(0)
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tiny_text_tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    transformer = LlamaGen(
        vocab_size=64,
        dim=32,
        num_layers=2,
        num_heads=2,
        grid_size=4,
        caption_dim=16,
        caption_length=8,
        prefix_rope="identity",
    )
    torch.nn.init.normal_(transformer.output.weight, std=0.3)
    return LlamaGenPipeline(tiny_vq, transformer.eval(), text_encoder.eval(), tiny_text_tokenizer)


@pytest.fixture(scope="session")
def tiny_class_pipeline(tiny_vq):
    """A random class-conditional pipeline of ten classes, called as `CLASSES` says."""
    import torch

    from studio import LlamaGen, LlamaGenPipeline

    torch.manual_seed(0)
    transformer = LlamaGen(vocab_size=64, dim=32, num_layers=2, num_heads=2, grid_size=4, num_classes=10)
    torch.nn.init.normal_(transformer.output.weight, std=0.3)
    return LlamaGenPipeline(tiny_vq, transformer.eval(), id2label=dict(enumerate(CLASSES)))


@pytest.fixture(scope="session")
def tiny_row_pipeline(tiny_one_d, tiny_pipeline):
    """A random text-to-image pipeline over rows of six tokens, that samples 16 px images."""
    import torch

    from studio import LlamaGen, LlamaGenPipeline

    torch.manual_seed(0)
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "caption_dim": 16, "caption_length": 8}
    transformer = LlamaGen(vocab_size=32, grid_size=None, row_length=6, prefix_rope="identity", **sizes)
    torch.nn.init.normal_(transformer.output.weight, std=0.3)
    return LlamaGenPipeline(tiny_one_d, transformer.eval(), tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)


@pytest.fixture(scope="session")
def tiny_row_folder(tiny_row_pipeline, tmp_path_factory):
    """The pipeline over rows of tokens as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-row"
    tiny_row_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tiny_pipeline, tmp_path_factory):
    """The text-to-image pipeline as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_class_folder(tiny_class_pipeline, tmp_path_factory):
    """The class-conditional pipeline as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-class"
    tiny_class_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mar_pipeline(tiny_pipeline):
    """A random text-to-image pipeline of MAR, with a drafter: 16 px images, 4x4 tokens in 4 steps."""
    import torch

    from studio import MARPipeline

    torch.manual_seed(0)
    text = {"num_classes": None, "caption_dim": 16, "caption_length": 8}
    pipe = MARPipeline(
        _tiny_kl(),
        _tiny_mar(0, **text),
        tiny_pipeline.text_encoder,
        tiny_pipeline.tokenizer,
        _tiny_mar(1, depth=1, **text),
        default_num_inference_steps=4,
        default_diffusion_steps=5,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_mar_class_pipeline():
    """A random class-conditional pipeline of MAR, of five classes and without a drafter."""
    from studio import MARPipeline

    pipe = MARPipeline(_tiny_kl(), _tiny_mar(0), default_num_inference_steps=4, default_diffusion_steps=5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_mar_folder(tiny_mar_pipeline, tmp_path_factory):
    """The text-to-image pipeline of MAR as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mar"
    tiny_mar_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bridge_pipeline(tiny_pipeline):
    """A random text-to-image pipeline of TokenBridge: 3x3 cells of four numbers."""
    from studio import TokenBridgePipeline
    from tests.decoding.tiny_token_bridge import tiny_bridge_tokenizer, tiny_token_bridge

    transformer = tiny_token_bridge(num_classes=None, caption_dim=16, caption_length=8)
    words = (tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    return TokenBridgePipeline(tiny_bridge_tokenizer(), transformer, *words, default_num_inference_steps=4)


@pytest.fixture(scope="session")
def tiny_rvq():
    """A random RVQTokenizer: 16 px images, a 4x4 grid of three levels of 16 codes."""
    import torch

    from studio import RVQTokenizer

    torch.manual_seed(0)
    return RVQTokenizer(
        base_channels=8,
        channel_multipliers=(1, 1),
        res_blocks=1,
        attention_levels=(1,),
        z_channels=8,
        feature_dim=4,
        depth=3,
        codebook_size=16,
        shared_codebook=False,
        norm_groups=4,
        pixel_unshuffle=2,
        sample_size=16,
    ).eval()


@pytest.fixture(scope="session")
def tiny_resgen_pipeline(tiny_rvq, tiny_pipeline):
    """A random text-to-image pipeline of ResGen that samples 16 px images: 16 cells in 4 steps."""
    from studio import ResGenPipeline

    text = {"caption_dim": 16, "caption_length": 8}
    parts = (tiny_rvq, _tiny_resgen(**text), tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    pipe = ResGenPipeline(*parts, default_num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_resgen_class_pipeline(tiny_rvq):
    """A random class-conditional pipeline of ResGen, of five classes."""
    from studio import ResGenPipeline

    pipe = ResGenPipeline(tiny_rvq, _tiny_resgen(num_classes=5), default_num_inference_steps=4)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_resgen_folder(tiny_resgen_pipeline, tmp_path_factory):
    """The text-to-image pipeline of ResGen as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-resgen"
    tiny_resgen_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_softmax_folder(tiny_resgen_pipeline, tmp_path_factory):
    """That pipeline with a softmax for every level in place of the mixture, as `save_pretrained` writes it."""
    from studio import ResGenPipeline

    parts = {**tiny_resgen_pipeline.components}
    parts["transformer"] = _tiny_resgen(caption_dim=16, caption_length=8, prediction="levels")
    folder = tmp_path_factory.mktemp("models") / "tiny-softmax"
    ResGenPipeline(**parts, default_num_inference_steps=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_rq_pipeline(tiny_rvq, tiny_pipeline):
    """A random text-to-image pipeline of RQ-Transformer that samples 16 px images: 16 cells."""
    from studio import RQTransformerPipeline

    text = {"caption_dim": 16, "caption_length": 8}
    parts = (tiny_rvq, _tiny_rq(**text), tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    pipe = RQTransformerPipeline(*parts, default_guidance_scale=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_rq_class_pipeline(tiny_rvq):
    """A random class-conditional pipeline of RQ-Transformer, of five classes."""
    from studio import RQTransformerPipeline

    pipe = RQTransformerPipeline(tiny_rvq, _tiny_rq(num_classes=5))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tiny_rq_folder(tiny_rq_pipeline, tmp_path_factory):
    """The text-to-image pipeline of RQ-Transformer as `save_pretrained` writes it; do not change the files."""
    folder = tmp_path_factory.mktemp("models") / "tiny-rq"
    tiny_rq_pipeline.save_pretrained(folder)
    return folder


def _tiny_rq(**config):
    import torch

    from studio import RQTransformer

    torch.manual_seed(0)
    sizes = {"dim": 16, "spatial_layers": 1, "depth_layers": 1, "spatial_heads": 2, "depth_heads": 2}
    model = RQTransformer(grid=(4, 4), depth=3, vocab_size=16, code_dim=4, **sizes, **config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def _tiny_resgen(**config):
    import torch

    from studio import ResGen

    torch.manual_seed(0)
    sizes = {"dim": 16, "num_layers": 1, "num_heads": 2, "components": 5, "rank": 2, "sigma": 0.3}
    model = ResGen(num_positions=16, depth=3, vocab_size=16, code_dim=4, **sizes, **config).eval()
    torch.nn.init.normal_(model.blocks[0].modulation.weight, std=0.3)
    return model


def _tiny_mar(seed, **config):
    from tests.decoding.tiny_mar import tiny_mar

    return tiny_mar(seed, token_dim=3, **config)


def _tiny_kl():
    import torch

    from studio.tokenizers.kl import KLTokenizer

    torch.manual_seed(0)
    sizes = {
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "sample_size": 16,
        "block_out_channels": [4, 8, 8], "layers_per_block": 1, "latent_channels": 3, "norm_num_groups": 4,
    }  # fmt: skip
    return KLTokenizer(sizes, sample_size=16, scaling_factor=1.0).eval()


@pytest.fixture(scope="session")
def tiny_reader():
    """A random LLaVA-NeXT of tiny width and its real processor, as `emoji-vlm` has them; it never ends early."""
    import torch

    from studio.training import reader_network

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_network, "TOWER", sizes)
        patch.setattr(reader_network, "TEXT", sizes)
        torch.manual_seed(0)
        processor = reader_network.build_processor()
        model = reader_network.build_model(len(processor.tokenizer)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model, processor
