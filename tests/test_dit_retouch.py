"""The retouch stage's attention in Flux: the transformer's output against a plain transcription with concatenated keys,
rotated at their new positions, and a dense mask; and what users can do wrong."""

import functools

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from model_changes import add_lora
from plain_flux import PlainRetouch, image_ids
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode

from lr_kernels.diffusers.dit.flux.attention import (
    FluxRetouchProcessor,
    offset_rotary,
    retouch_layers,
    retouch_processors,
    route_joint,
    take_maps,
)
from lr_kernels.diffusers.dit.flux.maps import WordMaps
from lr_kernels.diffusers.processors.install import install_processors
from lr_kernels.diffusers.subjects.subject import SubjectTokens, stretched
from lr_kernels.testing import assert_matches

TEXT, GRID, IMAGES, REFERENCES = 7, (4, 4), 2, 2
ROWS = 2 * IMAGES + REFERENCES
OFFSET = (0.0, 1.0, 4.0)


@functools.cache
def flux(dtype=torch.float32):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).to(dtype).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm_q" in name or "norm_added_q" in name:  # else attention is nearly even
                parameter.mul_(3)
    return model


def inputs(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    tokens = GRID[0] * GRID[1]
    found = {"hidden_states": randn(ROWS, tokens, 4), "encoder_hidden_states": randn(ROWS, TEXT, 32)}
    found |= {"pooled_projections": randn(ROWS, 32), "timestep": torch.full((ROWS,), 0.5, dtype=dtype)}
    return found | {"img_ids": image_ids(*GRID), "txt_ids": torch.zeros(TEXT, 3)}


def masks():
    targets, references = torch.zeros(IMAGES, *GRID, dtype=torch.bool), torch.zeros(REFERENCES, *GRID, dtype=torch.bool)
    targets[0, 1:3, 1:3] = targets[1, :, 2:] = True
    references[0, :2] = references[1, 2:, 1:] = True
    return targets, references


def run(processors=None, dtype=torch.float32, model=None, **changed):
    model = flux(dtype) if model is None else model
    stock = dict(model.attn_processors)
    try:
        if processors is not None:
            model.set_attn_processor(processors)
        with torch.no_grad():
            return model(**{**inputs(dtype), **changed}, return_dict=False)[0]
    finally:
        model.set_attn_processor(stock)


def routed(dtype=torch.float32, offset=OFFSET, model=None, own_keys=True, with_masks=None):
    rotary = offset_rotary(model or flux(dtype), offset, REFERENCES, torch.device("cpu"))
    return route_joint(*(with_masks or masks()), GRID, TEXT, own_keys=own_keys, rotary=rotary)


def sharing(*args, **kwargs):
    processor = FluxRetouchProcessor()
    processor.share(routed(*args, **kwargs))
    return processor


def plain_with(own_keys=True, offset=OFFSET, **choice):
    return PlainRetouch(*masks(), TEXT, own_keys=own_keys, offset=offset, **choice)


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("offset", [OFFSET, (0.0, 0.0, 0.0)])
@pytest.mark.fault(number=1)
def test_a_routed_pass_matches_a_transcription(own_keys, offset):
    plain = plain_with(own_keys, offset)
    found = run(sharing(own_keys=own_keys, offset=offset))
    assert_matches(found, run(plain), run(plain, torch.float64))
    assert not torch.allclose(found[:IMAGES], run()[:IMAGES], atol=1e-3)


def tokens_of(rows):
    """Two tokens of a word in the prompts of some rows; of the second prompt one."""
    indices = torch.tensor([[2, 3], [5, 0], [1, 4], [3, 3], [0, 6], [2, 5]], dtype=torch.int32)[:rows]
    weights = torch.full((1, rows, 2), 0.5)
    weights[0, 1] = torch.tensor([1.0, 0.0])
    return SubjectTokens(indices, weights)


@pytest.mark.parametrize("routes", [True, False])
@pytest.mark.fault(number=1)
def test_maps_are_the_probabilities_of_the_subjects_words(routes):
    """In a double block, against softmax over concatenated keys; the layer's own result stays as it was."""
    model = flux()
    rows = IMAGES if routes else ROWS
    words = WordMaps(tokens_of(rows), GRID)
    plain, exact = (plain_with(routes=routes, words=tokens_of(rows)) for _ in range(2))
    layers = retouch_layers(model, "transformer_blocks")
    with install_processors(layers, processors := retouch_processors(layers)):
        for processor in processors.values():
            processor.share(routed() if routes else None, words)
        found = run(model=model)
    maps = take_maps(words, processors.values())
    assert maps.shape == (1, rows, *GRID)
    every = {
        name: plain if name.startswith("transformer_blocks") else FluxAttnProcessor() for name in model.attn_processors
    }
    low = run(every)
    every = {
        name: exact if name.startswith("transformer_blocks") else FluxAttnProcessor() for name in model.attn_processors
    }
    high = run(every, torch.float64)
    assert_matches(found, low, high)
    assert_matches(maps[0], stretched(plain.maps.unflatten(1, GRID)), stretched(exact.maps.unflatten(1, GRID)))
    with pytest.raises(RuntimeError, match="transformer: expected layers that compute their attention, got none"):
        take_maps(words, processors.values())


def test_the_other_rows_stay_stock_and_each_choice_counts():
    stock, found = run(), run(sharing())
    assert_matches(found[IMAGES:], stock[IMAGES:], run(dtype=torch.float64)[IMAGES:])
    for other in (sharing(own_keys=False), sharing(offset=(0.0, 0.0, 0.0)), sharing(offset=(1.0, 0.0, 0.0))):
        assert not torch.allclose(run(other)[:IMAGES], found[:IMAGES], atol=1e-4)


def test_only_the_references_foreground_and_the_contexts_of_the_background_are_read():
    """A change of what no target reads changes no target; with one layer, as deeper ones see their neighbours."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=0, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip
    targets, references = masks()
    before = run(sharing(model=model), model=model)
    x = inputs()["hidden_states"]
    hidden = x.clone()
    hidden[2 * IMAGES :][~references.flatten(1)] += 1
    assert torch.equal(run(sharing(model=model), model=model, hidden_states=hidden)[:IMAGES], before[:IMAGES])
    hidden = x.clone()
    hidden[2 * IMAGES :] += 1
    after = run(sharing(model=model), model=model, hidden_states=hidden)[:IMAGES]
    changed = (after != before[:IMAGES]).any(-1)
    assert torch.equal(changed, targets.flatten(1))
    hidden = x.clone()
    hidden[IMAGES : 2 * IMAGES] += 1
    after = run(sharing(model=model), model=model, hidden_states=hidden)[:IMAGES]
    assert torch.equal((after != before[:IMAGES]).any(-1), ~targets.flatten(1))


def test_without_a_routing_it_is_stock_bit_for_bit():
    assert torch.equal(run(FluxRetouchProcessor()), run())
    processor = sharing()
    processor.share(None)
    assert torch.equal(run(processor), run())
    processor = sharing()
    processor.make_stock()
    assert torch.equal(run(processor), run())
    assert not isinstance(processor, torch.nn.Module)


def test_bfloat16_is_as_exact_as_the_transcription():
    plain = plain_with()
    found = run(sharing(torch.bfloat16), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert_matches(found, run(plain, torch.bfloat16), run(plain, torch.float64))


def test_a_lora_and_a_chosen_layer_take_part():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**flux().config).eval()
    model.load_state_dict(flux().state_dict())
    add_lora(model)
    layers = retouch_layers(model, ["single_transformer_blocks"])
    assert list(layers) == ["single_transformer_blocks.0.attn"]
    processors = retouch_processors(layers)
    with install_processors(layers, processors):
        for processor in processors.values():
            processor.share(routed())
        found = run(model=model)
    stock = run(model=model)
    assert torch.allclose(found[IMAGES:], stock[IMAGES:], atol=1e-5)
    assert not torch.allclose(found[:IMAGES], stock[:IMAGES], atol=1e-4)
    assert not torch.allclose(found[:IMAGES], run(sharing())[:IMAGES], atol=1e-4)


def test_the_processors_keep_the_attention_backend():
    model = flux()
    layers = retouch_layers(model)
    first = next(iter(layers.values()))
    first.processor._attention_backend = "native"
    try:
        found = retouch_processors(layers)
    finally:
        del first.processor._attention_backend
    assert [p._attention_backend for p in found.values()] == ["native", None]


def test_compiled_without_graph_breaks():
    torch._dynamo.reset()
    model, words, plain = flux(), WordMaps(tokens_of(IMAGES), GRID), plain_with()
    layers = retouch_layers(model)
    try:
        with install_processors(layers, processors := retouch_processors(layers)), torch.no_grad():
            for name, processor in processors.items():
                processor.share(routed(), words if name.startswith("transformer_blocks") else None)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            found = compiled(**inputs(), return_dict=False)[0]
    finally:
        torch._dynamo.reset()
    assert_matches(found, run(plain), run(plain, torch.float64))
    assert take_maps(words, processors.values()).shape == (1, IMAGES, *GRID)


def test_compiled_blocks_need_no_more_graphs_than_stock_ones():
    """Neither do further blocks of a kind, nor other steps, whose masks are others."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**flux().config, "num_layers": 6, "num_single_layers": 2}).eval()
    layers, words, counter = retouch_layers(model), WordMaps(tokens_of(IMAGES), GRID), CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    routing = routed(model=model)
    run(model=model)
    stock = counter.frame_count
    try:
        with install_processors(layers, processors := retouch_processors(layers)):
            for mask in (masks()[0], ~masks()[0]):
                routing = routing.for_targets(mask, GRID)
                for name, processor in processors.items():
                    processor.share(routing, words if name.startswith("transformer_blocks") else None)
                run(model=model)
                assert take_maps(words, processors.values()).shape == (1, IMAGES, *GRID)
    finally:
        torch._dynamo.reset()
    assert counter.frame_count <= 2 * stock


def test_other_targets_need_no_look_at_the_gpu():
    """Their routing is that of a new one; on fake tensors every look at a number is an error."""
    targets, references = masks()
    routing = routed()
    found = routing.for_targets(~targets, GRID)
    whole = routed(with_masks=(~targets, references))
    assert torch.equal(found.query_groups, whole.query_groups) and not found.query_groups.equal(routing.query_groups)
    for x, y in zip(found.plan[:-1], whole.plan[:-1], strict=True):
        pairs = zip(x, y, strict=True) if isinstance(x, tuple) else [(x, y)]
        assert all(a is b is None or torch.equal(a, b) for a, b in pairs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = routing.for_targets(torch.ones(IMAGES, *GRID, dtype=torch.bool), GRID)
    assert fake.query_groups.shape == routing.query_groups.shape


@pytest.mark.fault(number=16)
def test_context_parallelism_is_refused_while_sharing():
    processor = sharing()
    processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match=r"FluxRetouchProcessor: _parallel_config: expected None"):
        run(processor)


@pytest.mark.fault(number=16)
def test_bad_input_is_named():
    targets, references = masks()
    with pytest.raises(ValueError, match="route_joint: reference_mask: expected a foreground in each reference"):
        route_joint(targets, torch.zeros_like(references), GRID, TEXT)
    with pytest.raises(ValueError, match="reference_mask: expected 1 to 13 references, got 14"):
        route_joint(targets, references[:1].expand(14, -1, -1), GRID, TEXT)
    with pytest.raises(ValueError, match=r"token_mask: mask: expected shape \(B, height, width\)"):
        route_joint(targets[0], references, GRID, TEXT)
    with pytest.raises(ValueError, match="retouch_layers: expected beginnings of layer names"):
        retouch_layers(flux(), [3])
    with pytest.raises(ValueError, match="got 'down_blocks'"):
        retouch_layers(flux(), "down_blocks")
    with pytest.raises(ValueError, match="model: expected one with the attention of Flux"):
        retouch_layers(torch.nn.Linear(2, 2))
