"""Train a VQ tokenizer on a folder of images, then restore one of them. Needs the extra `train`."""

import argparse
from pathlib import Path

import torch
from PIL import Image

import studio
from studio.training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--grid", type=int, default=8, help="tokens a side")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("runs/tokenizer"))
    options = parser.parse_args()

    sizes = {"size": options.size, "grid": options.grid, "steps": options.steps, "batch_size": options.batch_size}
    train(kind="vq", data=str(options.folder), out=options.out, **sizes)

    tokenizer = studio.load(options.out / "model")
    file = next(path for path in sorted(options.folder.rglob("*")) if path.suffix in {".png", ".jpg"})
    image = Image.open(file).convert("RGB").resize((options.size, options.size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(options.size, options.size, 3)
    images = pixels.permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        tokens = tokenizer.encode(images.to(tokenizer.device, tokenizer.dtype))
        restored = tokenizer.decode(tokens)[0].float().cpu().clamp(-1, 1)
    Image.fromarray(((restored + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(options.out / "restored.png")
    print(f"{file.name}: {tokens.numel()} tokens, restored in {options.out / 'restored.png'}")


if __name__ == "__main__":
    main()
