"""`studio bench decoding --model` of a TokenBridge: its own settings, and several numbers of calls."""

from studio import TokenBridgePipeline
from studio.bench import tradeoff as bench
from tests.decoding.tiny_token_bridge import tiny_bridge_tokenizer, tiny_token_bridge


def test_rows(tiny_pipeline, monkeypatch, tmp_path):
    network = tiny_token_bridge(grid_size=6, num_classes=None, caption_dim=16, caption_length=8)
    parts = (tiny_bridge_tokenizer(side=12), network, tiny_pipeline.text_encoder, tiny_pipeline.tokenizer)
    TokenBridgePipeline(*parts, default_num_inference_steps=16).save_pretrained(tmp_path)
    judged = {"judge_top1": 0.5, "frechet": 1.0, "quality_samples": 65}
    monkeypatch.setattr(bench, "_quality", lambda *_: judged)
    result = bench.bench_tradeoff(str(tmp_path), batch_sizes=(1,), device="cpu", repeats=1, images=2)
    rows = result["rows"]
    assert [(row["decoding"], row["settings"].get("steps")) for row in rows] == [
        ("bridge", None), ("bridge", 4), ("bridge", 8), ("bridge", 32)
    ]  # fmt: skip
    assert [row["target_calls"] for row in rows] == [16, 4, 8, 32] and rows[0]["speedup"] == 1
    assert result["left_out"] == {}
