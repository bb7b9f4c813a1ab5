"""`studio convert`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from studio.commands.options import Json
from studio.console import emit, say

Checkpoint = Annotated[Path, typer.Argument(help="The authors' file (.pt, .pth or .safetensors).")]
OutFolder = Annotated[Path, typer.Argument(help="The folder to make.")]
VqFile = Annotated[Path, typer.Option("--tokenizer", help="The authors' VQ file, or a converted folder.")]
DrafterFile = Annotated[
    Path | None,
    typer.Option("--drafter", help="LANTERN's drafter file, or a converted folder.", show_default=False),
]
StudentFile = Annotated[
    Path | None,
    typer.Option(
        "--student", help="The file of a Distilled Decoding student, or a converted folder.", show_default=False
    ),
]
Grid = Annotated[int | None, typer.Option("--grid-size", min=1, help="Tokens per side.", show_default="as published")]


def llamagen_vq(checkpoint: Checkpoint, out: OutFolder, as_json: Json = False) -> None:
    """LlamaGen's VQ-8 or VQ-16 tokenizer."""
    from studio.checkpoints.llamagen import convert_llamagen_vq

    _converted(convert_llamagen_vq(checkpoint, out))


def llamagen_c2i(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: VqFile,
    grid_size: Grid = None,
    drafter: DrafterFile = None,
    student: StudentFile = None,
    as_json: Json = False,
) -> None:
    """A class-conditional LlamaGen transformer and its tokenizer."""
    from studio.checkpoints.llamagen import convert_llamagen

    extras: dict[str, Any] = {"grid_size": grid_size, "drafter": drafter, "student": student}
    _converted(convert_llamagen(checkpoint, out, "c2i", tokenizer=tokenizer, **extras))


def llamagen_t2i(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: VqFile,
    text_encoder: Annotated[Path, typer.Option(help="Folder of the T5 encoder (flan-t5-xl) and its tokenizer.")],
    grid_size: Grid = None,
    drafter: DrafterFile = None,
    student: StudentFile = None,
    as_json: Json = False,
) -> None:
    """A text-conditional LlamaGen transformer, its tokenizer and its text encoder."""
    from studio.checkpoints.llamagen import convert_llamagen

    extras: dict[str, Any] = {"grid_size": grid_size, "drafter": drafter, "student": student}
    _converted(convert_llamagen(checkpoint, out, "t2i", tokenizer=tokenizer, text_encoder=text_encoder, **extras))


def lantern_drafter(
    checkpoint: Checkpoint,
    out: OutFolder,
    grid_size: Annotated[int, typer.Option(min=1, help="Tokens per side of the target.")] = 16,
    prefix_length: Annotated[
        int, typer.Option(min=1, help="Prefix length of the target: 120 for text, 1 for classes.")
    ] = 120,
    as_json: Json = False,
) -> None:
    """LANTERN's drafter for a LlamaGen transformer."""
    from studio.checkpoints.drafter import convert_drafter

    _converted(convert_drafter(checkpoint, out, grid_size=grid_size, prefix_length=prefix_length))


def rq_vae(checkpoint: Checkpoint, out: OutFolder, as_json: Json = False) -> None:
    """RQ-VAE's tokenizer with residual codes."""
    from studio.checkpoints.residual import convert_rq_vae

    _converted(convert_rq_vae(checkpoint, out))


def rq_transformer(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            help="The authors' RQ-VAE file, or a converted folder; without it the network alone is written.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """An RQ-Transformer and its tokenizer, or the network alone."""
    from studio.checkpoints.residual import convert_rq_transformer

    _converted(convert_rq_transformer(checkpoint, out, tokenizer))


def one_d_piece(
    checkpoint: Annotated[Path, typer.Argument(help="The published folder, or its file of weights.")],
    out: OutFolder,
    as_json: Json = False,
) -> None:
    """One-D-Piece's tokenizer of images as 1D sequences of variable length."""
    from studio.checkpoints.one_d_piece import convert_one_d_piece

    _converted(convert_one_d_piece(checkpoint, out))


def distilled(checkpoint: Checkpoint, out: OutFolder, as_json: Json = False) -> None:
    """A Distilled Decoding student of LlamaGen or VAR."""
    from studio.checkpoints.distilled import convert_distilled

    _converted(convert_distilled(checkpoint, out))


def mar(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", help="The authors' file of the KL-16 autoencoder, or a converted folder.")
    ],
    drafter: Annotated[
        Path | None, typer.Option(help="The authors' file of a smaller MAR, for --decoding cspd.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """A class-conditional MAR network and its tokenizer."""
    from studio.checkpoints.mar import convert_mar

    _converted(convert_mar(checkpoint, out, tokenizer=tokenizer, drafter=drafter))


def mar_vae(checkpoint: Checkpoint, out: OutFolder, as_json: Json = False) -> None:
    """MAR's KL-16 autoencoder, for diffusers' AutoencoderKL."""
    from studio.checkpoints.mar import convert_mar_vae

    _converted(convert_mar_vae(checkpoint, out))


def token_bridge(
    checkpoint: Checkpoint,
    out: OutFolder,
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", help="The authors' file of the KL-16 autoencoder, or a converted folder.")
    ],
    as_json: Json = False,
) -> None:
    """A class-conditional TokenBridge network and its tokenizer."""
    from studio.checkpoints.token_bridge import convert_token_bridge

    _converted(convert_token_bridge(checkpoint, out, tokenizer))


def _converted(folder):
    emit({"path": str(folder)})
    say(f"Converted: {folder}")
