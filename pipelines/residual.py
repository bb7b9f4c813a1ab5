"""The base of pipelines that sample stacks of residual codes."""

from functools import partial

import torch

from studio import backends
from studio.pipelines.base import ConditionalPipeline, Images


class ResidualPipeline(ConditionalPipeline):
    """Base of a pipeline whose `image_tokenizer` is an `RVQTokenizer`, which the decoding loop needs too.

    Tokens are codes (B, L, D) of all cells of an image, coarse to fine.
    """

    _optional_components = ["text_encoder", "tokenizer"]
    _exclude_from_cpu_offload = ["image_tokenizer"]
    _callback_tensor_inputs = ["tokens"]

    @torch.no_grad()
    def decode_tokens(self, tokens: torch.Tensor, output_type: str = "pil", depth: int | None = None) -> Images:
        """Decodes codes to images.

        Args:
            tokens: (B, L, D) int64; a code of -1 adds nothing to its cell.
            output_type: "pil" truncates 127.5 x + 128 to bytes, "np" and "pt" are in [0, 1].
            depth: use the first levels only, 1 to D; all when None.
        """
        config = self.image_tokenizer.config
        rows = config.sample_size // self.image_tokenizer.pixels_per_cell[0]
        decode = partial(backends.select_pixels(self.image_tokenizer).decode, depth=depth)
        return self.decoded_images(decode, tokens.unflatten(1, (rows, -1)), output_type)
