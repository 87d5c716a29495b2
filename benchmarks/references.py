"""Cached references in a transformer's joint attention, at the size of Flux.2 klein 9B: 32 heads of 128 channels.

One layer, in every step but the first: the queries of text and image read their own keys and those of one, two or four
references. Stock diffusers concatenates; here the cache, or an 8-bit bank, is a source of its own. And a whole small
pipeline: a call with reference images, and a further prompt from a bank.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lr_kernels import Source, multi_source_attention, quantize, reference
from lr_kernels.testing import assert_matches

from .attention import sdpa
from .harness import DTYPES, OURS, Contender, Problem, checked_error, relative_error

HEADS, HEAD_DIM = 32, 128
TEXT, IMAGE = 512, 4096
"""Tokens of a prompt and of a megapixel, of a target or of a reference"""
REFERENCES = (1, 2, 4)
CHECKED = 32
"""Queries whose results are compared with float64."""
EIGHT_BITS = f"{OURS}, 8-bit references"
JOINED = "concatenated before"
"""The copies are left out: what no cache with one tensor of keys can fall below."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def problems(dtypes: Sequence[str]) -> list[Callable[[], list[Problem]]]:
    """On the CPU, at a quarter of the tokens: one builder per number of references and dtype; then the pipeline's, in
    bf16."""
    counts = [(count, dtype) for count in REFERENCES for dtype in dtypes]
    layers = [functools.partial(_layer, count, dtype) for count, dtype in counts]
    return [*layers, _pipeline] if "bf16" in dtypes else layers


def _layer(count: int, dtype: str) -> list[Problem]:
    return [layer(count, dtype, {"SDPA": sdpa}, part=4)]


def layer(
    count: int, dtype: str, peers: Mapping[str, Attend], *, part: int, device: str = "cpu", backend: str = "auto"
) -> Problem:
    """Attention of a layer that reads `count` references; `part`: of the tokens of a megapixel, the denominator.

    peers: attention of one tensor of keys, (B, N, H, D).
    """
    generator = torch.Generator(device=device).manual_seed(0)
    text, own, cached = TEXT // part, (TEXT + IMAGE) // part, count * IMAGE // part

    def randn(tokens: int) -> Tensor:
        shape = (1, tokens, HEADS, HEAD_DIM)
        return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

    query, key, value, key_ref, value_ref = randn(own), randn(own), randn(own), randn(cached), randn(cached)
    (key8, key_scale), (value8, value_scale) = quantize(key_ref), quantize(value_ref)
    whole = [Source(key, value), Source(key_ref, value_ref)]
    small = [whole[0], Source(key8, value8, key_scale=key_scale, value_scale=value_scale)]

    def concatenated() -> list[Tensor]:
        pairs = ((key, key_ref), (value, value_ref))
        return [torch.cat([x[:, :text], y, x[:, text:]], 1) for x, y in pairs]

    joined = concatenated()
    contenders: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(multi_source_attention, query, sources, backend=backend)
        for name, sources in ((OURS, whole), (EIGHT_BITS, small))
    }
    for name, attend in peers.items():
        contenders[f"cat + {name}"] = lambda attend=attend: attend(query, *concatenated())
        contenders[f"{name}, {JOINED}"] = lambda attend=attend: attend(query, *joined)

    some = torch.linspace(0, own - 1, CHECKED).long().to(device)

    def exact(sources: Sequence[Source], precision: torch.dtype) -> Tensor:
        def cast(x: Tensor) -> Tensor:
            return x.to(precision) if x.dtype == DTYPES[dtype] else x

        moved = [s._replace(key=cast(s.key), value=cast(s.value)) for s in sources]
        return reference.multi_source_attention(query[:, some].to(precision), moved)

    results = {
        name: [exact(sources, precision) for precision in (DTYPES[dtype], torch.float64)]
        for name, sources in ((OURS, whole), (EIGHT_BITS, small))
    }

    def error(name: str, result: Tensor) -> float:
        """Checked against what the contender's keys and values stand for; that of 8 bits counts against the others."""
        checked_error(name, result[:, some], *results.get(name, results[OURS]))
        return relative_error(result[:, some], results[OURS][1])

    return Problem(
        op="cached references",
        layer=f"{count} x {IMAGE // part} tokens",
        model="klein 9B" if part == 1 else f"klein 9B, 1/{part} of the tokens",
        shape=f"{own}x{HEADS}x{HEAD_DIM}",
        dtype=dtype,
        flops=4.0 * HEADS * HEAD_DIM * own * (own + cached),
        contenders={name: Contender(call) for name, call in contenders.items()},
        error=error,
        baseline="cat + SDPA",
    )


SIDE, STEPS, IMAGES = 512, 4, 2
"""Pixels of a side of target and references, steps, and references of the pipeline's calls"""


def _pipeline() -> list[Problem]:
    """Calls of Flux2KleinKVPipeline with six layers of 8 x 128 and random weights; prompts are embeddings."""
    import PIL.Image
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinKVPipeline,
        Flux2Transformer2DModel,
    )
    from torch.utils.flop_counter import FlopCounterMode

    from lr_kernels.diffusers import extract_references, use_cached_references

    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=4, attention_head_dim=HEAD_DIM, num_attention_heads=8,
        joint_attention_dim=256, axes_dims_rope=(32, 32, 32, 32), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16,) * 4, layers_per_block=1, latent_channels=16, norm_num_groups=4,
    )  # fmt: skip
    noise = torch.randint(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=torch.uint8)
    images = [PIL.Image.fromarray(x.numpy()) for x in noise]
    prompt = torch.randn(1, TEXT // 4, 256)

    def build(dtype: torch.dtype) -> Flux2KleinKVPipeline:
        models = (copy.deepcopy(x).to(dtype).eval() for x in (vae, transformer))
        pipe = Flux2KleinKVPipeline(FlowMatchEulerDiscreteScheduler(), next(models), None, None, next(models))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(pipe: Flux2KleinKVPipeline, image: list | None = None) -> Tensor:
        return pipe(
            image=image, prompt_embeds=prompt.to(pipe.transformer.dtype), height=SIDE, width=SIDE,
            num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip

    truth = call(build(torch.float32), images).double()
    pipe = build(torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        low = call(pipe, images)
    bank = extract_references(pipe, images)

    def in_place() -> Tensor:
        with use_cached_references(pipe.transformer):
            return call(pipe, images)

    def further() -> Tensor:
        with use_cached_references(pipe.transformer, bank):
            return call(pipe)

    def first() -> Tensor:
        with use_cached_references(pipe.transformer, extract_references(pipe, images)):
            return call(pipe)

    def error(name: str, result: Tensor) -> float:
        assert_matches(result, low, truth, name)
        return relative_error(result, truth)

    contenders = {
        OURS: further,
        f"{OURS}, first prompt": first,
        f"{OURS}, cache read in place": in_place,
        "stock": functools.partial(call, pipe, images),
    }
    problem = Problem(
        op="cached references",
        layer="pipeline, further prompt",
        model=f"klein with 6 layers, {IMAGES} references",
        shape=f"{SIDE}x{SIDE}, {STEPS} steps",
        dtype="bf16",
        flops=float(counter.get_total_flops()),
        contenders={name: Contender(run) for name, run in contenders.items()},
        error=error,
    )
    return [problem]
