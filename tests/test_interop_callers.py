"""Packed sequences, xformers' objects, ComfyUI's override, transformers' sinks and windows."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from lr_kernels import interop
from lr_kernels.testing import assert_matches


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sdpa(q, k, v, mask=None, dtype=torch.float64, **keywords):
    """PyTorch's for (B, N, H, D)."""
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **keywords).transpose(1, 2).nan_to_num()


QUERIES, KEYS = (7, 1, 30, 12), (9, 5, 30, 20)


def packed(dtype=torch.float32, key_heads=4):
    q, k = randn(sum(QUERIES), 4, 16, dtype=dtype), randn(sum(KEYS), key_heads, 16, dtype=dtype, seed=1)
    v = randn(sum(KEYS), key_heads, 24, dtype=dtype, seed=2)
    starts = [
        torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) for lengths in (QUERIES, KEYS)
    ]
    return q, k, v, starts


def one_by_one(q, k, v, mask_of, dtype):
    """Each sequence by itself; mask_of(queries, keys) is its mask."""
    parts = zip(q.split(QUERIES), k.split(KEYS), v.split(KEYS))
    found = [sdpa(x[None], y[None], z[None], mask_of(len(x), len(y)), dtype)[0] for x, y, z in parts]
    return torch.cat(found)


def pairs(queries, keys):
    return torch.arange(queries)[:, None], torch.arange(keys)[None]


def by_end(queries, keys, window=10**6):
    i, j = pairs(queries, keys)
    own = i + keys - queries
    return (j <= own) & (j > own - window)


ORDERS = {
    "all": ({}, lambda n, m: None),
    "causal": ({"causal": True}, by_end),
    "window": ({"causal": True, "window": 6}, lambda n, m: by_end(n, m, 6)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("key_heads", [4, 2])
def test_packed_sequences_are_each_by_itself(key_heads, order, dtype):
    q, k, v, starts = packed(dtype, key_heads)
    keywords, mask_of = ORDERS[order]
    found = interop.variable_length_attention(q, k, v, *starts, **keywords)
    assert found.shape == (50, 4, 24)
    assert_matches(found, one_by_one(q, k, v, mask_of, dtype), one_by_one(q, k, v, mask_of, torch.float64))


def test_packed_sequences_have_gradients_and_may_be_empty():
    q, k, v, starts = packed()
    starts = [torch.cat([x[:2], x[1:]]) for x in starts]  # a second one of no tokens
    leaves = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(interop.variable_length_attention(*leaves, *starts).square().sum(), leaves)

    def by_pytorch(dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        return torch.autograd.grad(one_by_one(*given, lambda n, m: None, dtype).square().sum(), given)

    for found, low, exact in zip(grads, by_pytorch(torch.float32), by_pytorch(torch.float64)):
        assert_matches(found, low, exact)


@pytest.mark.fault(number=29)
def test_starts_that_do_not_ascend_fail_an_assertion_in_a_compiled_function():
    x = randn(6, 2, 8)
    compiled = torch.compile(interop.variable_length_attention, fullgraph=True, backend="aot_eager")
    right = torch.tensor([0, 2, 6])
    torch.testing.assert_close(
        compiled(x, x, x, right, right), interop.variable_length_attention(x, x, x, right, right)
    )
    with pytest.raises(RuntimeError, match="cu_seqlens_q: expected entries that ascend from 0 to 6"):
        compiled(x, x, x, torch.tensor([0, 2, 5]), right)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"cu_seqlens_q": torch.tensor([0, 7, 8, 38, 51])},
            ValueError,
            "cu_seqlens_q: expected entries that ascend from",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 9, 5, 44, 64])},
            ValueError,
            "cu_seqlens_k: expected entries that ascend from",
        ),
        (
            {"cu_seqlens_k": torch.tensor([0, 64])},
            ValueError,
            "cu_seqlens_k: expected 5 entries as cu_seqlens_q, got 2",
        ),
        ({"cu_seqlens_q": torch.zeros(5)}, ValueError, "cu_seqlens_q: expected int32 or int64"),
        ({"cu_seqlens_q": [0, 50]}, TypeError, "cu_seqlens_q: expected a tensor, got list"),
        ({"query": randn(1, 50, 4, 16)}, ValueError, "query: expected shape"),
        ({"window": 3}, ValueError, "window: expected None without causal, got 3"),
        ({"window": 0, "causal": True}, ValueError, "window: expected a number of keys from 1 on, got 0"),
        ({"key": randn(64, 3, 16), "value": randn(64, 3, 16)}, ValueError, "key: expected 4 heads or a divisor of it"),
    ],
)
@pytest.mark.fault(number=7)
def test_packed_sequences_that_do_not_fit(change, error, message):
    q, k, v, (of_q, of_k) = packed()
    arguments = dict(query=q, key=k, value=v, cu_seqlens_q=of_q, cu_seqlens_k=of_k) | change
    with pytest.raises(error, match=f"variable_length_attention: {message}"):
        interop.variable_length_attention(**arguments)


# xformers' objects, as their documentation describes them: what the class is called, and the attributes that hold
# lengths and windows.


def an_object(kind, **attributes):
    made = type(kind, (), {})()
    vars(made).update(attributes)
    return made


def lengths(of):
    starts = [0]
    for length in of:
        starts.append(starts[-1] + length)
    return SimpleNamespace(seqstart_py=starts, seqstart=torch.tensor(starts, dtype=torch.int32))


def from_the_start(queries, keys, window=10**6):
    i, j = pairs(queries, keys)
    return (j <= i) & (j > i - window)


PACKED = dict(q_seqinfo=lengths(QUERIES), k_seqinfo=lengths(KEYS))
BLOCK_DIAGONAL = {
    "BlockDiagonalMask": (PACKED, lambda n, m: None),
    "BlockDiagonalCausalMask": (PACKED, from_the_start),
    "BlockDiagonalCausalFromBottomRightMask": (PACKED, by_end),
    "BlockDiagonalCausalLocalAttentionMask": (PACKED | {"_window_size": 4}, lambda n, m: from_the_start(n, m, 4)),
}
SQUARE = {
    "LowerTriangularMask": ({}, from_the_start),
    "LowerTriangularFromBottomRightMask": ({}, by_end),
    "LocalAttentionFromBottomRightMask": (
        {"window_left": 3, "window_right": 5},
        lambda n, m: (lambda i, j: (j >= i + m - n - 3) & (j <= i + m - n + 5))(*pairs(n, m)),
    ),
}


@pytest.mark.parametrize("kind", BLOCK_DIAGONAL)
def test_block_diagonal_objects_of_xformers(kind):
    q, k, v, _ = packed()
    attributes, mask_of = BLOCK_DIAGONAL[kind]
    found = interop.memory_efficient_attention(q[None], k[None], v[None], an_object(kind, **attributes))[0]
    assert_matches(found, one_by_one(q, k, v, mask_of, torch.float32), one_by_one(q, k, v, mask_of, torch.float64))


@pytest.mark.parametrize("kind", SQUARE)
def test_triangular_objects_of_xformers(kind):
    q, k, v = (randn(2, n, 4, 16, seed=n) for n in (30, 41, 41))
    attributes, mask_of = SQUARE[kind]
    found = interop.memory_efficient_attention(q, k, v, an_object(kind, **attributes))
    assert_matches(found, sdpa(q, k, v, mask_of(30, 41), torch.float32), sdpa(q, k, v, mask_of(30, 41)))


@pytest.mark.fault(number=16)
def test_other_objects_of_xformers_are_refused_by_name():
    q, k, v, _ = packed()
    for kind, error, message in (
        (
            "PagedBlockDiagonalPaddedKeysMask",
            NotImplementedError,
            "attn_bias: expected a tensor, None or one of LowerT",
        ),
        ("LowerTriangularMaskWithTensorBias", NotImplementedError, "got LowerTriangularMaskWithTensorBias"),
        ("BlockDiagonalMask", ValueError, "attn_bias: expected k_seqinfo of 64 tokens in all, got 50"),
    ):
        wrong = an_object(kind, q_seqinfo=lengths(QUERIES), k_seqinfo=lengths(QUERIES))
        with pytest.raises(error, match=message):
            interop.memory_efficient_attention(q[None], k[None], v[None], wrong)
    with pytest.raises(ValueError, match="query: expected one batch row of packed sequences"):
        interop.memory_efficient_attention(
            *(x[None].expand(2, -1, -1, -1) for x in (q, k, v)), an_object("BlockDiagonalMask")
        )


# ComfyUI's contract: its attention functions are wrapped, and where the options of the model hold an override, the
# wrapper calls that with the function itself and all arguments.


def comfy_core(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs):
    """What an attention function of ComfyUI computes, by PyTorch's."""
    if not skip_reshape:
        head_dim = q.shape[2] // heads
        q, k, v = (x.reshape(x.shape[0], x.shape[1], -1, head_dim).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    extra = {name: x for name, x in kwargs.items() if name in ("scale", "enable_gqa")}
    out = F.scaled_dot_product_attention(q, k, v, mask, **extra)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def called(*arguments, transformer_options, **keywords):
    """What the wrapper does with a call of an attention function."""
    override = transformer_options["optimized_attention_override"]
    return override(
        comfy_core, *arguments, transformer_options=transformer_options, _inside_attn_wrapper=True, **keywords
    )


COMFY = {
    "plain": {},
    "reshaped before": {"skip_reshape": True},
    "reshaped by the caller": {"skip_reshape": True, "skip_output_reshape": True},
    "heads kept": {"skip_output_reshape": True},
    "padding": {"mask": torch.arange(50)[None] < torch.tensor([[30], [44]])[:, None]},
    "one mask": {"mask": torch.arange(50)[None] < 30},
    "numbers": {"mask": randn(2, 1, 1, 50, seed=5)},
    "causal": {"mask": torch.ones(33, 50, dtype=torch.bool).tril()},
    "precision, scale": {"attn_precision": torch.float32, "scale": 0.3},
    "fewer heads": {"enable_gqa": True},
    "low precision allowed": {"low_precision_attention": True},
}


@pytest.mark.parametrize("name", COMFY)
def test_comfyui_calls_it_in_place_of_its_own(name):
    keywords = COMFY[name]
    heads = 2 if name == "fewer heads" else 4
    q, k, v = randn(2, 4, 33, 16), randn(2, heads, 50, 16, seed=1), randn(2, heads, 50, 16, seed=2)
    if not keywords.get("skip_reshape"):
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    options = {"optimized_attention_override": interop.comfyui_attention}
    found = called(q, k, v, 4, **keywords, transformer_options=options)
    wide = {name: x.double() if name == "mask" and x.is_floating_point() else x for name, x in keywords.items()}
    assert_matches(found, comfy_core(q, k, v, 4, **keywords), comfy_core(*(x.double() for x in (q, k, v)), 4, **wide))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 5}, ValueError, "q: expected a multiple of 5 channels, got 64"),
        ({"heads": 0}, ValueError, "heads: expected a number of heads from 1 on, got 0"),
        (
            {"heads": 4, "skip_reshape": True, **{x: randn(2, 8, 5, 16) for x in "qkv"}},
            ValueError,
            "heads: expected 8, as q has, got 4",
        ),
        ({"skip_reshape": True}, ValueError, "q: expected 4 dimensions, got 3; skip_reshape says"),
        ({"k": randn(2, 50, 32)}, ValueError, "k: expected 64 channels, got 32"),
        ({"k": randn(2, 50, 40), "enable_gqa": True}, ValueError, "k: expected 64 channels or a part of it, in heads"),
        ({"mask": torch.rand(33, 50) < 0.5}, NotImplementedError, "mask: expected an interval of keys"),
        ({"invented_tomorrow": 3}, NotImplementedError, "invented_tomorrow: expected none, got 3"),
    ],
)
@pytest.mark.fault(number=16)
def test_what_comfyui_could_ask_for_in_vain_is_named(change, error, message):
    arguments = dict(q=randn(2, 33, 64), k=randn(2, 50, 64), v=randn(2, 50, 64), heads=4) | change
    with pytest.raises(error, match=f"comfyui_attention: {message}"):
        interop.comfyui_attention(comfy_core, **arguments)


# transformers


def small(model, config, **sizes):
    sizes = dict(hidden_size=32, num_attention_heads=4, vocab_size=50, pad_token_id=0, eos_token_id=1) | sizes
    torch.manual_seed(0)
    return model(config(**sizes)).eval()


def gpt_oss():
    from transformers import GptOssConfig, GptOssModel

    kinds = ["full_attention", "sliding_attention"]
    sizes = dict(intermediate_size=32, num_hidden_layers=2, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    return small(GptOssModel, GptOssConfig, **sizes, num_experts_per_tok=1, layer_types=kinds, sliding_window=5)


def llama():
    from transformers import LlamaConfig, LlamaModel

    return small(LlamaModel, LlamaConfig, intermediate_size=32, num_hidden_layers=2, num_key_value_heads=2)


def mistral():
    from transformers import MistralConfig, MistralModel

    sizes = dict(intermediate_size=32, num_hidden_layers=2, num_key_value_heads=1, sliding_window=6)
    return small(MistralModel, MistralConfig, **sizes)


@pytest.mark.parametrize("build", [gpt_oss, llama, mistral])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_causal_model_of_transformers_is_the_same(build, padded):
    """Sinks, grouped heads, windows, padding on the left, and decoding token by token."""
    interop.register_with_transformers()
    model = build()
    tokens = torch.randint(2, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, :4] = 0
    found = {}
    for implementation in ("eager", "lr_kernels"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            whole = model(tokens, attention_mask=mask).last_hidden_state
            first = model(tokens[:, :9], attention_mask=mask[:, :9], use_cache=True)
            parts = [first.last_hidden_state]
            for t in range(9, 12):
                cache = first.past_key_values
                first = model(tokens[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
                parts.append(first.last_hidden_state)
        found[implementation] = [x[mask.bool()] for x in (whole, torch.cat(parts, 1))]
    for ours, eager in zip(found["lr_kernels"], found["eager"]):
        torch.testing.assert_close(ours, eager)


def test_sinks_are_one_more_key_for_each_head():
    q, k, v = randn(2, 4, 33, 16), randn(2, 2, 50, 16, seed=1), randn(2, 2, 50, 24, seed=2)
    sinks = randn(4, seed=3)
    found, _ = interop.transformers_attention(torch.nn.Module(), q, k, v, s_aux=sinks, is_causal=False)
    wide = [x.double().repeat_interleave(2, 1) for x in (k, v)]
    scores = torch.einsum("bhnd,bhmd->bhnm", q.double(), wide[0]) / 4
    scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(2, -1, 33, 1)], -1)
    expected = torch.einsum("bhnm,bhmd->bnhd", scores.softmax(-1)[..., :-1], wide[1])
    torch.testing.assert_close(found, expected.float())
    with pytest.raises(
        ValueError, match=r"s_aux: expected a floating dtype and shape \(4,\), got torch.float32 and \(3,\)"
    ):
        interop.transformers_attention(torch.nn.Module(), q, k, v, s_aux=sinks[:3])


def test_a_window_without_a_mask():
    q, k, v = randn(1, 2, 20, 16), randn(1, 2, 20, 16, seed=1), randn(1, 2, 20, 16, seed=2)
    found, _ = interop.transformers_attention(torch.nn.Module(), q, k, v, is_causal=True, sliding_window=4)
    expected = F.scaled_dot_product_attention(q, k, v, from_the_start(20, 20, 4)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    last, _ = interop.transformers_attention(torch.nn.Module(), q[:, :, -1:], k, v, is_causal=True, sliding_window=4)
    torch.testing.assert_close(last, expected[:, -1:])
