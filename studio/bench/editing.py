"""What edits do: whether the classifier names the prompt in a redrawn box, what stays, and how visible seams are."""

import numpy as np
import torch
from tqdm.auto import tqdm

from studio.bench.report import markdown_table
from studio.checkpoints.loading import load
from studio.data.archive import load_images
from studio.data.backgrounds import render
from studio.data.captions import full_caption
from studio.errors import StudioError
from studio.evaluation.judge import judge_scores, load_judge, sample_combinations

MODELS = ("emoji-ar", "emoji-mar", "emoji-bridge", "emoji-resgen")
TILE, SEAM_SIDE, _REACH = 64, 128, 8


def bench_editing(
    models: tuple[str, ...] = MODELS, *, cases: int = 200, seams: int = 40, seed: int = 0, device: str | None = None
) -> dict:
    """Redraws boxes of sheets and expands images, with every model the same ones.

    A case is a sheet of 2 x 2 emoji of 64 px, each on its own background. The box of one of them, in turn, is redrawn
    from the caption of another held-out combination (`padding_mask_crop=0`). For seams, emoji of 128 x 128 px are
    edited by their own captions: the right half is redrawn, and the image is expanded to 256 x 128.

    Args:
        models: folders or bundled names of text-conditional pipelines that edit.
        cases: sheets.
        seams: images that are expanded.
        seed: chooses the combinations, and seeds case i with seed + i.

    Returns:
        `{"cases", "seams", "seed", "rows"}`. A row has "model"; "named", the share of boxes in which the classifier
        names the concept of the prompt, and "before", the share in which it did so before the edit; "kept", the share
        of sheets with all other pixels equal; "renamed", the share of other emoji that it names otherwise after the
        edit; "half_seam" and "wide_seam", the mean gradient across the seams of these over that of their surroundings
        (`seam_ratio`). "true_seam" is that of the untouched images at the middle.

    Raises:
        StudioError: a model that samples from classes, and more cases than there are combinations.
    """
    judge = load_judge(device=device)
    sampled = sample_combinations(5 * cases, np.random.default_rng(seed))
    wanted, shown = sampled[:cases], sampled[cases:]
    tiles = render(load_images(TILE), shown).unflatten(0, (cases, 4))
    known = judge_scores(judge, tiles.flatten(0, 1)).concepts.argmax(1).view(cases, 4)
    large = sample_combinations(seams, np.random.default_rng(seed + 1))
    originals = render(load_images(SEAM_SIDE), large)
    quarter, half = SEAM_SIDE // 2, torch.arange(SEAM_SIDE).expand(SEAM_SIDE, -1) >= SEAM_SIDE // 2
    sides, rows = {"left": quarter, "right": quarter}, []
    for model in models:
        pipe = load(model, device=device)
        if not hasattr(pipe, "edit") or not pipe.takes_text:
            raise StudioError(f"{model} does not edit from a prompt: name a bundled pipeline or a folder of one.")
        pipe.set_progress_bar_config(disable=True)
        edited = torch.stack([_edited(pipe, tiles[case], case, wanted[case], seed) for case in _progress(cases, model)])
        named = judge_scores(judge, edited.flatten(0, 1)).concepts.argmax(1).view(cases, 4)
        boxes = torch.arange(cases), torch.arange(cases) % 4
        others = torch.ones(cases, 4, dtype=torch.bool).index_put(boxes, torch.tensor(False))
        truth = torch.as_tensor(wanted[:, 0])
        rows.append(
            {
                "model": str(model),
                "named": float((named[boxes] == truth).float().mean()),
                "before": float((known[boxes] == truth).float().mean()),
                "kept": float((edited == tiles).flatten(2).all(dim=2)[others].view(cases, 3).all(dim=1).float().mean()),
                "renamed": float((named != known)[others].float().mean()),
                "true_seam": seam_ratio(originals, (SEAM_SIDE // 2,)),
                "half_seam": seam_ratio(_own(pipe, originals, large, seed, mask_image=half), (SEAM_SIDE // 2,)),
                "wide_seam": seam_ratio(
                    _own(pipe, originals, large, seed, expand=sides), (quarter, quarter + SEAM_SIDE)
                ),
            }
        )
    return {"cases": cases, "seams": seams, "seed": seed, "rows": rows}


def seam_ratio(images: torch.Tensor, columns: tuple[int, ...], reach: int = _REACH) -> float:
    """Mean gradient across seams over that of their surroundings; 1 is no seam.

    Args:
        images: (B, 3, H, W).
        columns: the first column behind each vertical seam.
        reach: columns on either side that count as surroundings; the two next to a seam do not.
    """
    steps = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(0, 1, 2))
    across = torch.stack([steps[column - 1] for column in columns])
    around = [steps[[place for place in _around(column - 1, reach, len(steps))]].mean() for column in columns]
    return float(across.mean() / torch.stack(around).mean())


def _around(step, reach, count):
    return [place for place in range(step - reach, step + reach + 1) if abs(place - step) > 1 and 0 <= place < count]


def _edited(pipe, tiles, case, wanted, seed):
    """The tiles (4, 3, side, side) of a sheet, one of which is redrawn."""
    sheet = torch.cat([torch.cat([*pair], dim=2) for pair in (tiles[:2], tiles[2:])], dim=1)
    row, column = divmod(case % 4, 2)
    mask = torch.zeros(sheet.shape[1:], dtype=torch.bool)
    mask[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = True
    generator = torch.Generator().manual_seed(seed + case)
    out = pipe(
        full_caption(*wanted.tolist()), image=sheet, mask_image=mask, padding_mask_crop=0, generator=generator,
        output_type="pt",
    ).images[0]  # fmt: skip
    return torch.stack([half for pair in out.split(TILE, dim=1) for half in pair.split(TILE, dim=2)])


def _own(pipe, originals, combinations, seed, **edit):
    """The images (n, 3, H, W), edited by their own captions."""
    edited = [
        pipe(
            full_caption(*combination.tolist()), image=original, output_type="pt",
            generator=torch.Generator().manual_seed(seed + number), **edit,
        ).images[0]
        for number, (original, combination) in enumerate(zip(originals, combinations))
    ]  # fmt: skip
    return torch.stack(edited)


def _progress(cases, model):
    return tqdm(range(cases), desc=str(model), unit="case")


def editing_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    percents = {"named": "Prompt named, %", "before": "Before, %", "kept": "Others equal, %", "renamed": "Renamed, %"}
    ratios = {"half_seam": "Seam of a half", "true_seam": "of the original", "wide_seam": "of expanding"}
    cells = [
        [row["model"], *(f"{100 * row[name]:.1f}" for name in percents), *(f"{row[name]:.2f}" for name in ratios)]
        for row in rows
    ]
    return markdown_table(["Model", *percents.values(), *ratios.values()], cells)
