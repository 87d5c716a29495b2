"""The Triton kernels of token maps and of subject masks against the reference."""

import math

import pytest
import torch

from lr_kernels import reference
from lr_kernels.testing import assert_matches, strided_randn

OPS = torch.ops.lr_kernels


@pytest.mark.parametrize(
    "head_dim, tokens, dtype",
    [(40, 3, torch.float32), (80, 20, torch.bfloat16), (160, 1, torch.float16), (64, 40, torch.float32)],
)
def test_token_maps_match_the_reference(head_dim, tokens, dtype, device):
    g = torch.Generator().manual_seed(1)
    query, key, value = (strided_randn((2, n, 2, head_dim), g, dtype).to(device) for n in (37, 45, 45))
    indices = torch.randint(45, (2, tokens), generator=g).int().to(device)
    out = torch.full(query.shape, math.nan, dtype=dtype, device=device)
    maps = torch.full((2, 37, tokens), math.nan, device=device)
    OPS.attention_with_token_maps_triton(query, key, value, indices, 0.2, out, maps)
    arguments = (query, key, value)
    exact = reference.attention_with_token_maps(*(x.double() for x in arguments), indices, scale=0.2)
    low = reference.attention_with_token_maps(*arguments, indices, scale=0.2)
    assert_matches(out, low[0], exact[0], "out")
    assert_matches(maps, low[1], exact[1], "maps")


def test_token_maps_shared_indices_and_live_nan(device):
    g = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, n, 2, 24, generator=g).to(device) for n in (18, 33, 33))
    query[0, 5, 1, 3] = math.nan
    key[1, 7, 0, 2] = math.inf
    indices = torch.tensor([[7, 0]], dtype=torch.int32, device=device).expand(2, 2)
    out, maps = torch.full_like(query, 3.0), torch.full((2, 18, 2), 3.0, device=device)
    OPS.attention_with_token_maps_triton(query, key, value, indices, 0.2, out, maps)
    exact = reference.attention_with_token_maps(query.double(), key.double(), value.double(), indices, scale=0.2)
    low = reference.attention_with_token_maps(query, key, value, indices, scale=0.2)
    assert_matches(out, low[0], exact[0], "out")
    assert_matches(maps, low[1], exact[1], "maps")


@pytest.mark.parametrize("threshold", [None, 0.4], ids=["otsu", "fixed"])
@pytest.mark.parametrize(
    "size, smoothing, layers", [((16, 12), 1, 3), ((40, 36), 3, 2), ((7, 5), 3, 1), ((24, 24), 5, 2)]
)
def test_subject_mask_matches_the_reference(size, smoothing, layers, threshold, device):
    g = torch.Generator().manual_seed(4)
    maps = torch.rand(2, layers, 16, 12, generator=g).to(device)
    out = torch.ones((2, *size), dtype=torch.bool, device=device)
    OPS.subject_mask_triton(maps, threshold, None, smoothing, out)
    level = "otsu" if threshold is None else threshold
    assert torch.equal(out, reference.subject_mask(maps.double(), size=size, threshold=level, smoothing=smoothing))


@pytest.mark.parametrize("value", [0.3, math.nan], ids=["constant", "nan"])
def test_subject_mask_without_a_range_is_empty(value, device):
    maps = torch.full((1, 2, 8, 8), 0.3, device=device)
    maps[0, 0, 2, 2] = value
    out = torch.ones((1, 8, 8), dtype=torch.bool, device=device)
    OPS.subject_mask_triton(maps, None, None, 1, out)
    assert not out.any()
