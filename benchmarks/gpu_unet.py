"""Parts `layer` and `unet` of benchmarks/gpu.py: one self-attention layer with its projections, and a whole denoising
step of the retouch stage, with random weights at SD1.5's and SDXL's size, against processors as people write them
today.

Six rows: target, context and reference, unconditional and conditional; `route` says which keys each query reads.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lr_kernels import multi_source_attention
from lr_kernels.runtime.platform import interpreted

from .harness import OURS, relative_error

BATCH_ROWS = 6
REPLAYS = 20


class Model(NamedTuple):
    id: str
    config: dict
    latent: int
    """Side of the latents."""
    text: int
    """Width of the text embeddings."""


_SD15 = dict(sample_size=64, cross_attention_dim=768)  # all else is the default of UNet2DConditionModel
_SDXL = dict(
    sample_size=128, cross_attention_dim=2048, block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)  # fmt: skip
_TOY = dict(
    sample_size=8, cross_attention_dim=32, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=1,  # one head (diffusers' name for the head count), since the interpreter takes long per head
)  # fmt: skip


def models(dry: bool) -> list[Model]:
    if dry:
        return [Model("toy", _TOY, 8, 32)]
    return [Model("SD1.5", _SD15, 64, 768), Model("SDXL", _SDXL, 128, 2048)]


class Shared(NamedTuple):
    """What the layers of one token count read: the routing, and the same as row numbers and a dense mask."""

    routing: object
    own: Tensor
    reference: Tensor
    """(6,): 0 where there is none"""
    mask: Tensor
    """bool (6, 1, N, 2N)"""


def shared(latent: int, scales: tuple[int, ...], device: str) -> dict[int, Shared]:
    """A subject that covers 30 % of the target and of the reference, per number of tokens."""
    from lr_kernels.diffusers.processors.routing import BACKGROUND, OWN, RetouchBatch, route

    side = round(latent * 0.3**0.5)
    target, reference = (torch.zeros(1, latent, latent, dtype=torch.bool, device=device) for _ in range(2))
    target[:, :side, :side] = True
    reference[:, -side:, -side:] = True
    batch = RetouchBatch(images=1, context=True, guided=True)
    found = {}
    for scale in scales:
        grid = (latent // scale, latent // scale)
        routing = route(batch, target, reference, grid)
        own, other = (x.long() for x in routing.rows)
        sees_own = (routing.query_groups & (OWN | BACKGROUND)) != 0
        sees_other = (routing.query_groups[:, :, None] & routing.key_groups[1][:, None]) != 0
        sees_other = sees_other & (other >= 0)[:, None, None]
        mask = torch.cat([sees_own[:, :, None].expand(sees_other.shape), sees_other], 2)[:, None]
        found[grid[0] * grid[1]] = Shared(routing, own, other.clamp(min=0), mask)
    return found


def by_lr_kernels(query: Tensor, key: Tensor, value: Tensor, about: Shared) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    routing = about.routing
    backend = "triton" if q.is_cuda or interpreted() else "cpu"
    out = multi_source_attention(
        q, routing.sources(k, v), query_groups=routing.query_groups, plan=routing.plan, backend=backend
    )
    return out.transpose(1, 2)


def by_concatenation(query: Tensor, key: Tensor, value: Tensor, about: Shared) -> Tensor:
    """All rows at once: keys of both images side by side, and a dense mask."""
    keys, values = (torch.cat([x[about.own], x[about.reference]], 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=about.mask)


def by_two_passes(query: Tensor, key: Tensor, value: Tensor, about: Shared) -> Tensor:
    """As MasaCtrl does: one attention call for the background and one for the foreground of the targets, whose results
    are blended by the mask."""
    tokens, targets = query.shape[2], slice(None, None, 3)
    out = F.scaled_dot_product_attention(query, key[about.own], value[about.own])
    q = query[targets]
    keys, values = key[about.reference[targets]], value[about.reference[targets]]
    sees_reference = about.mask[targets][..., tokens:]
    foreground = sees_reference.any(-1, keepdim=True)
    key_mask = sees_reference.any(-2, keepdim=True)
    subject = F.scaled_dot_product_attention(q, keys, values, attn_mask=key_mask)
    out[targets] = torch.where(foreground, subject, out[targets])
    return out


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    OURS: by_lr_kernels,
    "cat + SDPA with masks": by_concatenation,
    "two passes (MasaCtrl)": by_two_passes,
}


def processor(attend: Callable[..., Tensor] | None, per_tokens: dict[int, Shared]) -> object:
    """A diffusers attention processor; None: stock, in which nothing is shared."""
    from lr_kernels.diffusers.processors.unet import StockAttnProcessor

    class Processor(StockAttnProcessor):
        def attend(self, query, key, value, attention_mask, is_cross):
            if is_cross or attend is None:
                return super().attend(query, key, value, attention_mask, is_cross)
            return attend(query, key, value, per_tokens[query.shape[2]])

    return Processor()


def build(model: Model, device: str, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**model.config).to(dtype).eval().requires_grad_(False)


def inputs(model: Model, device: str, dtype: torch.dtype) -> dict[str, object]:
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    found: dict[str, object] = {
        "sample": randn(BATCH_ROWS, 4, model.latent, model.latent),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": randn(BATCH_ROWS, 77, model.text),
    }
    if "addition_embed_type" in model.config:
        sizes = torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * BATCH_ROWS, device=device)
        found["added_cond_kwargs"] = {"text_embeds": randn(BATCH_ROWS, 1280), "time_ids": sizes}
    return found


def timed(call: Callable[[], Tensor], dry: bool) -> dict[str, str]:
    """ms of a replayed CUDA graph (the GPU's own time), ms of an eager call, MiB at its peak beyond what it returns."""
    if dry:
        return {"ms": "", "eager_ms": "", "peak_mib": ""}
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    eager = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        eager.append((time.perf_counter() - start) * 1e3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = (torch.cuda.max_memory_allocated() - before - kept) / 2**20
    del result
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    graph.reset()
    median = sorted(times)[len(times) // 2]
    return {"ms": f"{median:.4g}", "eager_ms": f"{sorted(eager)[2]:.4g}", "peak_mib": f"{peak:.1f}"}


def compare(
    about: dict[str, str], run: Callable[[Callable[..., Tensor] | None], Tensor], truth: Tensor, dry: bool
) -> Iterator[dict[str, str]]:
    """Rows of one case. What is further from the fp32 result than twice the concatenation in bf16 is not timed."""
    rows = {}
    allowed = 2 * relative_error(run(by_concatenation), truth)
    for name, attend in {**CONTENDERS, "nothing shared (stock)": None}.items():
        row = {**about, "contender": name, "not_run": ""}
        error = relative_error(run(attend), truth)
        row["error"] = f"{error:.2e}"
        if attend is not None and not error <= allowed:
            row["not_run"] = f"wrong: error {error:.2e} > {allowed:.2e}"
        else:
            row |= timed(lambda attend=attend: run(attend), dry)
            if dry:
                row["not_run"] = "dry run"
        rows[name] = row
    for row in rows.values():
        if row.get("ms") and rows[OURS].get("ms"):
            row["ours_is_faster"] = f"{float(row['ms']) / float(rows[OURS]['ms']):.2f}"
    yield from rows.values()


def _cases(device: str, dry: bool) -> Iterator[tuple[Model, nn.Module, nn.Module, dict[int, Shared]]]:
    """(model, its UNet in bf16, the same in fp32, what its layers share)"""
    for model in models(dry):
        unet = build(model, device, torch.float32)
        half = build(model, device, torch.bfloat16)
        half.load_state_dict(unet.state_dict())
        yield model, half, unet, shared(model.latent, (1, 2, 4, 8), device)


def layer(device: str, dry: bool) -> Iterator[dict[str, str]]:
    """The first self-attention layer of every token count."""
    from lr_kernels.diffusers.processors.install import layer_scale, select_layers

    for model, half, unet, per_tokens in _cases(device, dry):
        done = set()
        for name, attn in select_layers(half, "self").items():
            tokens = (model.latent // layer_scale(half, name)) ** 2
            if tokens in done:
                continue
            done.add(tokens)
            exact = unet.get_submodule(name)
            x = torch.randn(BATCH_ROWS, tokens, attn.to_q.in_features, device=device)
            rounded = x.bfloat16()

            def run(attend, attn=attn, x=rounded, per_tokens=per_tokens):
                attn.set_processor(processor(attend, per_tokens))
                return attn(x)

            with torch.no_grad():
                exact.set_processor(processor(by_concatenation, per_tokens))
                shape = f"{BATCH_ROWS} rows, {tokens}x{attn.heads}x{attn.to_q.out_features // attn.heads}"
                about = {"op": "self-attention layer", "model": model.id, "shape": shape, "dtype": "bf16"}
                yield from compare(about, run, exact(x), dry)


def unet(device: str, dry: bool) -> Iterator[dict[str, str]]:
    """A whole denoising step."""
    from lr_kernels.diffusers.processors.install import select_layers

    for model, half, whole, per_tokens in _cases(device, dry):
        given = inputs(model, device, torch.bfloat16)

        def run(attend, module=half, given=given, per_tokens=per_tokens):
            for attn in select_layers(module, "self").values():
                attn.set_processor(processor(attend, per_tokens))
            return module(**given, return_dict=False)[0]

        with torch.no_grad():
            truth = run(by_concatenation, whole, inputs(model, device, torch.float32))
            del whole
            shape = f"{BATCH_ROWS} rows, {model.latent}²"
            about = {"op": "denoising step", "model": model.id, "shape": shape, "dtype": "bf16"}
            yield from compare(about, run, truth, dry)
