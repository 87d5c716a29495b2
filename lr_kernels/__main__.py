"""`python -m lr_kernels`: info, demo, presets, knobs, generate and eval."""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import info
from .runtime import backends
from .runtime.extras import require

SUBJECTS = ("ball", "box", "star", "ring", "cross", "die")
"""The subjects of `lr_kernels.toy.world`, written out here since importing that needs diffusers."""
STAGES = ("generate", "score", "report")
"""Those of `lr_kernels.evaluation`, likewise."""


class Parser(argparse.ArgumentParser):
    """A parser that answers wrong options with the whole help and not with the usage line alone."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong below the help, and end with status 2."""
        self.print_help(sys.stderr)
        self.exit(2, f"\n{self.prog}: error: {message}\n")


def parser() -> Parser:
    """The commands and their options."""
    made = Parser(prog="python -m lr_kernels", description="Multi-source attention for diffusion models")
    commands = made.add_subparsers(dest="command")
    commands.add_parser("info", help="versions, instruction set, backends and why each is available or not")
    demo = commands.add_parser("demo", help="Layout-and-Retouch on the embedded toy model: pictures and metrics")
    demo.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for the PNG and JSON")
    demo.add_argument("--subject", default="ball", choices=SUBJECTS, help="default ball")
    demo.add_argument("--seeds", type=_positive, default=3, help="seeds per prompt (default 3)")
    demo.add_argument("--backend", default="auto", type=_backend, help="auto, cpu, triton or reference (default auto)")
    presets = commands.add_parser("presets", help="every preset on the embedded toy model: a picture")
    presets.add_argument("--output", type=Path, default=Path("outputs/presets"), help="folder for the PNG")
    knobs = commands.add_parser("knobs", help="what the pipeline's arguments do, on the embedded toy model: a picture")
    knobs.add_argument("--output", type=Path, default=Path("outputs/knobs"), help="folder for the PNG")
    generate = commands.add_parser("generate", help="many prompts and subjects, in one process or under a launcher")
    generate.add_argument("run", type=Path, help="a file in YAML or JSON that says what to make: docs/many-prompts.md")
    generate.add_argument("--dry-run", action="store_true", help="list the images, and make none")
    evaluation = commands.add_parser("eval", help="methods draw, metrics score, a report compares")
    evaluation.add_argument(
        "run", type=Path, help="a file in YAML or JSON that says what to evaluate: docs/evaluation.md"
    )
    evaluation.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="some of generate, score, report (default all)"
    )
    evaluation.add_argument("--dry-run", action="store_true", help="check the file, list the images, and make none")
    return made


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _backend(name: str) -> str:
    """The name of a backend that runs here. Without this check the demo would train for a minute before it failed."""
    if name == "auto":
        return name
    known = name in backends.BACKENDS
    reason = backends.unavailable(name, "multi_source_attention") if known else "no such backend"
    if reason is not None:
        raise argparse.ArgumentTypeError(f"{name!r} cannot run: {reason}")
    return name


def main() -> None:
    """Run a command."""
    options = parser().parse_args()
    if options.command is None:
        parser().print_help()
    elif options.command == "info":
        print(info.report())
    else:
        try:
            run(options)
        except ModuleNotFoundError as error:
            sys.exit(str(error))


def run(options: argparse.Namespace) -> None:
    """Run a command that needs diffusers; `info` does not."""
    require("diffusers")
    if options.command == "presets":
        from .toy.gallery import run as draw

        print(draw(options.output))
    elif options.command == "knobs":
        from .toy.knobs import run as turn

        print(turn(options.output))
    elif options.command == "generate":
        from .diffusers.many.command import command

        sys.exit(command(options.run, dry_run=options.dry_run))
    elif options.command == "eval":
        from .evaluation.command import command as evaluate

        sys.exit(evaluate(options.run, options.stages, dry_run=options.dry_run))
    else:
        from .toy.demo import run as demonstrate

        demonstrate(options.output, subject=options.subject, seeds=options.seeds, backend=options.backend)


if __name__ == "__main__":
    main()
