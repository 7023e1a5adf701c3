"""Build the embedded model from registry packages: `torchrun --nproc-per-node 2 -m tiny_animals STAGE`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="tiny_animals", description=__doc__)
    parser.add_argument("stage", choices=["autoencoder", "denoiser", "assemble", "decoder"])
    parser.add_argument("--cache", type=Path, default=Path(".cache/tiny-animals"), help="downloads and training state")
    parser.add_argument("--images", type=int, help="how many images to train on")
    args = parser.parse_args()

    from tiny_animals import autoencoder, denoiser
    from tiny_animals.bank import build

    bank = build(args.cache)
    if args.stage == "autoencoder":
        autoencoder.train(bank, args.cache / "autoencoder", args.images or 100_000)
    elif args.stage == "denoiser":
        denoiser.train(bank, args.cache, args.images or 500_000)
    elif args.stage == "assemble":
        denoiser.assemble(args.cache)
    elif args.stage == "decoder":
        autoencoder.train(bank, args.cache / "decoder", args.images or 60_000, args.cache / "autoencoder")


if __name__ == "__main__":
    main()
