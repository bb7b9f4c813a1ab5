"""Token-based image generation and fast image understanding on PyTorch, diffusers and transformers.

The public names are flat (`from studio import LlamaGenPipeline`) and are imported on first use, so `import studio` is
fast.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Torch's threads spin for milliseconds while they wait for one another, which costs time slices on a busy machine.
# Make them sleep soon, unless the user has chosen a policy. OpenMP reads these variables when it is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

if not (Path(__file__).parent / "pipelines").is_dir():
    # A checkout keeps the subpackages beside this folder; a wheel keeps them inside it.
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from studio.checkpoints.loading import load
    from studio.decoding.autoregressive import Autoregressive
    from studio.decoding.cspd import ContinuousSpeculative
    from studio.decoding.distilled import Distilled
    from studio.decoding.fastest_exact import FastestExact
    from studio.decoding.jacobi import Jacobi
    from studio.decoding.lantern import Lantern, LanternPlusPlus
    from studio.decoding.mar import MaskedAutoregressive
    from studio.decoding.registry import (
        DECODINGS,
        decoding_named,
        decoding_options,
        decodings_for,
        decodings_with,
        default_decoding,
    )
    from studio.decoding.resgen import FirstHitting, ResGenDecoding
    from studio.decoding.rq_transformer import RQDecoding
    from studio.decoding.speculative import Speculative
    from studio.decoding.token_bridge import DimensionWise
    from studio.decoding.xar import XARDecoding
    from studio.errors import StudioError
    from studio.models.distilled import DistilledStudent
    from studio.models.llamagen import LlamaGen
    from studio.models.mar import MAR
    from studio.models.resgen import ResGen
    from studio.models.rq_transformer import RQTransformer
    from studio.models.token_bridge import TokenBridge
    from studio.models.xar import XAR
    from studio.pipelines.image_codec import decode_image, encode_image
    from studio.pipelines.item_states import isolated_items, replaced_states
    from studio.pipelines.llamagen import LlamaGenPipeline
    from studio.pipelines.mar import MARPipeline
    from studio.pipelines.odp_file import OdpFile
    from studio.pipelines.resgen import ResGenPipeline
    from studio.pipelines.rq_transformer import RQTransformerPipeline
    from studio.pipelines.token_bridge import TokenBridgePipeline
    from studio.pipelines.visual_question import VisualQuestionPipeline
    from studio.pipelines.xar import XARPipeline
    from studio.pruning.api import merge_tokens, prune, prune_inputs
    from studio.pruning.kv_cache import compress
    from studio.pruning.registry import compression_methods, merging_methods, pruning_methods, pruning_place
    from studio.tokenizers.kl import KLTokenizer
    from studio.tokenizers.one_d_piece import OneDPieceTokenizer
    from studio.tokenizers.rvq import RVQTokenizer
    from studio.tokenizers.token_bridge import TokenBridgeTokenizer
    from studio.tokenizers.vq import VQTokenizer

_EXPORTS: dict[str, str] = {
    "Autoregressive": "studio.decoding.autoregressive",
    "ContinuousSpeculative": "studio.decoding.cspd",
    "DECODINGS": "studio.decoding.registry",
    "DimensionWise": "studio.decoding.token_bridge",
    "Distilled": "studio.decoding.distilled",
    "DistilledStudent": "studio.models.distilled",
    "FastestExact": "studio.decoding.fastest_exact",
    "FirstHitting": "studio.decoding.resgen",
    "Jacobi": "studio.decoding.jacobi",
    "KLTokenizer": "studio.tokenizers.kl",
    "Lantern": "studio.decoding.lantern",
    "LanternPlusPlus": "studio.decoding.lantern",
    "LlamaGen": "studio.models.llamagen",
    "LlamaGenPipeline": "studio.pipelines.llamagen",
    "MAR": "studio.models.mar",
    "MARPipeline": "studio.pipelines.mar",
    "MaskedAutoregressive": "studio.decoding.mar",
    "OdpFile": "studio.pipelines.odp_file",
    "OneDPieceTokenizer": "studio.tokenizers.one_d_piece",
    "RQDecoding": "studio.decoding.rq_transformer",
    "RQTransformer": "studio.models.rq_transformer",
    "RQTransformerPipeline": "studio.pipelines.rq_transformer",
    "RVQTokenizer": "studio.tokenizers.rvq",
    "ResGen": "studio.models.resgen",
    "ResGenDecoding": "studio.decoding.resgen",
    "ResGenPipeline": "studio.pipelines.resgen",
    "Speculative": "studio.decoding.speculative",
    "StudioError": "studio.errors",
    "TokenBridge": "studio.models.token_bridge",
    "TokenBridgePipeline": "studio.pipelines.token_bridge",
    "TokenBridgeTokenizer": "studio.tokenizers.token_bridge",
    "VQTokenizer": "studio.tokenizers.vq",
    "VisualQuestionPipeline": "studio.pipelines.visual_question",
    "XAR": "studio.models.xar",
    "XARDecoding": "studio.decoding.xar",
    "XARPipeline": "studio.pipelines.xar",
    "compress": "studio.pruning.kv_cache",
    "compression_methods": "studio.pruning.registry",
    "decode_image": "studio.pipelines.image_codec",
    "decoding_named": "studio.decoding.registry",
    "decoding_options": "studio.decoding.registry",
    "decodings_for": "studio.decoding.registry",
    "decodings_with": "studio.decoding.registry",
    "default_decoding": "studio.decoding.registry",
    "encode_image": "studio.pipelines.image_codec",
    "isolated_items": "studio.pipelines.item_states",
    "load": "studio.checkpoints.loading",
    "merge_tokens": "studio.pruning.api",
    "merging_methods": "studio.pruning.registry",
    "prune": "studio.pruning.api",
    "prune_inputs": "studio.pruning.api",
    "pruning_methods": "studio.pruning.registry",
    "pruning_place": "studio.pruning.registry",
    "replaced_states": "studio.pipelines.item_states",
}

__all__ = [
    "Autoregressive",
    "ContinuousSpeculative",
    "DECODINGS",
    "DimensionWise",
    "Distilled",
    "DistilledStudent",
    "FastestExact",
    "FirstHitting",
    "Jacobi",
    "KLTokenizer",
    "Lantern",
    "LanternPlusPlus",
    "LlamaGen",
    "LlamaGenPipeline",
    "MAR",
    "MARPipeline",
    "MaskedAutoregressive",
    "OdpFile",
    "OneDPieceTokenizer",
    "RQDecoding",
    "RQTransformer",
    "RQTransformerPipeline",
    "RVQTokenizer",
    "ResGen",
    "ResGenDecoding",
    "ResGenPipeline",
    "Speculative",
    "StudioError",
    "TokenBridge",
    "TokenBridgePipeline",
    "TokenBridgeTokenizer",
    "VQTokenizer",
    "VisualQuestionPipeline",
    "XAR",
    "XARDecoding",
    "XARPipeline",
    "__version__",
    "compress",
    "compression_methods",
    "decode_image",
    "decoding_named",
    "decoding_options",
    "decodings_for",
    "decodings_with",
    "default_decoding",
    "encode_image",
    "isolated_items",
    "load",
    "merge_tokens",
    "merging_methods",
    "prune",
    "prune_inputs",
    "pruning_methods",
    "pruning_place",
    "replaced_states",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
