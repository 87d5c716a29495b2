"""What a query sees by key_range and block_mask, heads that share keys, and values of a head_dim of their own."""

import math

import pytest
import torch
from memory import peak_bytes
from torch.nn import functional as F

from lr_kernels import Source, multi_source_attention, plan_attention, reference
from lr_kernels.testing import EXTREMES, assert_matches, check_attention, extreme_inputs

KERNELS = ["cpu", "triton"]


def place(backend: str, device: str) -> str:
    return device if backend == "triton" else "cpu"


def tensors(queries=70, keys=70, heads=2, key_heads=2, head_dim=16, value_dim=16, batch=2, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, queries, heads, head_dim), (batch, keys, key_heads, head_dim), (batch, keys, key_heads, value_dim)
    return [torch.randn(shape, generator=g).to(device) for shape in shapes]


def causal(queries, offset=0, device="cpu"):
    end = torch.arange(1, queries + 1, device=device) + offset
    return torch.stack([torch.zeros_like(end), end], -1)[None]


def sdpa(query, key, value, mask=None, **keywords):
    q, k, v = (x.transpose(1, 2).double() for x in (query, key, value))
    found = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **keywords)
    return found.transpose(1, 2).nan_to_num()  # of a query that sees nothing PyTorch makes NaN


@pytest.mark.parametrize("backend", KERNELS)
def test_causal_order_is_that_of_pytorch(backend, device):
    q, k, v = tensors(heads=4, value_dim=24, device=place(backend, device))
    source = Source(k, v, key_range=causal(70, device=q.device))
    found = multi_source_attention(q, [source], backend=backend)
    low = reference.multi_source_attention(q, [source])
    assert_matches(found, low, sdpa(q, k, v, is_causal=True))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_numbers_beyond_the_keys_count_as_the_nearest(dtype, backend, device):
    q, k, v = tensors(queries=4, keys=9, device=place(backend, device))
    far = 127 if dtype == torch.int8 else 2**31 - 1
    given = torch.tensor([[-far, far], [3, 100], [-5, 4], [9, 20]], dtype=dtype, device=q.device)[None]
    within = torch.tensor([[0, 9], [3, 9], [0, 4], [9, 9]], device=q.device)[None]
    found, expected = (multi_source_attention(q, [Source(k, v, key_range=x)], backend=backend) for x in (given, within))
    assert torch.equal(found, expected) and not found[:, 3].any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("heads_of_mask", [1, 4])
def test_a_block_mask_is_the_mask_of_its_blocks(heads_of_mask, backend, device):
    q, k, v = tensors(queries=150, keys=90, heads=4, key_heads=2, device=place(backend, device))
    blocks = torch.rand(1, heads_of_mask, 5, 6, generator=torch.Generator().manual_seed(1)).to(q.device) < 0.5
    source = Source(k, v, block_mask=blocks, block_size=(32, 16))
    dense = blocks.repeat_interleave(32, 2)[:, :, :150].repeat_interleave(16, 3)[..., :90]
    found = multi_source_attention(q, [source], backend=backend)
    assert_matches(found, reference.multi_source_attention(q, [source]), sdpa(q, k, v, dense))
    plan = plan_attention([None], block_masks=[blocks], block_size=(32, 16))
    assert torch.equal(multi_source_attention(q, [source], plan=plan, backend=backend), found)
    assert plan.key_index[0].shape == (5, 1, heads_of_mask, 6), "one entry for each block, not for each key"


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["key", "value"])
@pytest.mark.fault(number=12)
def test_what_is_not_finite_reaches_only_the_queries_that_see_it(what, bad, backend, device):
    """The queries of a tile see different keys, and a weight of 0 times NaN is NaN."""
    x = dict(zip(("query", "key", "value"), tensors(device=place(backend, device))))
    order = causal(70, device=x["query"].device)
    x[what][:, 40] = bad
    found = multi_source_attention(x["query"], [Source(x["key"], x["value"], key_range=order)], backend=backend)
    source = Source(x["key"].double(), x["value"].double(), key_range=order)
    expected = reference.multi_source_attention(x["query"].double(), [source])
    assert torch.equal(found.isfinite(), expected.isfinite()) and found[:, :40].isfinite().all()
    torch.testing.assert_close(found[:, :40], expected[:, :40].float())


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.fault(number=11)
def test_what_no_query_sees_has_no_effect(backend, device):
    q, k, v = tensors(device=place(backend, device))
    order = causal(70, device=q.device)
    order[..., 1].clamp_(max=50)
    blocks = torch.ones(1, 1, 3, 5, dtype=torch.bool, device=q.device)
    blocks[..., 0] = False
    source = Source(k, v, key_range=order, block_mask=blocks, block_size=(32, 16))
    expected = multi_source_attention(q, [source], backend=backend)
    for hidden in (slice(50, None), slice(0, 16)):
        k[:, hidden], v[:, hidden] = math.nan, math.inf
    assert torch.equal(multi_source_attention(q, [source], backend=backend), expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("extreme", EXTREMES[::3], ids=str)
@pytest.mark.fault(number=15)
def test_huge_logits_in_causal_order(extreme, backend, device):
    size = {"batch": 1, "queries": 40, "heads": 1, "head_dim": 8, "keys": (40, 7)}
    inputs = extreme_inputs(extreme, torch.float32, place(backend, device), **size)
    order = causal(40, device=inputs.query.device)
    inputs.sources[0] = inputs.sources[0]._replace(key_range=order)
    check_attention(lambda *a, **k: multi_source_attention(*a, backend=backend, **k), inputs)


@pytest.mark.fault(number=10)
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors())
    order = causal(70, -20)
    out, lse = multi_source_attention(q, [Source(k, v, key_range=order)], return_lse=True)
    assert not out[:, :20].any() and (lse[:, :20] == -torch.inf).all() and lse[:, 20:].isfinite().all()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads) and not grads[0][:, :20].any()


@pytest.mark.fault(number=32)
def test_an_order_that_is_cut_in_two_is_the_whole():
    q, k, v = tensors()
    order = causal(70)
    whole = multi_source_attention(q, [Source(k, v, key_range=order)])
    parts = [Source(k[:, :31], v[:, :31], key_range=order), Source(k[:, 31:], v[:, 31:], key_range=order - 31)]
    torch.testing.assert_close(multi_source_attention(q, parts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_heads_and_wider_values_take_no_memory_of_their_own(dtype):
    """Beyond the result: the peak of what PyTorch allocates, forward; the keys alone hold 8 MiB."""
    q, k, v = (x.to(dtype) for x in tensors(8, 4096, 16, 4, 128, 64, batch=2 if dtype == torch.bfloat16 else 1))
    source = Source(k, v)
    peak = peak_bytes(lambda: multi_source_attention(q, [source]))
    assert peak == 8 * 16 * 64 * q.shape[0] * q.element_size()


@pytest.mark.fault(number=28)
def test_gradients_of_shared_keys_are_the_sums_over_their_heads():
    q, k, v = (x.double() for x in tensors(heads=6, key_heads=2, value_dim=8))
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    out = multi_source_attention(leaves[0], [Source(*leaves[1:], key_range=causal(70))])
    grads = torch.autograd.grad(out.square().sum(), leaves)
    mask = torch.ones(70, 70, dtype=torch.bool).tril()

    def by_pytorch(dtype):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        wide = [x.repeat_interleave(3, 2).transpose(1, 2) for x in given[1:]]
        expected = F.scaled_dot_product_attention(given[0].transpose(1, 2), *wide, mask)
        return torch.autograd.grad(expected.square().sum(), given)

    for found, low, exact in zip(grads, by_pytorch(torch.float32), by_pytorch(torch.float64)):
        assert_matches(found, low, exact)


MASK, BLOCKS = torch.ones(1, 70, dtype=torch.bool), torch.ones(1, 1, 3, 5, dtype=torch.bool)
BITS = torch.ones(1, 70, dtype=torch.uint8)
REFUSED = [
    (dict(key_range=torch.zeros(1, 70, 3, dtype=torch.int32)), ValueError, r"key_range\[0\]: expected shape \(2 "),
    (dict(key_range=torch.zeros(3, 70, 2, dtype=torch.int32)), ValueError, r"key_range\[0\]: expected shape"),
    (dict(key_range=torch.zeros(1, 70, 2)), TypeError, r"key_range\[0\]: expected an integer dtype, got torch.float32"),
    (dict(key_range=[(0, 5)] * 70), TypeError, r"key_range\[0\]: expected a tensor or None, got list"),
    (dict(key_range=causal(70).to("meta")), ValueError, r"key_range\[0\]: expected cpu, got meta"),
    (dict(block_mask=BLOCKS), ValueError, r"block_mask\[0\]: expected shape .*, got \(1, 1, 3, 5\); of blocks of"),
    (dict(block_mask=BLOCKS.int(), block_size=(32, 16)), TypeError, r"block_mask\[0\]: expected torch.bool"),
    (dict(block_mask=BLOCKS[0], block_size=(32, 16)), ValueError, r"block_mask\[0\]: expected shape \(rows or 1, h"),
    (dict(block_mask=BLOCKS, block_size=(32, 24)), ValueError, r"block_size\[0\]: expected a power of two up to 65536"),
    (dict(block_mask=BLOCKS, block_size=(0, 16)), ValueError, r"block_size\[0\]: expected numbers of queries and"),
    (dict(block_mask=BLOCKS, block_size=16), ValueError, r"block_size\[0\]: expected numbers of queries and"),
    (dict(block_mask=BLOCKS.expand(1, 3, 3, 5), block_size=(32, 16)), ValueError, r"block_mask\[0\]: expected shape"),
    (dict(block_mask=BLOCKS, block_size=(32, 16), key_groups=BITS), ValueError, r"key_groups\[0\]: expected None b"),
    (dict(key=torch.zeros(2, 70, 3, 16), value=torch.zeros(2, 70, 3, 16)), ValueError, r"key\[0\]: expected 2 heads"),
    (dict(key=torch.zeros(2, 70, 1, 16)), ValueError, r"value\[0\]: expected 1 heads as key\[0\], got 2"),
    (dict(value=torch.zeros(2, 70, 2, 300)), ValueError, r"value\[0\]: expected head_dim from 1 to 256, got 300"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=lambda x: x[:30] if isinstance(x, str) else "")
@pytest.mark.fault(number=7)
@pytest.mark.fault(number=17)
def test_what_does_not_fit_is_named(change, error, message):
    q, k, v = tensors()
    groups = BITS if "key_groups" in change else None
    with pytest.raises(error, match=rf"lr_kernels\.multi_source_attention: {message}"):
        multi_source_attention(q, [Source(k, v)._replace(**change)], query_groups=groups)


def test_blocks_and_groups_do_not_go_together():
    q, k, v = tensors()
    source = Source(k, v, block_mask=BLOCKS, block_size=(32, 16))
    with pytest.raises(ValueError, match=r"query_groups: expected None beside block_mask\[0\]"):
        multi_source_attention(q, [source], query_groups=BITS)
    other = source._replace(block_mask=torch.ones(1, 1, 3, 9, dtype=torch.bool), block_size=(32, 8))
    with pytest.raises(ValueError, match=r"block_size\[1\]: expected \(32, 16\) as block_size\[0\], got \(32, 8\)"):
        multi_source_attention(q, [source, other])


@pytest.mark.fault(number=33)
def test_a_plan_of_other_blocks_is_refused():
    q, k, v = tensors()
    blocks = BLOCKS.clone()
    source = Source(k, v, block_mask=blocks, block_size=(32, 16))
    for plan, message in (
        (plan_attention([None], block_masks=[BLOCKS], block_size=(32, 16)), r"built from block_mask\[0\]"),
        (plan_attention([None], block_masks=[blocks], block_size=(35, 16)), r"of block_size\[0\] \(32, 16\)"),
        (plan_attention([None]), r"built from block_mask\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_source_attention(q, [source], plan=plan)
    plan = plan_attention([None], block_masks=[blocks], block_size=(32, 16))
    multi_source_attention(q, [source], plan=plan)
    blocks[..., 0] = False
    with pytest.raises(ValueError, match=r"a plan of block_mask\[0\] as it is now"):
        multi_source_attention(q, [source], plan=plan)
    with pytest.raises(ValueError, match="block_masks: expected 1 entries, got 2"):
        plan_attention([None], block_masks=[blocks, blocks])
    with pytest.raises(ValueError, match=r"block_mask\[0\]: expected 5 key blocks, as key_mask\[0\] has, got 4"):
        plan_attention([MASK], block_masks=[BLOCKS[..., :4]], block_size=(32, 16))


@pytest.mark.fault(number=44)
def test_lists_of_blocks_that_cannot_fit_are_refused_before_they_are_made():
    blocks = torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(1, 64, 2**14, 2**14)
    with pytest.raises(ValueError, match="block_masks: expected a call that fits the memory"):
        plan_attention([None], block_masks=[blocks])


@pytest.mark.fault(number=29)
def test_compiles_without_a_break_or_a_graph_for_each_order():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(query, key, value, order, blocks):
        source = Source(key, value, key_range=order, block_mask=blocks, block_size=(32, 16))
        return multi_source_attention(query, [source], backend="cpu")

    torch._dynamo.reset()
    q, k, v = tensors(heads=4, value_dim=24)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for offset in (0, 3, -5):
            order = causal(70, offset)
            blocks = torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(offset + 9)) < 0.5
            source = Source(k, v, key_range=order, block_mask=blocks, block_size=(32, 16))
            assert torch.equal(layer(q, k, v, order, blocks), multi_source_attention(q, [source]))


def test_the_hopper_kernel_lacks_them_by_name():
    from lr_kernels.attention import hopper

    q, k, v = (x.half() for x in tensors(value_dim=24))
    source = Source(k, v, key_range=causal(70), block_mask=BLOCKS, block_size=(32, 16))
    found = " ".join(hopper.lacks(q, [source], gradients=False, on_hopper=True))
    assert all(x in found for x in ("key_range[0]", "block_mask[0]", "value[0] whose head_dim is not that of the keys"))
