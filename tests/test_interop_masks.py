"""Masks in PyTorch's form that hold a row for each query: read as what they are, or refused."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lr_kernels import interop
from lr_kernels.interop import masks, one_source
from lr_kernels.testing import assert_matches

N, M = 40, 40


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(dtype=torch.float32, key_heads=4):
    return randn(2, 4, N, 16, dtype=dtype), *(randn(2, key_heads, M, 16, dtype=dtype, seed=i) for i in (1, 2))


def sdpa(q, k, v, mask, dtype):
    numbers = mask if mask.dtype == torch.bool else mask.to(dtype)
    found = F.scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v)), numbers, enable_gqa=True)
    return found.nan_to_num()  # of a query that sees nothing PyTorch makes NaN, and the operator 0


i, j = torch.arange(N)[:, None], torch.arange(M)[None]
padding = j < torch.tensor([30, 17])[:, None, None, None]
CAUSAL = j <= i
MASKS = {
    "causal": (CAUSAL, "key_range"),
    "causal and padding": (CAUSAL & padding, "key_range"),
    "causal and padding on the left": (CAUSAL & padding.flip(-1), "key_range"),
    "prefix": (CAUSAL | (j < 12), "key_range"),
    "window": ((i - j).abs() < 7, "key_range"),
    "packed": (i // 13 == j // 13, "key_range"),
    "packed in causal order": ((i // 13 == j // 13) & CAUSAL, "key_range"),
    "holes that no query sees": (CAUSAL & (j % 3 > 0), "key_range"),
    "a query that sees nothing": (CAUSAL & (i > 0), "key_range"),
    "two groups": (i % 2 == j % 2, "key_groups"),
    "eight groups": (i % 8 == j % 8, "key_groups"),
    "text and two pictures": ((j < 9) | (i // 20 == j // 20) & (i % 3 > 0), "key_groups"),
    "queries that are padding too": (padding & padding.transpose(2, 3), "key_range"),
    "zeros and -inf": (torch.where(CAUSAL & padding, 0.0, -torch.inf), "key_range"),
    "zeros and finfo.min": (torch.where(CAUSAL, 0.0, torch.finfo(torch.float32).min), "key_range"),
    "numbers of the keys in causal order": (torch.where(CAUSAL, randn(2, 1, 1, M, seed=4), -torch.inf), "key_range"),
    "repeated over heads": (CAUSAL.expand(2, 4, N, M).contiguous(), "key_range"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.fault(number=1)
def test_a_mask_is_read_as_what_it_is(name, dtype):
    mask, field = MASKS[name]
    q, k, v = tensors(dtype)
    found = interop.scaled_dot_product_attention(q, k, v, mask if mask.dtype == torch.bool else mask.to(dtype))
    assert_matches(found, sdpa(q, k, v, mask, dtype), sdpa(q, k, v, mask, torch.float64))
    parts = masks.read_mask("scaled_dot_product_attention", "attn_mask", mask, (2, 4, N, M), torch.float32)
    assert getattr(parts, field) is not None


REFUSED = {
    "nine different rows": (i % 9 == j % 9, "an interval of keys for each query, or at most 8 different rows"),
    "different heads": (torch.stack([CAUSAL, ~CAUSAL]).repeat(2, 1, 1), "the same for every head"),
    "numbers of pairs": (randn(N, M), "one number for each key"),
    "a query without keys by a finite number": (
        torch.where(CAUSAL & (i > 0), 0.0, torch.finfo(torch.float32).min), "a key for every query"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.fault(number=16)
def test_other_masks_are_refused_with_what_would_serve(name):
    mask, message = REFUSED[name]
    with pytest.raises(NotImplementedError, match=rf"attn_mask: expected {message}.*block_mask, key_range, key_groups"):
        interop.scaled_dot_product_attention(*tensors(), mask)


class Counted(TorchDispatchMode):
    """Counts the operations that read a number on the host, which would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def reads_of(mask):
    with Counted() as counted:
        masks.read_mask("scaled_dot_product_attention", "attn_mask", mask, (2, 4, N, M), torch.float32)
    return counted.reads


def test_padding_is_read_without_the_host():
    for mask in (padding, padding.expand(2, 4, N, M), torch.where(padding, 0.0, -torch.inf)):
        assert reads_of(mask) == 0


def test_a_mask_is_looked_into_once_until_it_changes():
    mask = CAUSAL[None, None].clone()
    assert reads_of(mask) > 0 and reads_of(mask) == 0 and reads_of(mask.view(N, M)) == 0
    q, k, v = tensors()
    before = interop.scaled_dot_product_attention(q, k, v, mask)
    mask[..., 20:, :] = False
    after = interop.scaled_dot_product_attention(q, k, v, mask)
    assert after[:, :, 20:].count_nonzero() == 0
    torch.testing.assert_close(after[:, :, :20], before[:, :, :20])


def test_few_masks_are_kept():
    for _ in range(3 * masks._REMEMBERED):
        masks.read_mask("f", "attn_mask", CAUSAL.clone(), (2, 4, N, M), torch.float32)
    assert len(masks._remembered.entries) <= masks._REMEMBERED


def test_another_mask_at_the_same_place_is_another_mask():
    """The memory of a mask that is kept is not given to others."""
    q, k, v = tensors()
    for offset in range(40):
        mask = j <= i + offset
        found = interop.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(found, sdpa(q, k, v, mask, torch.float32))
        del mask


def test_inference_tensors_are_looked_into_each_time():
    with torch.inference_mode():
        mask = CAUSAL.clone()
        q, k, v = tensors()
        assert interop.scaled_dot_product_attention(q, k, v, mask).isfinite().all()
        mask[:] = False
        assert not interop.scaled_dot_product_attention(q, k, v, mask).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_causal_order_by_is_causal(dimensions, dtype):
    q, k, v = (x[(0,) * (4 - dimensions)] for x in tensors(dtype))
    k, v = (x[..., : M - 7, :] for x in (k, v))
    found = interop.scaled_dot_product_attention(q, k, v, is_causal=True)
    low = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)
    assert_matches(found, low, exact)


def test_causal_order_of_grouped_heads_and_its_gradients():
    leaves = [x.requires_grad_() for x in tensors(key_heads=2)]
    found = interop.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(found.square().sum(), leaves)

    def by_pytorch(dtype):
        given = [x.detach().to(dtype).requires_grad_() for x in leaves]
        expected = F.scaled_dot_product_attention(*given, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(expected.square().sum(), given)

    for found, low, exact in zip(grads, by_pytorch(torch.float32), by_pytorch(torch.float64)):
        assert_matches(found, low, exact)


@pytest.mark.fault(number=29)
def test_causal_order_compiles_and_a_mask_of_pairs_fails_an_assertion():
    q, k, v = tensors()
    compiled = torch.compile(interop.scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    found = compiled(q, k, v, is_causal=True)
    torch.testing.assert_close(found, interop.scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(RuntimeError, match="attn_mask: expected the same for every query"):
        compiled(q, k, v, CAUSAL)


def test_ranges_are_made_once():
    first, second = (one_source.causal_range(N, torch.device("cpu")) for _ in range(2))
    assert first is second


@pytest.mark.parametrize("shape", [(1, 1, 1, M), (1, 1, N, M)], ids=["padding", "rows"])
def test_a_mask_in_the_memory_of_numpy_is_read_every_time(shape):
    q, k, v = tensors()
    memory = np.ones(shape, bool)
    for _ in range(2):
        mask = torch.from_numpy(memory)
        found = interop.scaled_dot_product_attention(q, k, v, mask)
        assert_matches(found, *(sdpa(q, k, v, mask, dtype) for dtype in (torch.float32, torch.float64)))
        memory[..., 7:] = False


def test_tensors_that_do_not_fit_each_other_are_named():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="scaled_dot_product_attention: attn_mask: expected cpu, got meta"):
        interop.scaled_dot_product_attention(q, k, v, CAUSAL.to("meta"))
    three = [randn(3, M, 4, 16) for _ in range(2)]
    with pytest.raises(
        ValueError, match="memory_efficient_attention: key: expected a batch of 2, as query has, or of 1"
    ):
        interop.memory_efficient_attention(q.transpose(1, 2), *three)
