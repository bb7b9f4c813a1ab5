"""What pipelines share that sample stacks of residual codes."""

from functools import partial

import torch

from studio.pipelines.base import ConditionalPipeline


class ResidualPipeline(ConditionalPipeline):
    """Base of a pipeline whose `image_tokenizer` is an `RVQTokenizer`, which the loop needs as well: its tokens are
    codes (B, L, D) of all cells of an image, coarse to fine.
    """

    _optional_components = ["text_encoder", "tokenizer"]
    _exclude_from_cpu_offload = ["image_tokenizer"]
    _callback_tensor_inputs = ["tokens"]

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor, output_type: str = "pil", depth: int | None = None):
        """Codes (B, L, D) to images; "pil" truncates 127.5 x + 128 to bytes, "np" and "pt" are in [0, 1].

        A code that was not sampled, -1, adds nothing to its cell; of all others the first `depth` levels count.
        """
        config = self.image_tokenizer.config
        rows = config.sample_size // self.image_tokenizer.pixels_per_cell[0]
        decode = partial(self.image_tokenizer.decode, depth=depth)
        return self.decoded_images(decode, tokens.unflatten(1, (rows, -1)), output_type)


def first_difference(compared: list[tuple]) -> str | None:
    """Of (name, what the tokenizer has, what the transformer has), the first that differ, in words; else None."""
    for name, ours, sampled in compared:
        if ours != sampled:
            return f"the image tokenizer has {name} {ours}, the transformer {sampled}"
    return None
