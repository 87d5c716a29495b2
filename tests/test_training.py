"""Attention as people train with it: checkpoints, gradients of gradients, torch.func, tensors changed in between, and a
UNet with a LoRA."""

import contextlib
import functools

import peft
import pytest
import tiny_models
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lr_kernels import (
    Source,
    adain,
    attention_with_token_maps,
    correspondence,
    merge_attention_states,
    multi_source_attention,
    plan_attention,
    step_blend,
    subject_mask,
)
from lr_kernels.diffusers import (
    AttentionState,
    CustomAttnProcessor,
    MultiSourceAttnProcessor,
    RetouchBatch,
    install_processors,
    route,
    select_layers,
)
from lr_kernels.runtime.schemas import COLUMNS
from lr_kernels.testing import assert_matches

QUERY, KEY, VALUE = (torch.randn(2, n, 2, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 6))
VALUE = VALUE[:, :5]


def masked_sources(key, value):
    """Two softmax groups with a mask, groups of queries, a weight and a row table; and their plan."""
    mask = torch.tensor([[True, False, True, True, True]])
    bits = torch.tensor([[1, 2, 3, 1, 2]], dtype=torch.uint8)
    sources = [
        Source(key, value, torch.tensor([1, 0]), key_mask=mask),
        Source(key, value, key_groups=bits, softmax_group=1, weight=torch.full((2, 3), 0.7)),
    ]
    groups = torch.tensor([[1, 2, 1]], dtype=torch.uint8)
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], groups)
    return sources, {"query_groups": groups, "plan": plan}


# ---- gradient checkpointing ----


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=28)
def test_checkpoints_change_no_gradient(backend, grouped, reentrant, nested):
    def layer(query, key, value):
        sources, options = masked_sources(key, value) if grouped else ([Source(key, value)], {})
        return multi_source_attention(query, sources, backend=backend, **options).square()

    def two_layers(query, key, value, inner=layer):
        return layer(inner(query, key, value), key, value)

    leaves = [x.clone().requires_grad_() for x in (QUERY, KEY, VALUE)]
    expected = torch.autograd.grad(two_layers(*leaves).sum(), leaves)
    inner = functools.partial(checkpoint, layer, use_reentrant=reentrant) if nested else layer
    checkpoint(two_layers, *leaves, inner, use_reentrant=reentrant).sum().backward()  # reentrant: not autograd.grad
    for x, wanted in zip(leaves, expected):  # autograd adds the parts of nested reentrant ones in another order
        torch.testing.assert_close(x.grad, wanted)


@pytest.mark.fault(number=28)
def test_saved_tensors_may_wait_elsewhere():
    leaves = [x.clone().requires_grad_() for x in (QUERY, KEY, VALUE)]
    expected = torch.autograd.grad(multi_source_attention(leaves[0], [Source(*leaves[1:])]).square().sum(), leaves)
    with torch.autograd.graph.save_on_cpu():
        out = multi_source_attention(leaves[0], [Source(*leaves[1:])])
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), leaves), expected))


# ---- gradients of gradients, torch.func ----


def gradient_penalty(backend, grouped=False):
    query, key, value = (x.clone().requires_grad_() for x in (QUERY, KEY, VALUE))
    sources, options = masked_sources(key, value) if grouped else ([Source(key, value)], {})
    out = multi_source_attention(query, sources, backend=backend, **options)
    grads = torch.autograd.grad(out.square().sum(), (query, key), create_graph=True)
    (out.sum() + sum(g.square().sum() for g in grads)).backward()
    return query.grad, key.grad, value.grad


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.fault(number=28)
def test_gradients_of_gradients_come_from_the_reference(grouped):
    for got, wanted in zip(gradient_penalty("auto", grouped), gradient_penalty("reference", grouped)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.fault(number=28)
def test_gradients_of_gradients_where_one_tensor_is_query_key_and_value():
    def penalty(backend):
        x = QUERY.clone().requires_grad_()
        out, lse = multi_source_attention(x, [Source(x, x)], backend=backend, return_lse=True)
        (grad,) = torch.autograd.grad(out.square().sum() + lse.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.testing.assert_close(penalty("auto"), penalty("reference"))


@pytest.mark.fault(number=28)
def test_a_named_backend_refuses_gradients_of_gradients():
    message = r"lr_kernels\.multi_source_attention: gradients of gradients .* backend 'cpu'; supported by 'reference'"
    with pytest.raises(NotImplementedError, match=message):
        gradient_penalty("cpu")


def summed(function, x):
    return function(x).square().sum()


def dual(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


def dual_without_grad(function, x):
    with torch.no_grad():
        return dual(function, x)


def batched_gradients(function, x):
    x = x.clone().requires_grad_()
    out = function(x)
    ways = torch.stack([torch.ones_like(out), out.detach()])
    return torch.autograd.grad(out, x, ways, is_grads_batched=True)[0]


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(functools.partial(summed, f))(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](f(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(functools.partial(summed, f))(x),
    "functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x.cos())[1],
    "functional.hvp": lambda f, x: torch.autograd.functional.hvp(functools.partial(summed, f), x, x.cos())[1],
    "functional.hessian": lambda f, x: torch.autograd.functional.hessian(functools.partial(summed, f), x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward-mode jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "is_grads_batched": batched_gradients,
    "dual numbers": dual,
    "dual numbers, no_grad": dual_without_grad,
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.fault(number=28)
def test_a_transform_is_right_or_refused_by_name(transform):
    sources, options = masked_sources(KEY[:, :, :1, :2], VALUE[:, :, :1, :2])

    def of_query(backend):
        return lambda x: multi_source_attention(x, sources, backend=backend, **options)

    def of_key(backend):
        return lambda x: multi_source_attention(query, [sources[0]._replace(key=x)], backend=backend)

    query = QUERY[:, :, :1, :2].contiguous()
    for build, x in ((of_query, query), (of_key, KEY[:, :, :1, :2].contiguous())):
        torch.testing.assert_close(transform(build("auto"), x), transform(build("reference"), x))
        with pytest.raises(NotImplementedError, match=r"lr_kernels\.multi_source_attention: .*'cpu'; .*'reference'"):
            transform(build("cpu"), x)


@pytest.mark.fault(number=28)
def test_masks_and_plans_may_be_arguments_of_a_transformed_function():
    def loss(query, fields, options):
        return multi_source_attention(query, [Source(*x) for x in fields], **options).square().sum()

    sources, options = masked_sources(KEY, VALUE)
    query = QUERY.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(query, sources, options), query)
    torch.testing.assert_close(torch.func.grad(loss)(QUERY, sources, options), expected)


FIELDS = {
    "query": QUERY,
    "key": KEY,
    "value": VALUE,
    "rows": torch.tensor([1, 0]),
    "key_mask": torch.ones(1, 5, dtype=torch.bool),
    "key_groups": torch.ones(1, 5, dtype=torch.uint8),
    "key_bias": torch.zeros(1, 5),
    "logit_scale": torch.ones(2),
    "logit_bias": torch.zeros(2),
    "value_index": torch.zeros(1, 5, dtype=torch.int64),
    "weight": torch.ones(2),
    "query_groups": torch.ones(1, 3, dtype=torch.uint8),
}


def attend(backend="auto", **given):
    given = {"query": QUERY, "key": KEY, "value": VALUE, **given}
    query, groups = given.pop("query"), given.pop("query_groups", FIELDS["query_groups"])
    return multi_source_attention(query, [Source(**given)], query_groups=groups, backend=backend)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.fault(number=28)
def test_vmap_over_any_tensor_is_refused_by_name(name):
    place = name if name.startswith("query") else rf"{name}\[0\]"
    with pytest.raises(NotImplementedError, match=rf"lr_kernels\.multi_source_attention: {place}: .*part of the batch"):
        torch.vmap(lambda x: attend(**{name: x}))(FIELDS[name][None])
    with pytest.raises(NotImplementedError, match=rf"lr_kernels\.multi_source_attention: {place}: .*part of the batch"):
        torch.vmap(torch.func.grad(lambda y, x: (attend(**{name: x}) * y).sum()), (None, 0))(
            torch.tensor(1.0), FIELDS[name][None]
        )


@pytest.mark.parametrize("name", ["key_mask", "key_groups"])
@pytest.mark.fault(number=28)
def test_vmap_over_the_masks_of_a_plan_is_refused_by_name(name):
    def lists(x):
        plan = plan_attention([x]) if name == "key_mask" else plan_attention([None], [x], x)
        return plan.key_index[0]

    with pytest.raises(NotImplementedError, match=rf"lr_kernels\.plan_attention: {name}\[0\]: .*part of the batch"):
        torch.vmap(lists)(FIELDS[name][None])


# ---- the other operators ----

LATENTS = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
TABLE = torch.rand(2, 1, 1 + len(COLUMNS), generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([1, 2])


def next_latents(x, backend, **options):
    return step_blend(x, [x.cos()], TABLE, 1, noise=LATENTS, history=LATENTS, backend=backend, **options)


OTHERS = {
    "adain": (QUERY, lambda x, backend: adain(x, KEY, backend=backend)),
    "adain reference": (KEY, lambda x, backend: adain(QUERY, x, backend=backend)),
    "merge": (QUERY, lambda x, backend: merge_attention_states([x, x * 2], [x[..., 0], x[..., 1]], backend=backend)[0]),
    "token maps": (QUERY, lambda x, backend: attention_with_token_maps(x, KEY, VALUE, TOKENS, backend=backend)[1]),
    "step_blend": (LATENTS, next_latents),
    "masked": (LATENTS, lambda x, backend: next_latents(x, backend, mask=x[:, 0].sigmoid(), background=x)),
}


@pytest.mark.parametrize("transform", ["grad", "jvp", "functional.hvp", "vectorized jacobian", "dual numbers, no_grad"])
@pytest.mark.parametrize("x, call", OTHERS.values(), ids=OTHERS)
@pytest.mark.fault(number=28)
def test_the_other_operators_are_right_or_refuse(x, call, transform):
    run = TRANSFORMS[transform]
    got = run(lambda y: call(y, "auto"), x)
    torch.testing.assert_close(got, run(lambda y: call(y, "reference"), x))
    assert (got != 0).any()
    with pytest.raises(NotImplementedError, match=r"lr_kernels\.\w+: .*gradients.*'cpu'; supported by 'reference'"):
        run(lambda y: call(y, "cpu"), x)


@pytest.mark.parametrize("x, call", OTHERS.values(), ids=OTHERS)
@pytest.mark.fault(number=28)
def test_vmap_over_the_other_operators_is_right_or_refused(x, call):
    mapped = torch.vmap(lambda y: call(y, "auto"))(torch.stack([x, x + 1]))
    torch.testing.assert_close(mapped, torch.stack([call(x, "reference"), call(x + 1, "reference")]))
    with pytest.raises(NotImplementedError, match=r"lr_kernels\.\w+: torch\.func transforms: .*'cpu'; .*'reference'"):
        torch.vmap(lambda y: call(y, "cpu"))(x[None])


@pytest.mark.parametrize(
    "message, call, x",
    [
        ("correspondence: target", lambda x: correspondence(x, KEY[:, :, 0])[0], QUERY[:, :, 0]),
        ("subject_mask: maps", lambda x: subject_mask(x), LATENTS),
        (
            "attention_with_token_maps: token_indices",
            lambda x: attention_with_token_maps(QUERY, KEY, VALUE, x)[1],
            TOKENS,
        ),
        ("step_blend: step", lambda x: step_blend(LATENTS, [LATENTS], TABLE, x), TOKENS[:1]),
        ("step_blend: out, model_input, history_out", lambda x: next_latents(x, "auto", out=x.clone()), LATENTS),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.fault(number=28)
def test_what_vmap_cannot_do_is_refused_by_name(message, call, x):
    with pytest.raises(NotImplementedError, match=rf"lr_kernels\.{message}: expected"):
        torch.vmap(call)(x[None])


# ---- tensors changed between the passes ----


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", [name for name in FIELDS if name != "query"])
@pytest.mark.fault(number=28)
def test_what_is_changed_before_the_backward_pass_is_an_error(name, dtype):
    changed = FIELDS[name].clone()
    if name in ("rows", "value_index"):
        changed = changed.to(dtype)
    out = attend(**{"query": QUERY.clone().requires_grad_(), name: changed}, backend="cpu")
    changed.add_(0) if changed.dtype != torch.bool else changed.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["key_index", "key_count", "query_order", "class_start"])
@pytest.mark.fault(number=28)
def test_a_plan_changed_before_the_backward_pass_is_an_error(name):
    sources, options = masked_sources(KEY, VALUE)
    out = multi_source_attention(QUERY.clone().requires_grad_(), sources, backend="cpu", **options)
    lists = getattr(options["plan"], name)
    (lists[0] if isinstance(lists, tuple) else lists).add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- a UNet with a LoRA ----


def lora_gradients(install, checkpointing=False, dtype=torch.float32):
    """Gradients of all LoRA weights of a tiny UNet, one after the other; its self-attention has the processors that
    `install` makes."""
    unet = tiny_models.tiny_unet(0).requires_grad_(False)
    torch.manual_seed(1)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    unet.train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    latents, text = torch.randn(3, 4, 8, 8).to(dtype), torch.randn(3, 5, 16).to(dtype)
    layers = select_layers(unet.to(dtype), "self")
    with install_processors(layers, install(layers)) if install else contextlib.nullcontext():
        unet(latents, 10, encoder_hidden_states=text).sample.square().mean().backward()
    return torch.cat([x.grad.flatten() for x in unet.parameters() if x.requires_grad])


def shared(backend):
    """Processors of the retouch stage while they share; without a backend while they do not."""
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    batch = RetouchBatch(1, True, False)
    routings = {n * n: route(batch, mask, mask, (n, n)) for n in (8, 4)}
    state = AttentionState(sharing=backend is not None, routings=routings, backend=backend or "auto")
    return lambda layers: {name: MultiSourceAttnProcessor(state) for name in layers}


def custom(calls, backend):
    def attention(query, key, value):
        calls.append(query.shape)
        own, first = Source(key, value), Source(key, value, torch.zeros(3, dtype=torch.int32))
        return multi_source_attention(query, [own, first._replace(logit_scale=0.5)], backend=backend)

    return lambda layers: {name: CustomAttnProcessor(attention) for name in layers}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.fault(number=28)
def test_a_lora_trains_as_with_stock_processors(checkpointing, one_thread):
    assert torch.equal(lora_gradients(shared(None), checkpointing), lora_gradients(None))


@pytest.mark.parametrize("kind", ["shared", "custom"])
@pytest.mark.fault(number=28)
def test_a_lora_trains_while_rows_are_shared(kind, one_thread):
    def processors(backend):
        return shared(backend) if kind == "shared" else custom(calls, backend)

    calls = []
    got, expected = lora_gradients(processors("cpu")), lora_gradients(processors("reference"))
    assert_matches(got, expected, lora_gradients(processors("reference"), dtype=torch.float64))
    calls.clear()
    assert torch.equal(lora_gradients(processors("cpu"), checkpointing=True), got)
    assert len(calls) == (14 if kind == "custom" else 0)  # each of 7 layers twice: the checkpoints did compute again
