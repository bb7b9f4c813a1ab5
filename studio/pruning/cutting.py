"""Taking tokens out of a prompt: ids, masks, labels, positions, and padding made anew."""

import torch

from studio.errors import StudioError

_FILL = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}
"""What padding holds in each input that is as long as the prompt."""


def attention_mask_of(inputs: dict) -> torch.Tensor:
    """(B, L) long: the attention mask, all ones when none is given. Errors: `StudioError` for another shape."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise StudioError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, not {tuple(mask.shape)}."
        )
    return mask.long()


def cut(inputs: dict, keep: torch.Tensor, pad_token_id: int) -> dict:
    """The inputs with only the tokens that `keep` (B, L) marks, padded again to the longest row.

    Padding goes where it was: to the right when a row ended in padding, otherwise to the left.

    Args:
        inputs: `input_ids` and `attention_mask`, both (B, L), and whatever else goes with them.
        keep: bool, false for padding; a masked image token that stays keeps its mask.
        pad_token_id: the id in the padding.

    Returns:
        A new dict; entries that are not as long as the prompt are the same objects.
    """
    longest = int(keep.sum(dim=1).max())
    if bool((inputs["attention_mask"][:, -1] == 0).any()):
        order = torch.argsort(keep.int(), dim=1, descending=True, stable=True)[:, :longest]
    else:
        order = torch.argsort(keep.int(), dim=1, stable=True)[:, -longest:]
    real = keep.gather(1, order)
    out = dict(inputs)
    for name, fill in {"input_ids": pad_token_id, **_FILL}.items():
        value = inputs.get(name)
        if value is not None and value.shape[-2:] == keep.shape:
            taken = value.gather(-1, order.to(value.device).expand(*value.shape[:-1], longest))
            out[name] = taken.masked_fill(~real.to(value.device), fill)
    return out


def positions_from(mask: torch.Tensor) -> torch.Tensor:
    """(B, L) positions as transformers counts them: real tokens from 0 up, padding at 0."""
    return (mask.long().cumsum(dim=-1) - 1).masked_fill(mask == 0, 0)
