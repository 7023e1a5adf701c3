"""Build the embedded model from registry packages: `torchrun --nproc-per-node 2 -m tiny_animals STAGE`."""

from __future__ import annotations

import argparse
from pathlib import Path

ASSETS = Path(__file__).parents[2] / "src" / "driftrl" / "assets" / "tiny-animals"
GENTLE = 0.25  # how far the generator's drawings are posed


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="tiny_animals", description=__doc__)
    parser.add_argument(
        "stage",
        choices=["autoencoder", "denoiser", "assemble", "decoder", "scorer", "encoder", "checker", "check"],
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/tiny-animals"), help="downloads and training state"
    )
    parser.add_argument("--images", type=int, help="how many images to train on")
    parser.add_argument("--pipeline", type=Path, help="check: the folder to check (CACHE/pipeline)")
    parser.add_argument("--count", type=int, default=40, help="check: images of each prompt")
    parser.add_argument("--steps", type=int, default=10, help="check: denoising steps")
    parser.add_argument("--guidance", type=float, default=1.5, help="check: guidance scale")
    parser.add_argument("--eta", type=float, default=1.0, help="check: DDIM's eta")
    args = parser.parse_args()

    from tiny_animals import autoencoder, check, checker, denoiser, encoder, scorer
    from tiny_animals.bank import build

    bank = build(args.cache)
    if args.stage == "autoencoder":
        autoencoder.train(
            build(args.cache, spread=GENTLE), args.cache / "autoencoder", args.images or 100_000
        )
    elif args.stage == "denoiser":
        denoiser.train(build(args.cache, poses=2, spread=0), args.cache, args.images or 500_000)
    elif args.stage == "assemble":
        denoiser.assemble(args.cache)
    elif args.stage == "decoder":
        gentle = build(args.cache, spread=GENTLE)
        autoencoder.train(gentle, args.cache / "decoder", args.images or 60_000, args.cache / "autoencoder")
    elif args.stage == "scorer":
        scorer.train(bank, args.cache, ASSETS / "scorer", args.images or 540_000)
    elif args.stage == "encoder":
        encoder.train(bank, args.cache, ASSETS / "encoder", args.images or 60_000)
    elif args.stage == "checker":
        checker.train(bank, args.cache, args.images or 160_000)
    elif args.stage == "check":
        folder = args.pipeline or args.cache / "pipeline"
        check.check(folder, bank, args.count, args.steps, args.guidance, args.eta)


if __name__ == "__main__":
    main()
