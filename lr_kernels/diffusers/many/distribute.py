"""Items spread over the processes of an accelerate run, each image the same whichever process makes it."""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import PIL.Image
import torch
from tqdm import tqdm

from ...runtime.checks import fail
from ...runtime.extras import require
from .items import OP, Drawn, ImageItem, check_items, pending, write_made, write_record

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch.distributed import Store
    from typing_extensions import Self

Generate = Callable[[ImageItem, torch.Generator], PIL.Image.Image | Sequence[PIL.Image.Image] | Drawn]
Done = TypeVar("Done")
PATIENCE = timedelta(hours=6)
"""How long processes wait for each other at the end, at most for the time of one item."""


@dataclass(frozen=True)
class SpreadReport:
    """What became of work that was spread over processes, by paths, in their order; the same in all processes."""

    done: list[str]
    """made by this run"""
    skipped: list[str]
    """there before"""
    failed: dict[str, str]
    """the error of each that failed; its record has the traceback"""

    @classmethod
    def of(cls, paths: Sequence[str], found: Mapping[int, str | None]) -> "Self":
        """From what was worked on: the error, or None, by the place in `paths`."""
        return cls(
            done=[path for i, path in enumerate(paths) if i in found and found[i] is None],
            skipped=[path for i, path in enumerate(paths) if i not in found],
            failed={path: error for i, path in enumerate(paths) if (error := found.get(i)) is not None},
        )

    def summary(self) -> str:
        """The numbers in a line, and a line for each failure."""
        counts = f"{len(self.done)} done, {len(self.skipped)} skipped, {len(self.failed)} failed"
        return "\n".join([counts, *(f"failed: {path}: {error}" for path, error in self.failed.items())])


class GenerationReport(SpreadReport):
    """What became of the items of `generate_many`."""


def generate_many(
    items: Sequence[ImageItem],
    load: Callable[[torch.device], Generate],
    folder: str | os.PathLike,
    *,
    progress: bool = True,
) -> GenerationReport:
    """Make the images of all items, in one process or in all those that `accelerate launch` or `torchrun` has started.

    Every image has a seed of its own, made of its subject, prompt and sample number, so that neither the number of
    processes nor their order changes a file. Each process takes the next item of its own part of the list, and when
    that part is done, one of another's. So items of one subject should follow each other, if models are loaded for it.

    An item's images and its record, a JSON beside them, are written whole or not at all. A run that was ended goes on
    where it was: items whose records are there are skipped, those that failed are tried again. An item that raises an
    error gets a record with it, and the others go on. What depends on the run, as seconds, is in `log/<process>.jsonl`
    alone, a line for each item; a `Drawn` brings seconds into the record too. One run at a time writes to a folder.

    Args:
        items: each with a path of its own.
        load: called with the process's device, once in each process that has something to do, after all items have been
            checked. It loads the models and returns `generate(item, generator)`, whose result is a PIL image or a list
            of them, or a `Drawn`; the generator is one of the CPU with the item's seed. What `load` raises ends the
            run.
        folder: where the files go; it is made. All processes have to see the same folder.
        progress: whether the main process shows a bar.

    Returns:
        What was done, skipped and failed, in all processes.

    Raises:
        TypeError, ValueError: items, named, that are none, whose path is no path of a PNG within the folder or that of
            another item, or for which the folder has a record of something else; processes that do not find each other.
        torch.AcceleratorError: of `generate`, since a device that raised it computes nothing any more.
    """
    items = check_items(items)
    if not callable(load):
        fail(OP, "load", "a function of a device, which returns generate", type(load).__name__, error=TypeError)
    if not isinstance(folder, str | os.PathLike) or (Path(folder).exists() and not Path(folder).is_dir()):
        fail(OP, "folder", "the path of a folder", repr(folder))
    folder = Path(folder)
    state = process_state()
    from accelerate.utils import broadcast_object_list

    wanted = broadcast_object_list([pending(items, folder)])[0]  # the main process's: others may look later
    generate: list[Generate] = []  # once it is loaded

    def make(place: int) -> str | None:
        if not generate:
            generate.append(load(state.device))
        return _make(items[wanted[place]], generate[0], folder, state)

    found = {wanted[place]: error for place, error in spread(len(wanted), make, state, progress=progress).items()}
    return GenerationReport.of([item.path for item in items], found)


def process_state() -> "PartialState":
    """accelerate's state of this process; on the CPU without an accelerator, or under `accelerate launch --cpu`.

    ValueError where the processes that were started do not know each other: each would make all images.
    """
    require("diffusers", "accelerate")
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=PATIENCE)
    started = int(os.environ.get("WORLD_SIZE", state.num_processes))
    if started != state.num_processes:
        hint = "set ACCELERATE_USE_CPU=true, and make no PartialState() before"
        fail(OP, "processes", f"{started}, as WORLD_SIZE says", f"{state.num_processes} by PartialState", hint)
    return state


def spread(
    count: int, work: Callable[[int], Done], state: "PartialState", *, progress: bool = True, title: str | None = None
) -> dict[int, Done]:
    """Call work(place) for each of `count` places, in all processes together once; the results, in all processes.

    Each process takes the next place of its own part, and when that part is done, one of another's. `progress`: whether
    the main process shows a bar, with its title and the time that is left.
    """
    from accelerate.utils import gather_object

    store = _shared_store(state)
    done: dict[int, Done] = {}
    with tqdm(total=count, desc=title, disable=not (progress and state.is_main_process)) as bar:
        for place in _claimed(store, count, state.process_index, state.num_processes):
            done[place] = work(place)
            bar.update(store.add("done", 1) - bar.n)
        found = dict(gather_object(list(done.items())))
        bar.update(count - bar.n)
    return found


def _shared_store(state: "PartialState") -> "Store":
    """A fresh store of counters that all processes share."""
    from torch.distributed import HashStore, TCPStore  # not in every build of torch

    if state.num_processes == 1:
        return HashStore()
    from accelerate.utils import broadcast_object_list

    host = os.environ.get("MASTER_ADDR", "localhost")  # where the main process is
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if state.is_main_process else None
    port = broadcast_object_list([None if store is None else store.port])[0]
    return TCPStore(host, port, is_master=False) if store is None else store


def _claimed(store: "Store", count: int, process: int, processes: int) -> Iterator[int]:
    """The places in a list of `count` that a process takes, one whenever it asks: those of its own part in their order,
    then what is left of the parts of others. Each place is taken once in all processes together."""
    for other in range(processes):
        owner = (process + other) % processes
        part = range(count * owner // processes, count * (owner + 1) // processes)
        while (taken := store.add(f"taken of part {owner}", 1)) <= len(part):
            yield part[taken - 1]


def _make(item: ImageItem, generate: Generate, folder: Path, state: "PartialState") -> str | None:
    """Make an item and write its files; the error, if it failed."""
    start = time.perf_counter()
    error, trace = None, None
    files: dict[str, Any] = {"images": []}
    try:
        files = write_made(item, generate(item, torch.Generator().manual_seed(item.seed)), folder)
    except torch.AcceleratorError:
        raise
    except Exception as caught:
        error, trace = f"{type(caught).__name__}: {caught}", traceback.format_exc()
    write_record(item, folder, files | {"error": error, "traceback": trace})
    _log(folder, state, path=item.path, seconds=round(time.perf_counter() - start, 3), error=error)
    return error


def _log(folder: Path, state: "PartialState", **line: Any) -> None:
    """Add a line to the log of this process."""
    path = folder / "log" / f"{state.process_index}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({**line, "device": str(state.device), "ended": time.time()}) + "\n")
