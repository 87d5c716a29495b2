"""What is computed on several cards and on one: a call of the backend, whole models, models whose layers read more than
their own tokens. Most are functions of a dtype and of the degrees of parallelism, none on one card."""

import copy
import functools
import os
import re
from pathlib import Path
from unittest import mock

import tiny_flux
import tiny_flux2
import torch
from diffusers import (
    ContextParallelConfig,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    ParallelConfig,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn
from plain_flux import image_ids
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh

from lr_kernels import Source, reference
from lr_kernels.diffusers import (
    Regions,
    TransformerReferenceBank,
    install_processors,
    joint_attention,
    joint_attention_layers,
    joint_processors,
    regional_joint_attention,
    register_attention_backend,
    retouch_layers,
    retouch_processors,
    route_joint,
    shared_joint_attention,
    use_cached_references,
)
from lr_kernels.diffusers.dit.cached.bank import model_of
from lr_kernels.diffusers.dit.cached.install import reference_layers
from lr_kernels.diffusers.dit.flux.attention import offset_rotary, take_maps
from lr_kernels.diffusers.dit.flux.maps import WordMaps
from lr_kernels.diffusers.subjects.subject import SubjectTokens

GRID, TEXT, HEADS = (4, 4), 8, 4


def config(ring=1, ulysses=1, **options):
    """For `enable_parallelism`, on the CPUs of this group of processes."""
    mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    return ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh, **options)


def parallel_config(**degrees):
    """As `enable_parallelism` hands it to the processors."""
    found = ParallelConfig(context_parallel_config=(of_cards := config(**degrees)))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    found.setup(rank, world, torch.device("cpu"), mesh=of_cards.mesh)
    return found


def parallelized(model, **degrees):
    """A copy of the model after `enable_parallelism`; on one card, without degrees, the copy."""
    model = copy.deepcopy(model)
    register_attention_backend()
    model.set_attention_backend("lr_kernels")
    if degrees:
        model.enable_parallelism(config=config(**degrees))
    return model


# A call of the backend.


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own_part(x, dim=1):
    """This card's part of a tensor."""
    return x.tensor_split(distributed.get_world_size(), dim)[distributed.get_rank()]


def tensors(dtype, tokens, keys, heads):
    """Query, key, value, and the gradient of the result; logits differ enough for the softmax to choose."""
    sizes = (tokens, keys, keys, tokens)
    return [randn(2, n, heads, 16, seed=i).mul(1.5).to(dtype) for i, n in enumerate(sizes)]


def key_mask(keys):
    """The padding of two rows."""
    return torch.arange(keys)[None] < torch.tensor([[keys - 5], [keys // 2]])


def attended(dtype, mask=None, tokens=16, keys=16, heads=HEADS, gradients=True, autocast=False):
    """On one card, by the specification; autocast: of the numbers that it makes of them."""
    given = tensors(torch.bfloat16 if autocast else dtype, tokens, keys, heads)
    query, key, value, grad = (x.to(dtype) for x in given)
    for x in (query, key, value):
        x.requires_grad_()
    source = Source(key, value, key_mask=None if mask is None else key_mask(keys))
    out, lse = reference.multi_source_attention(query, [source], return_lse=True)
    return results(out, lse, (query, key, value), grad if gradients else None)


def results(out, lse, inputs, grad):
    found = {"out": out.detach(), "lse": lse.detach()}
    if grad is not None:
        found |= zip(("query", "key", "value"), torch.autograd.grad(out, inputs, grad))
    return found


MASKS = {
    "of this card's keys": lambda mask: own_part(mask)[:, None, None],
    "of all keys": lambda mask: mask[:, None, None],
    "floats": lambda mask: torch.where(mask, 0.0, -torch.inf)[:, None, None],
    "written out for each head": lambda mask: own_part(mask)[:, None, None].repeat(1, HEADS, 1, 1),
    "of all keys, for each head": lambda mask: mask[:, None, None].repeat(1, HEADS, 1, 1),
    "expanded over heads and queries": lambda mask: own_part(mask)[:, None, None].expand(-1, HEADS, 5, -1),
}


def attended_here(dtype, parallel, mask=None, tokens=16, keys=16, heads=HEADS, gradients=True, autocast=False):
    """This card's part, by the backend; autocast: from float32 to bf16, with the bits of a call in bf16."""
    out, lse, inputs, grad = forward_here(dtype, parallel, mask, tokens, keys, heads, gradients)
    found = results(out, lse, inputs, grad if gradients else None)
    if autocast:
        with torch.autocast("cpu", dtype):
            out, lse, inputs, grad = forward_here(torch.float32, parallel, mask, tokens, keys, heads, gradients)
        cast = results(out, lse, inputs, grad.to(dtype))
        assert all(torch.equal(cast[name], x.to(cast[name].dtype)) for name, x in found.items())
    return found


def forward_here(dtype, parallel, mask, tokens, keys, heads, gradients):
    query, key, value, grad = (own_part(x) for x in tensors(dtype, tokens, keys, heads))
    for x in (query, key, value):
        x.requires_grad_(gradients)
    mask = None if mask is None else MASKS[mask](key_mask(keys))
    found = dispatch_attention_fn(
        query, key, value, attn_mask=mask, attention_kwargs={"return_lse": True}, backend="lr_kernels",
        parallel_config=parallel,
    )  # fmt: skip
    alone = dispatch_attention_fn(query, key, value, mask, backend="lr_kernels", parallel_config=parallel)
    assert torch.equal(alone, found[0])
    return *found, (query, key, value), grad


# Whole models.


def lively(model):
    """Attention that changes something: gates and logits of a new model are nearly 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(x in name for x in ("modulation", "mod.1", "norm1.linear", "norm1_context.linear", "norm.linear")):
                parameter.mul_(3)
            if any(x in name for x in ("norm_q", "norm_added_q")):
                parameter.mul_(3)
    return model.eval()


@functools.cache
def flux(dtype=torch.float32):
    torch.manual_seed(0)
    return lively(FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=HEADS, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).to(dtype))  # fmt: skip


@functools.cache
def flux2(dtype=torch.float32):
    torch.manual_seed(0)
    return lively(Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=HEADS, joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).to(dtype))  # fmt: skip


@functools.cache
def wan(dtype=torch.float32):
    torch.manual_seed(0)
    return lively(WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=16, ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).to(dtype))  # fmt: skip


@functools.cache
def qwen_image(dtype=torch.float32):
    torch.manual_seed(0)
    return lively(QwenImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    ).to(dtype))  # fmt: skip


def inputs(build, dtype, grid=GRID, text=TEXT, rows=2, padded=True):
    """Of a call; padded: the second prompt of Qwen-Image is three tokens shorter."""
    count = grid[0] * grid[1]
    found = {"encoder_hidden_states": randn(rows, text, 32, seed=1, dtype=dtype)}
    found["timestep"] = torch.linspace(1, 0.5, rows).to(dtype)
    image = {"hidden_states": randn(rows, count, 4, seed=2, dtype=dtype)}
    if build is wan:
        found["timestep"] = torch.tensor([500, 300])
        return found | {"hidden_states": randn(rows, 4, 2, 8, 8, seed=2, dtype=dtype)}
    if build is flux:
        ids = {"img_ids": image_ids(*grid), "txt_ids": torch.zeros(text, 3)}
        return found | image | ids | {"pooled_projections": randn(rows, 32, seed=3, dtype=dtype)}
    if build is flux2:
        places = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).float()
        img_ids = torch.nn.functional.pad(places, (1, 1))[None].expand(rows, -1, -1)
        txt_ids = torch.nn.functional.pad(torch.arange(text)[:, None].float(), (3, 0))[None].expand(rows, -1, -1)
        return found | image | {"img_ids": img_ids, "txt_ids": txt_ids}
    mask = torch.ones(rows, text, dtype=torch.bool)
    mask[1, text - 3 :] = False
    return found | image | {
        "img_shapes": [[(1, *grid)]] * rows, "encoder_hidden_states_mask": mask if padded else None,
    }  # fmt: skip


def trained(model, given):
    """The model's output, and gradients of its inputs and of two weights; on several cards each has a part of them."""
    given = dict(given)
    wanted = {n: given[n].requires_grad_() for n in ("hidden_states", "encoder_hidden_states")}
    wanted |= {n: p for n, p in model.named_parameters() if n.endswith(("to_q.weight", "to_k.weight"))}
    (out,) = model(**given, return_dict=False)
    grad = randn(*out.shape, seed=9, dtype=out.dtype)
    found = torch.autograd.grad(out, wanted.values(), grad, allow_unused=True)
    parts = {n: x for n, x in zip(wanted, found) if x is not None}
    return {"out": out.detach(), **parts}


def stock(dtype, build, checkpointing=False, gradients=True, **arguments):
    """On one card, as diffusers computes it."""
    model = copy.deepcopy(build(dtype))
    return run_model(model, inputs(build, dtype, **arguments), gradients)


def spread(dtype, degrees, build, checkpointing=False, gradients=True, **arguments):
    """On this card of several."""
    model = parallelized(build(dtype), **degrees)
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    return run_model(model, inputs(build, dtype, **arguments), gradients)


def run_model(model, given, gradients):
    if gradients:
        return trained(model, given)
    with torch.no_grad():
        return {"out": model(**given, return_dict=False)[0]}


# Layers that read more than their own tokens.


def with_function(dtype, degrees, build, function, gradients=True, later=False):
    """A model with a function of one's own; later: parallelism is switched on while it is installed, and what runs
    after its end is in "after"."""
    model = parallelized(build(dtype), **({} if later else degrees))
    layers = joint_attention_layers(model)
    with install_processors(layers, joint_processors(layers, function)):
        if later and degrees:
            model.enable_parallelism(config=config(**degrees))
        found = run_model(model, inputs(build, dtype), gradients)
    if later:
        found["after"] = run_model(model, inputs(build, dtype), False)["out"]
    return found


ROWS = torch.tensor([-1, 0], dtype=torch.int32)
SHARED = functools.partial(shared_joint_attention, rows=ROWS, text_tokens=TEXT)


def regions():
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :, :4] = masks[1, 3:] = True
    return Regions.from_masks(masks, (3, 3, 2), GRID)


def regional(text, image):
    return regional_joint_attention(text, image, regions())


IMAGES, REFERENCES = 1, 1


def retouched(dtype, degrees, layers=None):
    """Flux's retouch batch, and the maps of the subject's words in its double blocks."""
    model = parallelized(flux(dtype), **degrees)
    targets, shown = torch.zeros(IMAGES, *GRID, dtype=torch.bool), torch.zeros(REFERENCES, *GRID, dtype=torch.bool)
    targets[0, 1:3, 1:3] = shown[0, :2] = True
    offset = offset_rotary(model, (0.0, 0.0, 4.0), REFERENCES, torch.device("cpu"))
    routing = route_joint(targets, shown, GRID, TEXT, rotary=offset)
    subject = SubjectTokens(torch.tensor([[2, 3]], dtype=torch.int32), torch.full((1, 1, 2), 0.5))
    words, chosen = WordMaps(subject, GRID), retouch_layers(model, layers)
    with install_processors(chosen, processors := retouch_processors(chosen)), torch.no_grad():
        for name, processor in processors.items():
            processor.share(routing, words if name.startswith("transformer_blocks") else None)
        out = model(**inputs(flux, dtype, rows=2 * IMAGES + REFERENCES), return_dict=False)[0]
        return {"out": out} if layers else {"out": out, "maps": take_maps(words, processors.values())}


@functools.cache
def klein(dtype=torch.float32):
    """With the processors that Flux2KleinKVPipeline sets, and two heads."""
    return tiny_flux2.pipeline(dtype).transformer


def klein_inputs(dtype, rows=2):
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), torch.zeros(1))
    return {
        "hidden_states": randn(rows, 12, 16, seed=2, dtype=dtype),
        "encoder_hidden_states": randn(rows, 8, tiny_flux2.WIDTH, seed=1, dtype=dtype),
        "timestep": torch.tensor([0.7] * rows, dtype=dtype), "img_ids": ids[None].expand(rows, -1, -1),
        "txt_ids": torch.zeros(rows, 8, 4),
    }  # fmt: skip


def bank(dtype, eight_bits=None):
    """Random references for all rows; those in 8 bits are made of the same numbers in every dtype."""
    sources = {}
    for i, (name, layer) in enumerate(reference_layers(klein(dtype)).items()):
        shape = (1, 9, layer.heads, layer.head_dim)
        sources[name] = Source(randn(*shape, seed=20 + i), randn(*shape, seed=50 + i))
    found = TransformerReferenceBank(sources, model=model_of(klein(dtype)), ids=torch.zeros(9, 4))
    if eight_bits is not None:
        return found.quantized(eight_bits)
    cast = {name: x._replace(key=x.key.to(dtype), value=x.value.to(dtype)) for name, x in sources.items()}
    return TransformerReferenceBank(cast, model=found.model, ids=found.ids)


def from_bank(dtype, degrees, eight_bits=None):
    """Flux.2 klein with a bank of references."""
    model = parallelized(klein(dtype), **degrees)
    with use_cached_references(model, bank(dtype, eight_bits)), torch.no_grad():
        return {"out": model(**klein_inputs(dtype), return_dict=False)[0]}


def from_cache(dtype, degrees, mode="cached"):
    """Flux.2 klein with the model's own cache, which one card filled; "extract": which the pass fills."""
    first = klein_inputs(dtype) | {"kv_cache_mode": "extract", "num_ref_tokens": 4}
    with use_cached_references(copy_of := copy.deepcopy(klein(dtype))), torch.no_grad():
        _, cache = copy_of(**first, return_dict=False)
    model = parallelized(klein(dtype), **degrees)
    with use_cached_references(model), torch.no_grad():
        if mode == "extract":
            return {"out": model(**first, return_dict=False)[0]}
        given = klein_inputs(dtype) | {"kv_cache": cache, "kv_cache_mode": "cached"}
        return {"out": model(**given, return_dict=False)[0]}


def layout_and_retouch(dtype, degrees, kind="lora", **arguments):
    """The pipeline of Flux with both stages, on every card with the same noise."""
    pipe = tiny_flux.fresh(kind, **copy.deepcopy(tiny_flux.parts())).to(dtype)
    for name in ("transformer", "personalized_transformer"):
        if getattr(pipe, name) is not None:
            setattr(pipe, name, parallelized(getattr(pipe, name), **degrees))
    return {"out": tiny_flux.whole(pipe, **arguments, latents=tiny_flux.NOISE.to(dtype)).images}


def small_flux_pipeline():
    """diffusers' own, for pictures of 16 x 16."""
    pipe = FluxPipeline(**copy.deepcopy(tiny_flux.parts()), transformer=tiny_flux.transformer())
    pipe.default_sample_size = 8
    pipe.set_progress_bar_config(disable=True)
    return pipe


def last_velocity(pipe, run):
    """What the transformer says last in a run."""
    seen = []
    pipe.transformer.register_forward_hook(lambda model, args, out: seen.append(out[0].clone()))
    run()
    return {"out": seen[-1]}


def documented_script():
    """The script of docs/attention-backend.md, for a group of processes and a card that are there already."""
    page = (Path(__file__).parent.parent / "docs" / "attention-backend.md").read_text()
    (script,) = re.findall(r"^```py\n(import os\n.*?)^```", page, flags=re.M | re.S)
    pipe = small_flux_pipeline()
    pipe.to = lambda device: pipe
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=str(distributed.get_rank())),
        mock.patch("torch.cuda.set_device"),
        mock.patch("torch.distributed.init_process_group"),
        mock.patch("torch.distributed.destroy_process_group"),
        mock.patch.object(FluxPipeline, "from_pretrained", lambda *args, **kwargs: pipe),
    ):
        return last_velocity(pipe, lambda: exec(compile(script, "several_cards.py", "exec"), {}))


def compiled(dtype, degrees, function=None):
    """Flux as one graph, without gradients."""
    model = parallelized(flux(dtype), **degrees)
    layers = joint_attention_layers(model)
    torch._dynamo.reset()
    with install_processors(layers, joint_processors(layers, function)):
        whole = torch.compile(model, backend="aot_eager", fullgraph=True) if degrees else model
        return run_model(whole, inputs(flux, dtype), False)


FUNCTIONS = {"joint": joint_attention, "shared": SHARED, "regional": regional}


def refused_call(dtype, degrees, heads=HEADS, keys=16, key_heads=None, mask=None, needs=(), **arguments):
    """A call of the backend that it refuses; needs: the arguments that require a gradient."""
    query, key, value, grad = (own_part(x) for x in tensors(dtype, 16, keys, heads))
    if key_heads is not None:
        key, value = key[:, :, :key_heads], value[:, :, :key_heads]
    given = {"query": query, "key": key, "value": value}
    if mask is not None:
        given["attn_mask"] = own_part(key_mask(keys)).float()[:, None, None]
    for name in needs:
        given[name].requires_grad_()
    out = dispatch_attention_fn(**given, **arguments, backend="lr_kernels", parallel_config=parallel_config(**degrees))
    if isinstance(out, tuple):
        out[1].sum().backward()
    elif needs:
        torch.autograd.grad(out, [given[name] for name in needs], grad, create_graph=True)
    return {}


def one_kind(dtype, degrees):
    """Single blocks alone have a function: nothing tells them how many tokens are text."""
    model = parallelized(flux(dtype), **degrees)
    layers = {name: x for name, x in joint_attention_layers(model).items() if name.startswith("single")}
    with install_processors(layers, joint_processors(layers, SHARED)):
        return run_model(model, inputs(flux, dtype), False)
