"""`studio bench decoding --model` of a TokenBridge: its own settings, and several numbers of calls."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))
from tiny_token_bridge import SIZES, tiny_token_bridge  # noqa: E402

from studio import TokenBridgePipeline, TokenBridgeTokenizer  # noqa: E402
from studio.evaluation import bench_tradeoff as bench  # noqa: E402

AUTOENCODER = {
    "block_out_channels": [4, 8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 12,
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
}  # fmt: skip


def test_rows(tiny_pipeline, monkeypatch, tmp_path):
    torch.manual_seed(0)
    order = SIZES["dimension_order"]
    tokenizer = TokenBridgeTokenizer({"autoencoder": AUTOENCODER}, levels=5, dimension_order=order, sample_size=12)
    network = tiny_token_bridge(grid_size=6, num_classes=None, caption_dim=16, caption_length=8)
    text = (tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    TokenBridgePipeline(tokenizer.eval(), network, *text, default_num_steps=16).save_pretrained(tmp_path)
    judged = {"judge_top1": 0.5, "frechet": 1.0, "quality_samples": 65}
    monkeypatch.setattr(bench, "_quality", lambda pipe, each, samples: judged)
    result = bench.bench_tradeoff(str(tmp_path), batch_sizes=(1,), device="cpu", repeats=1, pictures=2)
    rows = result["rows"]
    assert [(row["decoding"], row["settings"].get("steps")) for row in rows] == [
        ("bridge", None), ("bridge", 4), ("bridge", 8), ("bridge", 32)
    ]  # fmt: skip
    assert [row["target_calls"] for row in rows] == [16, 4, 8, 32] and rows[0]["speedup"] == 1
    assert result["left_out"] == {}
