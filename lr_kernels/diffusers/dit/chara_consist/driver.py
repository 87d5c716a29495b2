"""CharaConsist (arXiv 2507.11533) around the calls of a Flux pipeline: one character in many pictures, untrained."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....runtime.checks import check_integer, check_number, check_pair, check_sequence, fail
from ...processors.bank_values import check_device
from ...processors.install import check_not_compiled, install_processors
from ...processors.joint import image_grid, joint_attention_layers
from .attention import (
    FrameRouting,
    Points,
    Words,
    foreground_of,
    mark_words,
    match_points,
    route_frame,
)
from .processor import CharaConsistFluxAttnProcessor, Kept, Task

_OP = "CharaConsist"
_INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids")
"""The first arguments of FluxTransformer2DModel, in order"""


def merge_weights(weight: float = 0.8, start: int = 1, decay: int = 11, end: int = 31) -> list[float]:
    """The weights of adaptive token merge in steps 0 to end - 1: 0 before `start`, then `weight`, and from `decay` on
    half a cosine down to 0. The defaults are the paper's code's, for 50 steps.

    Raises:
        ValueError: a weight outside of 0 to 1; steps that are not in the order start <= decay < end.
    """
    check_number("merge_weights", "weight", weight, "a number from 0 to 1", 0, 1)
    for name, step, lowest in (("start", start, 0), ("decay", decay, start), ("end", end, decay + 1)):
        check_integer("merge_weights", name, step, lowest, f"an integer of at least {lowest}")
    falling = (weight / 2 * (1 + math.cos(math.pi * i / (end - decay))) for i in range(end - decay))
    return [*[0.0] * start, *[weight] * (decay - start), *falling]


def prompt_words(tokenizer: Any, background: str, prompt: str) -> tuple[int, int]:
    """How many tokens describe the background, and how many there are: the `words` of a prompt, which begins with the
    words of its background: the first of its tokens are those of the background alone.

    Args:
        tokenizer: the one whose tokens the transformer attends to, `pipe.tokenizer_2`.

    Raises:
        ValueError: a prompt that begins with other words, or has no others; a background that ends within a word.
    """
    if not isinstance(background, str) or not background.strip():
        fail("prompt_words", "background", "the words of the background", repr(background))
    if not isinstance(prompt, str) or not prompt.startswith(background):
        fail("prompt_words", "prompt", f"one that begins with {background!r}", repr(prompt))
    of_background, all_words = (list(tokenizer(x, add_special_tokens=False).input_ids) for x in (background, prompt))
    first = len(of_background)
    if first >= len(all_words):
        fail("prompt_words", "prompt", "words of the foreground after those of the background", repr(prompt))
    if all_words[:first] != of_background:
        fail("prompt_words", "background", f"words that end where one of {prompt!r} does", repr(background))
    return first, len(all_words)


class CharaConsist:
    """Flux pictures of one character: frames read the identity image in the layers and steps of the paper's code.

        with CharaConsist(pipe) as chara:
            with chara.keep(words):                       # words: what prompt_words() says of a prompt
                identity = pipe(prompt, generator=seeded())
            with chara.search(words_of_frame):            # the same seed and prompt as the frame; ends early
                pipe(prompt_of_frame, generator=seeded(), output_type="latent")
            with chara.read(words_of_frame):
                frame = pipe(prompt_of_frame, generator=seeded())

    `keep` keeps the identity image's keys before RoPE and values in each step, and its attention outputs. `search` runs
    up to `point_step` and finds, by these outputs, which tokens of the frame match which of the identity's (`points`).
    In `read` the frame's foreground reads the identity's matched tokens, rotated to where they are placed, and merges
    its attention outputs with theirs; its background reads the identity's background. Outside of the three the
    pipeline is stock, bit for bit, and so is the picture of `keep`.

    Masks. With `words` the foreground is what attends more to words of the foreground than of the background (see
    `foreground_share`, `foreground_of`), on average over `layers`: of the identity at `point_step`, of a frame anew in
    each step up to it. Or give masks: `keep(foreground=…)`, bool (N,), and so on; they stay as they are. `points` may
    be set by hand, too, in place of `search`.

    Batches. The identity is one image; a pipeline's call may make several frames.

    Memory. Keys and values take 2·N·C numbers per layer and step, outputs N·C in layers and steps that merge: for
    FLUX.1-dev at 1024 x 1024 (N = 4096, C = 3072, bf16) 50 MB and 25 MB, with the defaults 77 GB and 15 GB in all.
    Hence they are kept on the CPU (`kept_on`), and one layer's are on the GPU at a time; `nbytes` says how much there
    is. Without `background` only the layers that read the foreground keep keys: 38 GB. At `point_step` the outputs of
    all layers are on the GPU, twice for a while: 1 GB each time, for the identity and for each frame.

    torch.compile compiles a model anew for each kind of pass, of which a whole run has about a dozen: raise
    torch._dynamo.config.recompile_limit, which is 8. Masks, points and steps compile nothing anew.

    Compared with the paper's code: the masks' token shares are computed in fp32, not fp16, and the points without the
    matrix of similarities (see `match_points`); merging is in fp32; frames may be a batch. `update_bg`, a background
    that changes from frame to frame, is missing. Its early picture after `point_step` is missing: what `search` returns
    is what the pipeline has then. Not yet run on the weights of FLUX.1-dev, only on small models with random ones; the
    attention is tested against a transcription with concatenated keys and a dense mask.

    Args:
        pipe: FluxPipeline, or another whose `transformer` is a FluxTransformer2DModel that has the tokens of one image.
        background: whether frames also keep the identity's background.
        steps: the steps in which frames read, from 0; the paper's code takes 1 to 40 of 50. A frame without a mask
            (words make it in each step for the next) reads nothing yet.
        point_step: the step in which points are searched and the last one that makes masks.
        merge: weights by step, as `merge_weights` makes them (the default); (): outputs are not merged.
        threshold: the least similarity of a matched point.
        layers: names of layers (`joint_attention_layers`); None: all single blocks. Their average makes masks and
            points; with `background` all of them read the background.
        foreground_layers: names of those of `layers` that read the foreground and merge. None: every second of them,
            from the first.
        kept_on: the device on which the identity is kept; None: the model's.

    Raises:
        ValueError, TypeError: an argument that does not fit; a run without `point_step`, of several identity images, or
            of other sizes; steps that `keep` did not see.
        NotImplementedError: processors that are not stock; a model compiled in place; several passes in a step (true
            CFG); tokens of more than one image (Kontext); what `CharaConsistFluxAttnProcessor` refuses.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        *,
        background: bool = True,
        steps: range = range(1, 41),
        point_step: int = 10,
        merge: Sequence[float] | None = None,
        threshold: float = 0.5,
        layers: Sequence[str] | None = None,
        foreground_layers: Sequence[str] | None = None,
        kept_on: str | torch.device | None = "cpu",
    ):
        if not isinstance(steps, range) or steps.step != 1 or not len(steps) or steps[0] < 0:
            fail(_OP, "steps", "a range of steps, as range(1, 41)", repr(steps))
        if not isinstance(background, bool):
            fail(_OP, "background", "True or False", repr(background))
        self.pipe, self.background, self.steps = pipe, background, steps
        self.point_step = check_integer(_OP, "point_step", point_step, 0, "a step, from 0")
        merge = merge_weights() if merge is None else merge
        check_sequence(_OP, "merge", merge)
        self.merge = [check_number(_OP, f"merge[{i}]", w, "a number from 0 to 1", 0, 1) for i, w in enumerate(merge)]
        self.threshold = check_number(_OP, "threshold", threshold, "a number from -1 to 1", -1, 1)
        if kept_on is not None:
            check_device(_OP, kept_on, "kept_on")
        self.kept_on = None if kept_on is None else torch.device(kept_on)
        every = _flux_layers(pipe)
        names = [n for n in every if n.startswith("single_transformer_blocks")] if layers is None else layers
        self.layers = {name: every[name] for name in _checked("layers", names, every)}
        read = list(self.layers)[::2] if foreground_layers is None else foreground_layers
        self.foreground_layers = frozenset(_checked("foreground_layers", read, self.layers))
        self.kept: dict[int, dict[str, Kept]] = {}
        """by step and layer, of the identity image"""
        self.identity_mask: Tensor | None = None
        """bool (1, M): the identity's foreground"""
        self.mask: Tensor | None = None
        """bool (B, N): the frames' foreground, of the last step that made one"""
        self.points: Points | None = None
        """of the frames: of the last `search`, within `read` those of its `point_step`, or set by hand"""
        self._phase: str | None = None
        self._given: Sequence[tuple[int, int]] | None = None
        self._words: Words | None = None
        self._step, self._grid = -1, (0, 0)
        self._identity_grid, self._timesteps = (0, 0), [0.0]
        self._routings: dict[tuple[bool, bool], FrameRouting] = {}
        self._hooks: list[RemovableHandle] = []
        self._processors = {name: CharaConsistFluxAttnProcessor() for name in self.layers}

    @property
    def nbytes(self) -> int:
        """The bytes of what is kept of the identity image."""
        return sum(x.nbytes for of in self.kept.values() for kept in of.values() for x in kept if x is not None)

    def __enter__(self) -> "CharaConsist":
        self._transformer = transformer = self.pipe.transformer
        check_not_compiled(_OP, transformer, "transformer")
        for name, processor in self._processors.items():
            processor.stand_in_for(self.layers[name].processor)
        self._installation = install_processors(self.layers, self._processors)
        self._hooks = [
            transformer.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            transformer.register_forward_hook(self._after_pass),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._installation.remove()

    @contextmanager
    def keep(
        self, words: tuple[int, int] | None = None, *, foreground: Tensor | None = None
    ) -> Iterator["CharaConsist"]:
        """Keep what the identity image, which the one call of the pipeline in the block makes, offers to frames. What
        was kept before is forgotten.

        Args:
            words: numbers of tokens: how many describe the background, and where the words end (see `prompt_words`).
                foreground: instead, a bool mask (N,) of the image's tokens, row by row.
        """
        self.kept, self.identity_mask, self.points = {}, None, None
        with self._running("keep", words, foreground):
            yield self
        self.identity_mask, self.mask = self.mask, None

    @contextmanager
    def search(
        self, words: Sequence[Any] | None = None, *, foreground: Tensor | None = None
    ) -> Iterator["CharaConsist"]:
        """Find the `points` of the frames that the one call of the pipeline in the block begins to make. It is
        interrupted after `point_step`.

        Args:
            words: as in `keep`, or a sequence of them, one for each frame. foreground: instead, a bool mask (N,) or
                (B, N).
        """
        self._check_kept()
        with self._running("search", words, foreground):
            yield self

    @contextmanager
    def read(self, words: Sequence[Any] | None = None, *, foreground: Tensor | None = None) -> Iterator["CharaConsist"]:
        """Make frames, by the one call of the pipeline in the block, that read the identity image. `points` are those
        of `search` and, from the step after `point_step` on, those found then. Afterwards they are forgotten: each
        call needs a search of its own.

        Args:
            words, foreground: as in `search`.
        """
        self._check_kept()
        if self.points is None:
            fail(_OP, "points", "those of search(), or points that you set", None)
        with self._running("read", words, foreground):
            yield self
        self.mask = self.points = None

    def _check_kept(self) -> None:
        if self.identity_mask is None:
            fail(_OP, "keep", "a run of the identity image first", "none", "call the pipeline within keep()")

    @contextmanager
    def _running(self, phase: str, words: Any, foreground: Tensor | None) -> Iterator[None]:
        if not self._hooks:
            fail(_OP, phase, "a block within `with CharaConsist(pipe) as …`", "one outside")
        if self._phase is not None:
            fail(_OP, phase, "a block of its own", f"one within {self._phase}()")
        if self.pipe.transformer is not self._transformer:
            hint = "exchange or compile it before `with CharaConsist(pipe)`"
            fail(_OP, "pipe", "the transformer that it had when the block began", "another one", hint)
        check_not_compiled(_OP, self._transformer, "transformer")
        if (words is None) == (foreground is None):
            fail(_OP, "words", "either words or a foreground", "none" if words is None else "both")
        self._given = None if words is None else _pairs(words)
        self._words, self._step = None, -1
        if phase != "read":
            self.mask = None  # a frame begins with the mask of its search
        if foreground is not None:
            if not isinstance(foreground, Tensor) or foreground.dtype != torch.bool or foreground.dim() not in (1, 2):
                got = getattr(foreground, "dtype", type(foreground).__name__), getattr(foreground, "shape", "no shape")
                fail(_OP, "foreground", "a bool tensor (N,) or (rows, N)", got)
            self.mask = foreground if foreground.dim() == 2 else foreground[None]
        self._routings, self._phase = {}, phase
        try:
            yield
        finally:
            self._phase = None
            for processor in self._processors.values():
                processor.prepare(None)
        if self._step < self.point_step:
            hint = "call the pipeline once within the block, with more steps or an earlier point_step"
            reached = f"steps up to {self._step}" if self._step >= 0 else "none"
            fail(_OP, "point_step", f"a run that reaches step {self.point_step}", reached, hint)

    def _before_pass(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Give each layer its task in this pass."""
        if self._phase is None:
            return
        if replaced := self._installation.replaced():
            hint = "begin the block anew after what replaced them, such as set_attn_processor() or load_ip_adapter()"
            now = f"{type(self.layers[replaced[0]].processor).__name__} in {replaced[0]}"
            fail(_OP, "pipe", "the processors that the block installed", now, hint)
        given = dict(zip(_INPUTS, args)) | kwargs
        (rows, tokens), text = given["hidden_states"].shape[:2], given["encoder_hidden_states"].shape[1]
        begins = self._step < 0
        self._next_step()
        if begins:
            self._begin(rows, tokens, text, given["img_ids"], given["hidden_states"].device)
        for name, processor in self._processors.items():
            task = self._kept_task(name, text) if self._phase == "keep" else self._frame_task(name, text)
            processor.prepare(task)

    def _next_step(self) -> None:
        scheduler = self.pipe.scheduler
        step = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
        if step <= self._step:
            hint = "leave true_cfg_scale at 1, and call the pipeline once in each block"
            expected, got = "one pass of the model in each step of one call", f"another one in step {step}"
            fail(_OP, "pipe", expected, got, hint, NotImplementedError)
        self._step = step

    def _begin(self, rows: int, tokens: int, text: int, ids: Tensor, device: torch.device) -> None:
        """Check the sizes of a run against what was given, and make the words' masks."""
        if self._phase == "keep" and rows != 1:
            fail(_OP, "pipe", "one identity image", f"{rows} images")
        self._grid = lines, columns = image_grid(ids)
        if lines * columns != tokens:
            got = f"{tokens} tokens in a grid of {lines} x {columns}"
            fail(_OP, "pipe", "the tokens of one image", got, error=NotImplementedError)
        if self._given is None:
            assert self.mask is not None
            if self.mask.shape[1] != tokens or len(self.mask) not in (1, rows):
                expected = f"shape ({tokens},) or ({rows}, {tokens})"
                fail(_OP, "foreground", expected, tuple(self.mask.shape))
            self.mask = self.mask.to(device).expand(rows, -1)
        else:
            if len(self._given) not in (1, rows):
                fail(_OP, "words", f"one pair, or {rows} for the images", len(self._given))
            if max(end for _, end in self._given) > text:
                fail(_OP, "words", f"numbers of tokens up to the text's {text}", list(self._given))
            self._words = mark_words(torch.tensor(self._given, device=device).expand(rows, 2), text)
            if self.mask is not None and self.mask.shape != (rows, tokens):
                self.mask = None  # of another search, where points are set by hand
        timesteps = self.pipe.scheduler.timesteps.tolist()
        if self._phase == "keep":
            self._identity_grid, self._timesteps = self._grid, timesteps
            return
        assert self.identity_mask is not None
        self.identity_mask = self.identity_mask.to(device)
        if self.background and self._grid != self._identity_grid:
            hint = "frames of the identity's size, or background=False"
            fail(_OP, "pipe", f"frames of {self._identity_grid} tokens", self._grid, hint)
        same_size = math.prod(self._grid) == math.prod(self._identity_grid)  # schedules may depend on the size
        if len(timesteps) != len(self._timesteps) or (same_size and timesteps != self._timesteps):
            expected = f"the {len(self._timesteps)} timesteps of the identity image"
            fail(_OP, "steps", expected, f"{len(timesteps)} other ones", "take equal schedules")
        if self._phase == "read" and self.points is not None and self.points.token.shape != (rows, tokens):
            shape = tuple(self.points.token.shape)
            fail(_OP, "points", f"points of {rows} frames with {tokens} tokens", shape)

    def _merged(self, name: str) -> float:
        """The weight of merging in this step and layer."""
        return self.merge[self._step] if self._step < len(self.merge) and name in self.foreground_layers else 0.0

    def _kept_task(self, name: str, text: int) -> Task | None:
        step = self._step
        keys = step in self.steps and (self.background or name in self.foreground_layers)
        out = step == self.point_step or (step in self.steps and self._merged(name) > 0)
        words = self._words if step == self.point_step else None
        return Task(text, keys, out, self.kept_on, words) if keys or out else None

    def _frame_task(self, name: str, text: int) -> Task | None:
        step = self._step
        words = self._words if step <= self.point_step else None
        task = Task(text, keeps_out=step == self.point_step, words=words)
        reads = self._phase == "read" and name in self.foreground_layers, self.background
        if step in self.steps and any(reads) and self.mask is not None:
            if name not in self.kept.get(step, {}):
                kept = f"{min(self.kept)} to {max(self.kept)}" if self.kept else "none"
                fail(_OP, "steps", f"step {step} of the identity image", f"kept ones: {kept}", "take equal schedules")
            task = task._replace(routing=self._routing(reads, text), identity=self.kept[step][name])
            if reads[0] and self._merged(name) > 0:
                weight = torch.full((), self._merged(name), device=self.mask.device)
                task = task._replace(points=self.points, merge=weight)
        return task if task.keeps_out or task.words is not None or task.routing is not None else None

    def _routing(self, reads: tuple[bool, bool], text: int) -> FrameRouting:
        """Of layers that read the foreground, the background, built once while masks and points stay."""
        if reads not in self._routings:
            assert self.mask is not None and self.identity_mask is not None
            points = self.points if reads[0] else None
            self._routings[reads] = route_frame(text, self.mask, points, ~self.identity_mask if reads[1] else None)
        return self._routings[reads]

    @torch.no_grad()
    def _after_pass(self, model: nn.Module, args: tuple, out: object) -> None:
        """Collect what the layers found."""
        if self._phase is None:
            return
        found = self._processors
        if self._phase == "keep":
            self.kept[self._step] = {name: x.kept for name, x in found.items() if x.kept is not None}
        shares = [x.share for x in found.values() if x.share is not None]
        if shares:
            assert self._words is not None
            share = torch.stack([x.to(shares[0].device) for x in shares]).mean(0)
            self.mask, self._routings = foreground_of(share, self._words, self._grid), {}
        if self._phase != "keep" and self._step == self.point_step:
            self._find_points()

    def _find_points(self) -> None:
        assert self.mask is not None and self.identity_mask is not None
        frames = {name: x.kept.out for name, x in self._processors.items() if x.kept is not None}
        identity = self.kept[self.point_step]
        features = [x for x in frames.values() if x is not None]
        others = [y.to(features[0].device) for y in (identity[name].out for name in frames) if y is not None]
        self.points = match_points(features, others, self.mask, self.identity_mask, self.threshold)
        self._routings = {}
        if self._phase == "search":
            self.pipe._interrupt = True


def _flux_layers(pipe: DiffusionPipeline) -> dict[str, FluxAttention]:
    model = getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module) or not hasattr(getattr(pipe, "scheduler", None), "step_index"):
        fail(_OP, "pipe", "a Flux pipeline", type(pipe).__name__)
    try:
        layers = joint_attention_layers(model)
    except ValueError:
        fail(_OP, "pipe", "a transformer of Flux with its stock processors", type(model).__name__)
    for layer in layers.values():
        if not isinstance(layer, FluxAttention):
            fail(_OP, "pipe", "a transformer of Flux", f"{type(model).__name__} with {type(layer).__name__}")
    return layers


def _checked(argument: str, names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """The names in the order of execution."""
    check_sequence(_OP, argument, names)
    for name in names:
        if name not in known:
            fail(_OP, argument, f"names of layers such as {next(iter(known), None)!r}", repr(name))
    if not names:
        fail(_OP, argument, "at least one layer", "none")
    return [name for name in known if name in names]


def _pairs(words: Any) -> list[tuple[int, int]]:
    expected = "(tokens of the background, end of the words), with 0 < the first < the second, or a list of them"
    if not isinstance(words, Sequence):
        fail(_OP, "words", expected, repr(words))
    one = len(words) == 2 and not any(isinstance(x, Sequence) for x in words)
    pairs = [check_pair(_OP, "words", pair, 1, expected) for pair in ([words] if one else words)]
    if not pairs or any(first >= end for first, end in pairs):
        fail(_OP, "words", expected, repr(words))
    return pairs
