"""What users type: arguments and help of every command; the work is in the command's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as [cyan]optimizer.learning_rate=2e-3[/]."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command()
    def train(
        config: Annotated[Path | None, typer.Argument(help="A YAML file; without one, DRIFT on the embedded model.")] = None,
        settings: Set = None,
        out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
        resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress display.")] = False,
    ) -> None:
        """Fine-tune a model.

        Examples:

          driftrl train

          driftrl train --set iterations=100 --set seed=1 --out runs/mine

          driftrl train experiments/grpo.yaml

          driftrl train --resume runs/mine
        """
        from driftrl.cli.train import train as work

        work(config, settings or [], out, resume, quiet)

    @app.command()
    def sample(
        source: Annotated[str, typer.Argument(help="A run folder, a checkpoint, a pipeline folder, a hub name or 'tiny-animals'.")],
        prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
        count: Annotated[int, typer.Option("-n", help="Images per prompt.", min=1)] = 16,
        seed: Annotated[int, typer.Option(help="The same seed gives the same images.", min=0)] = 0,
        out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
        base: Annotated[bool, typer.Option("--base", help="Show the base model beside it, on the same seeds.")] = False,
        steps: Annotated[int | None, typer.Option(help="Denoising steps; by default those of the run.", min=1)] = None,
        guidance_scale: Annotated[float | None, typer.Option(help="By default that of the run.", min=0)] = None,
    ) -> None:
        """Draw images with a fine-tuned model, or any model.

        Examples:

          driftrl sample runs/mine --prompt "a cat" -n 16 --out cats.png

          driftrl sample tiny-animals -p "an ink fox on a teal background" -p "a frog"
        """
        from driftrl.cli.sample import sample as work

        work(source, prompt, count, seed, out, base, steps, guidance_scale)

    @app.command()
    def doctor() -> None:
        """Check this machine: versions, devices, the embedded model, free space."""
        from driftrl.cli.doctor import doctor as work

        work()
