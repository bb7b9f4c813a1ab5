"""Sample the tokens of one seed with several decodings, and compare calls, seconds and tokens with plain decoding."""

import argparse

import torch

import studio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="emoji-ar")
    options = parser.parse_args()

    pipe = studio.load(options.model, dtype="float32")
    decodings = {
        "plain": studio.Autoregressive(),
        "jacobi": studio.Jacobi(window=4),
        "speculative": studio.Speculative(),
        "lantern": studio.Lantern(k=8, delta=0.1),
    }
    plain = None
    for name, decoding in decodings.items():
        generator = torch.Generator().manual_seed(0)
        out = pipe(options.prompt, generator=generator, decoding=decoding, output_type="tokens")
        plain = out.tokens if plain is None else plain
        same = "equal tokens" if torch.equal(out.tokens, plain) else "other tokens"
        print(f"{name:12} {out.stats.target_calls:4} calls {out.stats.seconds['decode']:7.3f} s  {same}")


if __name__ == "__main__":
    main()
