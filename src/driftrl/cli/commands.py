"""What users type: arguments and help of every command; the work is in the command's own file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from driftrl.cli.typed import as_typed

CONFIG = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.yaml", help="A YAML file; without one, DRIFT on the embedded model."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a setting, such as [cyan]optimizer.learning_rate=2e-3[/]; may be given several times.",
    ),
]

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="float32, bfloat16 or float16; by default that of the run, or float32."
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:1; by default that of the run, or auto.")
]
NegativePrompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="What guidance leads away from; by default that of the run."),
]
ModelConfig = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Of a model that is one file: the pipeline that it was made from, a folder or a hub name (model.config).",
    ),
]


def _flag(*names: str, help: str) -> Any:
    """A switch, without a type in the help."""
    return typer.Option(*names, help=help, metavar="")


Json = Annotated[bool, _flag("--json", help="Print the figures as one JSON object instead of the table.")]


class _Command(TyperCommand):
    """A command whose --help has no type."""

    def get_help_option(self, ctx: Any) -> Any:
        """As ever, but for what would stand in the column of types."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option


class _WithSettings(_Command):
    """A command whose unknown options may be settings: then it says how these are given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever, and add to the message about an option that does not exist."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Only the error about an option that does not exist has both.
            option = getattr(error, "option_name", None)
            if isinstance(option, str) and hasattr(error, "possibilities"):
                from driftrl.config import setting_like

                key = setting_like(option)
                if key:
                    error.message += f"; settings are given as --set {key}=VALUE"  # type: ignore[attr-defined]
                    error.possibilities = None
            raise


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""

    @app.command(cls=_WithSettings)
    def train(
        config: CONFIG = None,
        settings: Set = None,
        out: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR", help="The run folder; by default runs/NAME-seedSEED, numbered if that exists."
            ),
        ] = None,
        resume: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder.")
        ] = None,
        quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress display.")] = False,
    ) -> None:
        """Fine-tune a model.

        Ctrl-C leaves a checkpoint that --resume goes on from. What may be set: driftrl settings.

        Examples:

          driftrl train

          driftrl train --set iterations=100 --set seed=1 --out runs/mine

          driftrl train experiments/grpo.yaml

          driftrl train --resume runs/mine
        """
        from driftrl.cli.train import train as work

        work(config, settings or [], out, resume, quiet)

    @app.command(cls=_Command)
    def settings(
        word: Annotated[
            str | None, typer.Argument(metavar="WORD", help="Only those with this in their name or meaning.")
        ] = None,
        markdown: Annotated[bool, _flag("--markdown", help="As docs/settings.md has them.")] = False,
    ) -> None:
        """List what may be set: every setting of a configuration, its default and its meaning.

        They are given as --set shaping.ratio=0.2, or in a YAML file: shaping: {ratio: 0.2}.

        Examples:

          driftrl settings

          driftrl settings noise
        """
        from driftrl.cli.settings import settings as work

        work(word, markdown)

    @app.command(cls=_WithSettings)
    def estimate(
        config: CONFIG = None,
        settings: Set = None,
        no_probe: Annotated[
            bool,
            _flag("--no-probe", help="Count only: no times, and no memory of what is computed meanwhile."),
        ] = False,
    ) -> None:
        """Say what a run will take, in time and memory, before it is paid for.

        Loads what the run would, tries a little of each phase on the run's device and multiplies. Writes nothing.

        Examples:

          driftrl estimate experiments/demo.yaml

          driftrl estimate experiments/paper/sd15-pickscore.yaml --set sampling.batch_size=8

          driftrl estimate --no-probe --set prompts.per_iteration=16
        """
        from driftrl.cli.estimate import estimate as work

        work(config, settings or [], not no_probe)

    @app.command(cls=_Command)
    def sample(
        source: Annotated[
            str,
            typer.Argument(
                metavar="RUN_OR_MODEL",
                help="A run folder, a checkpoint, a pipeline folder, a safetensors file, a hub name or 'tiny-animals'.",
            ),
        ],
        prompt: Annotated[
            list[str] | None,
            typer.Option("--prompt", "-p", metavar="TEXT", help="What to draw; may be given several times."),
        ] = None,
        prompts: Annotated[
            str | None,
            typer.Option(
                metavar="FILE", help="A prompt set of the package, or a TXT or JSONL file, to draw."
            ),
        ] = None,
        count: Annotated[int, typer.Option("-n", metavar="N", help="Images per prompt.", min=1)] = 16,
        seed: Annotated[int, typer.Option(help="The same seed gives the same images.", min=0)] = 0,
        out: Annotated[
            Path,
            typer.Option(
                metavar="FILE.png|DIR", help="The PNG to write, or a folder for the grid and every image."
            ),
        ] = Path("grid.png"),
        base: Annotated[
            bool, _flag("--base", help="Show the base model beside it, on the same seeds.")
        ] = False,
        steps: Annotated[
            int | None, typer.Option(help="Denoising steps; by default those of the run.", min=1)
        ] = None,
        guidance_scale: Annotated[
            float | None, typer.Option(help="By default that of the run.", min=0)
        ] = None,
        negative_prompt: NegativePrompt = None,
        deterministic: Annotated[
            bool,
            _flag(
                "--deterministic",
                help="No noise on the way (DDIM with eta = 0, the plain flow), as stock pipelines draw.",
            ),
        ] = False,
        lora_scale: Annotated[
            float,
            typer.Option(
                help="Turn the adapter down: 1 is as it was trained, 0 the base model.",
                min=0,
            ),
        ] = 1.0,
        lora: Annotated[
            str | None,
            typer.Option(
                metavar="LORA",
                help="A LoRA to put on the model, whoever trained it: a safetensors file, a folder, a run or a hub name.",
            ),
        ] = None,
        iteration: Annotated[
            int | None,
            typer.Option("--checkpoint", metavar="K", help="Of a run; by default the last one.", min=0),
        ] = None,
        model_config: ModelConfig = None,
        dtype: Dtype = None,
        device: Device = None,
    ) -> None:
        """Draw images with a fine-tuned model, or any model.

        Writes one PNG, a row for each prompt; into a folder also every image, in a folder for each prompt.

        Examples:

          driftrl sample runs/mine --prompt "a cat" -n 16 --out cats.png

          driftrl sample tiny-animals -p "an ink fox on a teal background" -p "a frog"

          driftrl sample runs/mine --prompts animals8 -n 40 --out pictures/

          driftrl sample runs/mine -p "a cat" -n 16 --lora-scale 0.6

          driftrl sample black-forest-labs/FLUX.1-dev -p "a cat" --dtype bfloat16 --lora my-lora.safetensors

          driftrl sample my-checkpoint.safetensors -p "a cat" --dtype float16
        """
        from driftrl.cli.sample import sample as work

        with as_typed(
            {
                "model.path": ("RUN_OR_MODEL", source),
                "model.config": ("--model-config", model_config),
                "sampling.steps": ("--steps", steps),
                "sampling.negative_prompt": ("--negative-prompt", negative_prompt),
                "prompts": ("--prompts", prompts),
            }
        ):
            work(
                source, prompt or [], prompts, count, seed, out, base, steps, guidance_scale, deterministic, dtype,
                device, lora_scale, lora, iteration, negative_prompt, model_config,
            )  # fmt: skip

    @app.command(cls=_Command)
    def evaluate(
        source: Annotated[
            str,
            typer.Argument(
                metavar="RUN_OR_MODEL",
                help="A run folder, a checkpoint, a pipeline folder, a safetensors file, a hub name or 'tiny-animals'.",
            ),
        ],
        prompts: Annotated[
            str | None,
            typer.Option(
                metavar="FILE",
                help="A prompt set of the package, or a TXT or JSONL file; by default the run's evaluation.prompts.",
            ),
        ] = None,
        images: Annotated[
            int | None, typer.Option(help="Images per prompt; by default as the run says. The paper has 40.")
        ] = None,
        which: Annotated[
            str, typer.Option("--checkpoint", metavar="K,K|all|last", help="Which checkpoints.")
        ] = "last",
        reward: Annotated[
            list[str] | None,
            typer.Option(
                metavar="NAME",
                help="One more reward, scored beside the trained one; may be given several times.",
            ),
        ] = None,
        seed: Annotated[int, typer.Option(help="Of the images; the same for base and tuned.", min=0)] = 0,
        encoder: Annotated[
            str | None,
            typer.Option(metavar="NAME", help="Image encoder for variety; by default that of the run."),
        ] = None,
        clip: Annotated[
            str | None,
            typer.Option(
                metavar="MODEL",
                help="A CLIP model for CLIP diversity and prompt-image similarity, a folder or a hub name; by default that of "
                "the run, and for the embedded model its own.",
            ),
        ] = None,
        keep_images: Annotated[bool, _flag("--keep-images", help="Write every image as a PNG too.")] = False,
        out: Annotated[
            Path | None, typer.Option(metavar="DIR", help="Folder to write to; by default the run folder.")
        ] = None,
        steps: Annotated[
            int | None,
            typer.Option(
                help="Denoising steps; by default the run's evaluation.steps, or those of its training.",
                min=1,
            ),
        ] = None,
        guidance_scale: Annotated[
            float | None, typer.Option(help="By default that of the run.", min=0)
        ] = None,
        negative_prompt: NegativePrompt = None,
        deterministic: Annotated[
            bool,
            _flag(
                "--deterministic",
                help="No noise on the way (DDIM with eta = 0, the plain flow), as stock pipelines draw; by default as the run "
                "says.",
            ),
        ] = False,
        lora_scale: Annotated[
            str | None,
            typer.Option(
                metavar="S,S",
                help="Measure one checkpoint's adapter turned down to these scales, and as it is, for what variety comes "
                "back at what reward; written to the run's lora-scale folder.",
            ),
        ] = None,
        lora: Annotated[
            str | None,
            typer.Option(
                metavar="LORA",
                help="A LoRA to measure on the model, whoever trained it: a safetensors file, a folder, a run or a hub name.",
            ),
        ] = None,
        model_config: ModelConfig = None,
        dtype: Dtype = None,
        device: Device = None,
        as_json: Json = False,
        quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress display.")] = False,
    ) -> None:
        """Measure reward and variety beside the base model, and write report.html.

        What was measured under the same settings before is not measured again. The figures go to stdout.

        Examples:

          driftrl evaluate runs/mine

          driftrl evaluate runs/mine --checkpoint all --images 40

          driftrl evaluate runs/mine --prompts compositions --reward compressibility

          driftrl evaluate runs/mine --lora-scale 0.2,0.4,0.6,0.8

          driftrl evaluate runs/mine --deterministic --steps 40

          driftrl evaluate tiny-animals --images 40

          driftrl evaluate stabilityai/stable-diffusion-xl-base-1.0 --lora my-lora.safetensors --reward pickscore --encoder dreamsim

          driftrl evaluate runs/mine --json > figures.json
        """
        from driftrl.cli.evaluate import evaluate as work
        from driftrl.cli.evaluate import scales

        with as_typed(
            {
                "model.path": ("RUN_OR_MODEL", source),
                "model.config": ("--model-config", model_config),
                "prompts": ("--prompts", prompts),
                "images": ("--images", images),
                "reward": ("--reward", reward),
                "shaping.encoder": ("--encoder", encoder),
                "evaluation.clip": ("--clip", clip),
                "sampling.steps": ("--steps", steps),
                "sampling.negative_prompt": ("--negative-prompt", negative_prompt),
            }
        ):
            work(
                source,
                quiet=quiet,
                as_json=as_json,
                prompts=prompts,
                images=images,
                checkpoints=which,
                rewards=reward or [],
                seed=seed,
                encoder=encoder,
                clip=clip,
                dtype=dtype,
                device=device,
                keep_images=keep_images,
                out=out,
                steps=steps,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                deterministic=deterministic or None,
                lora_scales=scales(lora_scale),
                lora=lora,
                model_config=model_config,
            )

    @app.command(cls=_Command)
    def compare(
        runs: Annotated[
            list[Path],
            typer.Argument(
                metavar="RUN",
                help="Evaluated run folders, or the files that driftrl experiment collects, or folders of these, such "
                "as that of an experiment; runs of one name are its seeds.",
            ),
        ],
        out: Annotated[
            Path,
            typer.Option(
                metavar="FILE.html",
                help="The page to write, and a PNG of that name; never a run's own report.",
            ),
        ] = Path("comparison.html"),
        against: Annotated[
            str | None, typer.Option(metavar="NAME", help="The method to compare with; by default the first.")
        ] = None,
        blind: Annotated[
            Path | None,
            typer.Option(
                metavar="DIR",
                help="Write a blinded page for raters instead, with the key beside it; takes two runs, or "
                "checkpoints in them, or one, which is shown beside its base model.",
            ),
        ] = None,
        seed: Annotated[
            int | None,
            typer.Option(help="Of the blinded page's order and sides; by default a new one.", min=0),
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Compare methods: curves, fronts, gains at equal level.

        Measure all runs alike first, with driftrl evaluate RUN --checkpoint all. What is found goes to stdout.

        Examples:

          driftrl compare runs/grpo-seed0 runs/drift-seed0

          driftrl compare runs/grpo-seed* runs/drift-seed* --against grpo --out seeds.html

          driftrl compare runs/grpo-seed0 runs/drift-seed0 --blind human

          driftrl compare runs/main --against grpo --json
        """
        from driftrl.cli.compare import compare as work

        work(runs, out, against, blind, seed, as_json)

    @app.command(cls=_Command)
    def export(
        source: Annotated[
            Path,
            typer.Argument(metavar="RUN", help="A run folder, or a checkpoint; of a run the newest one."),
        ],
        out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
        comfyui: Annotated[bool, _flag("--comfyui", help="Also the LoRA as ComfyUI reads it.")] = False,
    ) -> None:
        """Write the adapter with a model card, for others to use.

        The card has how it is loaded, what was measured, a picture, and the settings; no folder of this machine is in it.

        Examples:

          driftrl export runs/mine --out mine

          driftrl export runs/mine/checkpoints/000040 --out mine --comfyui
        """
        from driftrl.cli.export import export as work

        work(source, out, comfyui)

    @app.command(cls=_Command)
    def judge(
        folder: Annotated[
            Path, typer.Argument(metavar="DIR", help="What driftrl compare --blind DIR wrote.")
        ],
        answers: Annotated[
            list[Path], typer.Argument(metavar="ANSWERS.json", help="The file that each rater saved.")
        ],
    ) -> None:
        """Say what raters chose on a blinded page: win rates, intervals, agreement.

        Writes analysis.json and analysis.png into DIR (docs/human-evaluation.md).

        Examples:

          driftrl judge human ann.json ben.json
        """
        from driftrl.cli.judge import judge as work

        work(folder, answers)

    @app.command(cls=_Command)
    def experiment(
        plan: Annotated[
            Path, typer.Argument(metavar="PLAN.yaml", help="A YAML file (experiments/README.md).")
        ],
        out: Annotated[
            Path | None,
            typer.Option(metavar="DIR", help="The folder of the runs; by default runs/ and the plan's name."),
        ] = None,
        jobs: Annotated[
            int | None,
            typer.Option(
                help="Runs at a time; by default as the plan says, or one for each GPU or core.", min=1
            ),
        ] = None,
        retry: Annotated[int, typer.Option(help="How often a run that fails is tried again.", min=0)] = 1,
        dry_run: Annotated[
            bool, _flag("--dry-run", help="List the runs and the settings in which they differ.")
        ] = False,
        quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress display.")] = False,
    ) -> None:
        """Train, evaluate and compare many runs: methods x settings x seeds.

        What is finished is skipped, what was interrupted goes on: after Ctrl-C, start it again.

        Examples:

          driftrl experiment experiments/plans/paper-01-sampling.yaml --dry-run

          driftrl experiment experiments/plans/paper-01-sampling.yaml

          driftrl experiment experiments/plans/main.yaml --out /data/main --jobs 8
        """
        from driftrl.cli.experiment import experiment as work

        work(plan, out, jobs, retry, dry_run, quiet)

    @app.command("serve-reward", cls=_Command)
    def serve_reward(
        name: Annotated[
            str, typer.Argument(metavar="NAME", help="A reward of the package, or module:function.")
        ],
        host: Annotated[
            str, typer.Option(help="The address to listen on; by default this machine only.")
        ] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8300,
        device: Annotated[
            str, typer.Option(help="'auto' takes a GPU if there is one; else 'cpu', 'cuda', 'cuda:1'.")
        ] = "auto",
        dtype: Annotated[
            str,
            typer.Option(
                help="Of the package's networks: 'float32', 'bfloat16', or 'auto', which is that on CUDA."
            ),
        ] = "auto",
        max_megabytes: Annotated[
            int,
            typer.Option(
                help="The largest request that is read; clients send larger batches in parts.", min=1
            ),
        ] = 256,
        batch_size: Annotated[
            int | None,
            typer.Option(help="Images scored at once; by default all of a request.", min=1),
        ] = None,
        token: Annotated[
            str | None,
            typer.Option(
                envvar="DRIFTRL_REWARD_TOKEN",
                show_envvar=True,
                help="A bearer token that clients must send; other users can read it on the command line, not "
                "in the environment variable.",
            ),
        ] = None,
    ) -> None:
        """Serve a reward over HTTP to a driftrl in another environment (docs/reward-server.md).

        Ctrl-C stops it once the requests in hand are answered.

        Examples:

          driftrl serve-reward tiny-animals

          driftrl serve-reward my_rewards:score --port 8301 --device cuda:1

          driftrl train --set reward=http://127.0.0.1:8300
        """
        from driftrl.cli.serve_reward import serve_reward as work

        work(name, host, port, device, dtype, max_megabytes, batch_size, token)

    @app.command(cls=_Command)
    def doctor(
        model: Annotated[
            str,
            typer.Option(
                help="What is tried: a pipeline folder, a safetensors file or a hub name, instead of the embedded model."
            ),
        ] = "tiny-animals",
        model_config: ModelConfig = None,
    ) -> None:
        """Check this machine: versions, devices, free space, and a model.

        The model draws four images, then replays samples in float32, bfloat16
        and float16: the ratio of an untouched policy must be 1, up to a tenth
        of the clip range. The exit status is 1 if something is wrong.

        Examples:

          driftrl doctor

          driftrl doctor --model stable-diffusion-v1-5/stable-diffusion-v1-5
        """
        from driftrl.cli.doctor import doctor as work

        with as_typed({"model.path": ("--model", model), "model.config": ("--model-config", model_config)}):
            work(model, model_config)
