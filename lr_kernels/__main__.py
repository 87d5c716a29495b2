"""`python -m lr_kernels`: info, demo, presets and knobs."""

import argparse
from pathlib import Path

from . import info


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m lr_kernels", description="Multi-source attention for diffusion models"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction set, backends and why each is available or not")
    demo = commands.add_parser("demo", help="Layout-and-Retouch on the embedded toy model: pictures and metrics")
    demo.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder for the PNG and JSON")
    demo.add_argument("--subject", default="ball", help="ball, box, star, ring, cross or die (default ball)")
    demo.add_argument("--seeds", type=int, default=3, help="seeds per prompt (default 3)")
    demo.add_argument("--backend", default="auto", help="auto, cpu, triton, cuda or reference (default auto)")
    presets = commands.add_parser("presets", help="every preset on the embedded toy model: a picture")
    presets.add_argument("--output", type=Path, default=Path("outputs/presets"), help="folder for the PNG")
    knobs = commands.add_parser("knobs", help="what the pipeline's arguments do, on the embedded toy model: a picture")
    knobs.add_argument("--output", type=Path, default=Path("outputs/knobs"), help="folder for the PNG")
    options = parser.parse_args()
    if options.command == "info":
        print(info.report())
        return
    if options.command == "presets":
        from .gallery import run as draw

        print(draw(options.output))
        return
    if options.command == "knobs":
        from .knobs import run as turn

        print(turn(options.output))
        return
    from .demo import run  # needs diffusers, which info does not

    run(options.output, subject=options.subject, seeds=options.seeds, backend=options.backend)


if __name__ == "__main__":
    main()
