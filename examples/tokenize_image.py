"""Write an image as a file of a few bytes, with fewer and more tokens, and restore it."""

import argparse
from pathlib import Path

from PIL import Image

import studio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("image", type=Path)
    parser.add_argument("--tokenizer", default="emoji-1d")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--out", type=Path, default=Path("out"))
    options = parser.parse_args()

    tokenizer = studio.load(options.tokenizer)
    image = Image.open(options.image).convert("RGB")
    options.out.mkdir(parents=True, exist_ok=True)
    for length in options.lengths:
        encoded = studio.encode_image(image, tokenizer, length=length)
        file = options.out / f"{length}.odp"
        file.write_bytes(encoded.data)
        studio.decode_image(file.read_bytes(), tokenizer).save(file.with_suffix(".png"))
        print(f"{length:4} tokens {len(encoded.data):5} bytes {encoded.psnr:6.2f} dB")


if __name__ == "__main__":
    main()
