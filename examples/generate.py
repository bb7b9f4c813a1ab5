"""Generate images from a prompt, each with a seed of its own."""

import argparse
from pathlib import Path

import torch

import studio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="emoji-ar")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()

    pipe = studio.load(options.model)
    generators = [torch.Generator().manual_seed(seed) for seed in range(options.num_images)]
    out = pipe(options.prompt, num_images_per_prompt=options.num_images, generator=generators)

    options.out.mkdir(parents=True, exist_ok=True)
    for seed, image in enumerate(out.images):
        image.save(options.out / f"{seed}.png")
    print(
        f"{len(out.images)} images in {out.stats.seconds['total']:.2f} s, {out.stats.target_calls} calls of the model"
    )


if __name__ == "__main__":
    main()
