"""Other libraries' signatures on the operator: the same numbers as theirs, or a refusal by name."""

import inspect

import pytest
import torch
from torch.nn import functional as F

from lr_kernels import interop
from lr_kernels.interop import transformers
from lr_kernels.testing import assert_matches


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(dtype=torch.float32, heads=4, key_heads=4):
    query = randn(2, heads, 33, 40, dtype=dtype)
    return query, *(randn(2, key_heads, 50, 40, dtype=dtype, seed=i) for i in (1, 2))


def check(found, function, *arguments, **keywords):
    def cast(x, dtype):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    exact = function(
        *(cast(x, torch.float64) for x in arguments), **{k: cast(v, torch.float64) for k, v in keywords.items()}
    )
    assert_matches(found, function(*arguments, **keywords), exact)


MASKS = {
    "bool keys": torch.rand(1, 50, generator=torch.Generator().manual_seed(5)) < 0.6,
    "bool rows": torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(5)) < 0.6,
    "float rows": randn(2, 1, 1, 50, seed=5),
    "expanded": (torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(5)) < 0.6).expand(2, 4, 33, 50),
    "one number": torch.tensor([[0.5]]),
    "repeated over heads": randn(2, 1, 1, 50, seed=5).repeat_interleave(4, 1),
    "repeated over queries": (torch.rand(2, 1, 1, 50, generator=torch.Generator().manual_seed(5)) < 0.6).repeat(
        1, 1, 33, 1
    ),
}


def test_the_signatures_are_those_of_pytorch_and_the_names_documented():
    ours = inspect.signature(interop.scaled_dot_product_attention).parameters
    written = F.scaled_dot_product_attention.__doc__.split("->")[0]
    places = [written.index(f"{name}") for name in ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")]
    assert places == sorted(places)
    assert list(ours) == "query key value attn_mask dropout_p is_causal scale enable_gqa".split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, *MASKS])
def test_sdpa(mask, dtype):
    q, k, v = tensors(dtype)
    m = None if mask is None else MASKS[mask]
    m = m if m is None or m.dtype == torch.bool else m.to(dtype)
    found = interop.scaled_dot_product_attention(q, k, v, m, scale=0.3)
    check(found, F.scaled_dot_product_attention, q, k, v, m, scale=0.3)


def test_sdpa_of_three_dimensions_and_of_grouped_heads():
    q, k, v = tensors(heads=4, key_heads=2)
    found = interop.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    check(found, F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    q, k, v = (x[:, 0] for x in (q, k, v))
    mask = torch.rand(2, 1, 50) < 0.5
    found = interop.scaled_dot_product_attention(q, k, v, mask)
    check(found, F.scaled_dot_product_attention, q, k, v, mask)


@pytest.mark.parametrize("bias", [None, "float rows", "expanded"])
def test_xformers(bias):
    q, k, v = (x.transpose(1, 2) for x in tensors())
    b = None if bias is None else MASKS["float rows"].expand(2, 4, 33, 50) if bias == "expanded" else MASKS[bias]
    found = interop.memory_efficient_attention(q, k, v, b)

    def by_torch(*x, attn_mask=None):
        q, k, v = (y.transpose(1, 2) for y in x)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2)

    check(found, by_torch, q, k, v, attn_mask=b)
    flat = interop.memory_efficient_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    check(flat, F.scaled_dot_product_attention, q[:, :, 0], k[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value_columns", [16, 72])
def test_values_of_another_head_dim(value_columns, dtype):
    q, k, _ = tensors(dtype)
    v = randn(2, 4, 50, value_columns, dtype=dtype, seed=2)
    found = interop.scaled_dot_product_attention(q, k, v, MASKS["bool rows"])
    assert found.shape == (2, 4, 33, value_columns)
    check(found, F.scaled_dot_product_attention, q, k, v, MASKS["bool rows"])


def test_sdpa_of_two_dimensions_and_of_one_query_row_for_all():
    q, k, v = tensors()
    mask = torch.rand(1, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    found = interop.scaled_dot_product_attention(q[0, 0], k[0, 0], v[0, 0], mask)
    check(found, F.scaled_dot_product_attention, q[0, 0], k[0, 0], v[0, 0], mask)
    found = interop.scaled_dot_product_attention(q[:1], k, v)
    check(found, F.scaled_dot_product_attention, q[:1], k, v)


BIAS = randn(2, 1, 50, seed=5)
BIASES = {  # name -> as given, as (B, 1, 1, M)
    "a row for each batch row": (BIAS, BIAS[:, None]),
    "one row": (BIAS[:1], BIAS[:1, None]),
    "batch": (BIAS.repeat(1, 33, 1), BIAS[:, None]),
    "batch and heads": (BIAS.repeat_interleave(4, 0).expand(8, 33, 50), BIAS[:, None]),
    "batch and heads, one query": (BIAS.repeat_interleave(4, 0), BIAS[:, None]),
}


@pytest.mark.parametrize("bias", BIASES)
def test_xformers_bias_of_three_dimensions(bias):
    q, k, v = tensors()
    given, plain = BIASES[bias]
    found = interop.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), given)
    check(found.transpose(1, 2), F.scaled_dot_product_attention, q, k, v, plain)


def test_xformers_heads_in_the_batch_and_heads_in_groups():
    q, k, v = tensors()
    flat, bias = (x.flatten(0, 1) for x in (q, k, v)), BIAS.repeat_interleave(4, 0)
    found = interop.memory_efficient_attention(*flat, bias.expand(8, 33, 50))
    check(found.unflatten(0, (2, 4)), F.scaled_dot_product_attention, q, k, v, BIAS[:, None])
    k, v = k[:, :2], v[:, :2]  # a key for two heads each
    grouped = q.unflatten(1, (2, 2)), *(x[:, :, None].expand(-1, -1, 2, -1, -1) for x in (k, v))
    grouped = [x.movedim(3, 1) for x in grouped]  # (B, N, G, H, D)
    for given in (BIAS[:, None, None], BIAS[:, None, None].expand(2, 2, 2, 33, 50)):
        found = interop.memory_efficient_attention(*grouped, given)
        assert found.shape == (2, 33, 2, 2, 40)
        check(
            found.flatten(2, 3).transpose(1, 2), F.scaled_dot_product_attention, q, k, v, BIAS[:, None], enable_gqa=True
        )


@pytest.mark.fault(number=9)
def test_a_mask_without_queries():
    q, k, v = tensors()
    mask = torch.ones(2, 1, 0, 50, dtype=torch.bool)
    assert interop.scaled_dot_product_attention(q[:, :, :0], k, v, mask).shape == (2, 4, 0, 40)


@pytest.mark.fault(number=29)
def test_a_mask_repeated_over_heads_compiles_whole_and_is_compared_by_the_device():
    q, k, v = tensors()
    mask = MASKS["repeated over heads"].clone()
    compiled = torch.compile(interop.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, mask), interop.scaled_dot_product_attention(q, k, v, mask))
    mask[0, 1] += 1
    with pytest.raises(RuntimeError, match="attn_mask: expected the same for every head"):
        compiled(q, k, v, mask)


def test_gradients_pass():
    q, k, v = (x.requires_grad_() for x in tensors())
    grads = torch.autograd.grad(interop.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    for found, x in zip(grads, expected):
        torch.testing.assert_close(found, x)


REFUSED = [
    (
        "scaled_dot_product_attention",
        dict(is_causal=True, attn_mask=torch.ones(33, 50, dtype=torch.bool)),
        "attn_mask: expected None beside is_causal",
    ),
    ("scaled_dot_product_attention", dict(dropout_p=0.1), "dropout_p"),
    (
        "scaled_dot_product_attention",
        dict(attn_mask=torch.rand(33, 50, generator=torch.Generator().manual_seed(1)) < 0.5),
        "an interval of keys for each query, or at most 8 different rows",
    ),
    (
        "scaled_dot_product_attention",
        dict(attn_mask=randn(33, 50)),
        "one number for each key",
    ),
    ("scaled_dot_product_attention", dict(attn_mask=randn(2, 4, 1, 50)), "same for every head"),
    (
        "scaled_dot_product_attention",
        dict(attn_mask=torch.zeros(4, 1, 50).requires_grad_()),
        "copies that require grad",
    ),
    ("memory_efficient_attention", dict(p=0.5), "p: expected none"),
    ("memory_efficient_attention", dict(op=("forward", "backward")), "op: expected none"),
    ("memory_efficient_attention", dict(attn_bias=object()), "attn_bias: expected a tensor"),
    ("memory_efficient_attention", dict(output_dtype=torch.float64), "output_dtype"),
    ("transformers_attention", dict(softcap=30.0), "softcap"),
    ("transformers_attention", dict(position_bias=randn(1, 4, 33, 50)), "position_bias"),
    ("transformers_attention", dict(cu_seq_lens_q=torch.tensor([0, 33])), "cu_seq_lens_q"),
    ("transformers_attention", dict(output_attentions=True), "output_attentions"),
    ("transformers_attention", dict(invented_tomorrow=1), "invented_tomorrow"),
    (
        "transformers_attention",
        dict(attention_mask=randn(2, 4, 1, 50)),
        "attention_mask: expected the same for every head",
    ),
]


@pytest.mark.parametrize(("function", "keywords", "message"), REFUSED, ids=lambda x: str(x)[:24])
@pytest.mark.fault(number=16)
def test_what_the_operator_has_not_is_refused_by_name(function, keywords, message):
    q, k, v = tensors()
    if function == "memory_efficient_attention":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    first = (torch.nn.Module(),) if function == "transformers_attention" else ()
    with pytest.raises(NotImplementedError, match=message):
        getattr(interop, function)(*first, q, k, v, **keywords)


@pytest.mark.fault(number=16)
def test_what_transformers_hands_through_for_other_parts_of_the_model_changes_nothing():
    q, k, v = tensors()
    extra = dict(position_ids=torch.arange(33)[None], use_cache=True, output_hidden_states=True, deterministic=True)
    off = dict(softcap=None, sliding_window=None, s_aux=None, output_attentions=False)
    found, weights = interop.transformers_attention(torch.nn.Module(), q, k, v, **extra, **off)
    assert weights is None
    check(found.transpose(1, 2), F.scaled_dot_product_attention, q, k, v)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"attn_mask": torch.zeros(49)}, "broadcasts"),
     ({"attn_mask": torch.zeros(2, 3, 1, 50)}, r"broadcasts to \(2, 4, 33, 50\)"),
     ({"attn_mask": torch.zeros(50, dtype=torch.long)}, "bool or a floating"),
     ({"query": torch.zeros(3)}, "3 or 4 dimensions"),
     ({"key": randn(2, 3, 50, 40)}, "4 heads"),
     ({"query": randn(1, 2, 4, 33, 40)}, "query: expected 2, 3 or 4 dimensions, got 5"),
     ({"key": randn(2, 50, 40)}, "key: expected 4 dimensions, as query has, got 3"),
     ({"key": randn(2, 4, 50, 32)}, "key: expected head_dim 40, as query has, got 32"),
     ({"key": randn(2, 2, 50, 40), "value": randn(2, 1, 50, 40), "enable_gqa": True}, "value: expected 2 heads"),
     ({"value": randn(2, 4, 49, 40)}, "of 50 keys")],
    ids=["mask shape", "mask heads", "mask dtype", "query", "heads", "five", "key dimensions", "head_dim",
         "value heads", "keys"],
)  # fmt: skip
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
def test_what_does_not_fit_is_named(change, message):
    q, k, v = tensors()
    arguments = {"query": q, "key": k, "value": v} | change
    with pytest.raises((ValueError, TypeError), match=message):
        interop.scaled_dot_product_attention(**arguments)


def test_a_transformers_model_runs_on_it(monkeypatch):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    interop.register_with_transformers()
    interop.register_with_transformers()
    config = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
    pixels = randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        calls = []
        original = transformers.attention_call
        monkeypatch.setattr(transformers, "attention_call", lambda *a, **k: calls.append(1) or original(*a, **k))
        model.set_attn_implementation("lr_kernels")
        found = model(pixels).last_hidden_state
    assert len(calls) == 2
    torch.testing.assert_close(found, expected)


@pytest.mark.fault(number=29)
def test_compiles_with_dynamic_sizes():
    compiled = torch.compile(interop.scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = tensors()
    torch.testing.assert_close(compiled(q, k, v), interop.scaled_dot_product_attention(q, k, v))
