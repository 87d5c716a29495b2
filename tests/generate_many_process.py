"""Processes of the tests of `generate_many`: what they draw, and what a process that a test starts does."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

from lr_kernels import toy
from lr_kernels.diffusers import ImageItem, generate_many
from lr_kernels.diffusers.many.command import command

PLACES = ("sand", "grass", "snow")
FAILS = "fails/on-sand/0.png"


def items():
    """Six images of two subjects, one of which is two pictures, and one that fails."""
    found = [
        ImageItem(f"{subject}/on-{place}/0.png", f"a {subject} on {place}", subject, arguments={"pictures": pictures})
        for subject, pictures in (("ball", 1), ("box", 2))
        for place in PLACES
    ]
    return [*found[:2], ImageItem(FAILS, "a ball on sand", "fails"), *found[2:]]


def load(device):
    """The embedded stock pipeline."""
    pipe = toy.load_pipeline().to(device)

    def generate(item, generator):
        if item.subject == "fails":
            raise RuntimeError("no such subject")
        copies = item.arguments["pictures"]
        return pipe(item.prompt, num_inference_steps=2, num_images_per_prompt=copies, generator=generator).images

    return generate


def hang_at_replace(number):
    """Make the process hang just before it moves its `number`-th file to its place."""
    replace, calls = os.replace, []

    def hanging(source, target):
        calls.append(target)
        if len(calls) == number:
            Path(source).with_name("hanging").touch()
            time.sleep(600)
        replace(source, target)

    os.replace = hanging


if __name__ == "__main__":
    folder, what = Path(sys.argv[1]), sys.argv[2]
    if what.isdecimal():
        hang_at_replace(int(what))
        generate_many(items(), load, folder, progress=False)
    else:
        report = generate_many(items(), load, folder, progress=False)
        (folder.parent / f"report-{os.environ['RANK']}.json").write_text(json.dumps(asdict(report)))
        sys.exit(command(Path(what)))
