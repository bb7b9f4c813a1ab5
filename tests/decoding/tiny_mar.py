"""A `MAR` of toy size whose head denoises instead of diverging, and different pairs of them."""

import torch

from studio.models.mar import MAR

_CONSTANT = 200.0


def tiny_mar(seed=0, *, grid_size=4, token_dim=4, offset=1e-5, width=32, dim=16, depth=2, num_classes=5, **config):
    """Random weights, and a head that predicts nearly the state itself as noise; `config` as of `MAR`.

    Constants in the hidden channels keep the head's norm from rescaling the state. `offset` scales what conditions do
    to the predicted noise: the first step multiplies it by about 10000.
    """
    torch.manual_seed(seed)
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder")
             for name, size in (("dim", dim), ("depth", depth), ("heads", 2))}  # fmt: skip
    model = MAR(
        **sizes,
        grid_size=grid_size,
        token_dim=token_dim,
        num_classes=num_classes,
        buffer_size=3,
        head_width=width,
        head_depth=1,
        latent_scale=1.0,
        **config,
    )
    conditions = model.class_emb if num_classes else model.caption_proj
    for weight in (conditions.weight, model.fake_latent, model.encoder_pos_embed_learned,
                   model.decoder_pos_embed_learned, model.diffusion_pos_embed_learned):  # fmt: skip
        torch.nn.init.normal_(weight)
    network, state = model.diffloss.net, torch.eye(token_dim)
    rest = width - 2 * token_dim
    with torch.no_grad():
        network.input_proj.weight.zero_()
        network.input_proj.weight[:token_dim], network.input_proj.weight[token_dim : 2 * token_dim] = state, -state
        network.input_proj.bias[2 * token_dim :] = _CONSTANT * (1 - 2 * (torch.arange(rest) % 2))
        spread = _CONSTANT * (rest / width) ** 0.5
        final = network.final_layer
        final.adaLN_modulation[1].weight[2 * token_dim : width].normal_(std=0.2)
        final.linear.weight[:token_dim, :token_dim] = state * spread / 2
        final.linear.weight[:token_dim, token_dim : 2 * token_dim] = -state * spread / 2
        final.linear.weight[:token_dim, 2 * token_dim :].normal_(std=offset)
        final.linear.weight[token_dim:, 2 * token_dim :].normal_(std=0.05)
    return model.eval()


def generators(count, first=0):
    """One generator an image."""
    return [torch.Generator().manual_seed(first + image) for image in range(count)]
