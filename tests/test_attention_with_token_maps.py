"""attention_with_token_maps: the kernel against the specification in float64, and errors for wrong arguments."""

import math

import pytest
import torch
from draw import FLOATS, Arguments, Draw
from hypothesis import given, settings
from hypothesis import strategies as st

from lr_kernels import reference
from lr_kernels.attention.token_maps import attention_with_token_maps
from lr_kernels.testing import assert_matches, strided_randn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = {  # (B, N, M, H, D), token indices
    "clip-d40": ((2, 300, 77, 8, 40), [2, 5]),
    "clip-d64": ((2, 128, 77, 4, 64), [0, 76]),
    "clip-d160": ((1, 65, 77, 2, 160), [7]),
    "indices-per-row": ((3, 40, 9, 2, 16), [[1, 2], [8, 0], [3, 3]]),
    "one-of-each": ((1, 1, 1, 1, 1), [0]),
    "d7": ((2, 33, 20, 3, 7), [4, 4, 19]),
    "d37": ((2, 31, 13, 2, 37), [4]),
    "d256": ((1, 129, 30, 1, 256), [29]),
    "many-keys": ((1, 50, 700, 2, 48), [0, 127, 128, 699]),
    "no-token": ((1, 20, 5, 2, 8), []),
}


def make(sizes, indices, dtype=torch.float32, seed=0, gain=2.0):
    """query, key, value as slices of fused buffers, and the indices."""
    batch, tokens, keys, heads, head_dim = sizes
    g = torch.Generator().manual_seed(seed)
    query = strided_randn((batch, tokens, heads, head_dim), g, dtype, gain)
    key, value = (strided_randn((batch, keys, heads, head_dim), g, dtype) for _ in range(2))
    return query, key, value, torch.tensor(indices, dtype=torch.int64)


def doubled(arguments):
    return [x.double() for x in arguments[:3]] + list(arguments[3:])


def check(arguments, **keywords):
    out, maps = attention_with_token_maps(*arguments, **keywords, backend="cpu")
    out64, maps64 = reference.attention_with_token_maps(*doubled(arguments), **keywords)
    out_low, maps_low = reference.attention_with_token_maps(*arguments, **keywords)
    assert out.dtype == arguments[0].dtype and maps.dtype == torch.float32
    assert_matches(out, out_low, out64, "out")
    assert_matches(maps, maps_low, maps64, "maps")


def right_call(draw: Draw) -> Arguments:
    batch, queries, heads, head_dim = draw.size(0, 3), draw.size(0, 40), draw.size(1, 3), draw.size(1, 70)
    keys, dtype = draw.size(1, 30), draw.random.choice(FLOATS)
    query, key, value = (draw.tokens(batch, n, heads, head_dim, dtype=dtype) for n in (queries, keys, keys))
    chosen = draw.below(keys, batch, draw.size(0, 5))
    maps = torch.empty(batch, queries, chosen.shape[1])
    return [query, key, value, chosen, 0.3, torch.empty(query.shape, dtype=dtype), maps]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_reference(case, dtype):
    check(make(*CASES[case], dtype))


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "tokens", "heads"])
@pytest.mark.fault(number=2)
def test_offsets_beyond_int32_are_computed(dimension, tmp_path):
    strides = [64, 32, 16, 1]
    strides[dimension] = 2**31 + 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 256, dtype=torch.bfloat16)
    far = memory.as_strided((2, 2, 2, 16), strides)
    far.copy_(torch.randn(far.shape))
    near, tokens = far.clone(memory_format=torch.contiguous_format), torch.tensor([1])
    results = (attention_with_token_maps(x, x, x, tokens, backend="cpu") for x in (far, near))
    assert all(map(torch.equal, *results))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(1, 40), st.integers(1, 3), st.integers(1, 70)),
    tokens=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.3, -0.2, 0.0]),
)
def test_any_shape(sizes, tokens, dtype, scale):
    # a small gain: the tolerance compares two roundings, which a handful of outputs with large logits does not average
    check(make(sizes, list(range(min(tokens, sizes[2]))), dtype, gain=0.25), scale=scale)


@pytest.mark.fault(number=4)
def test_strides_are_honoured():
    query, key, value, indices = make((2, 50, 20, 3, 24), [1, 2])
    expected = attention_with_token_maps(query, key, value, indices, backend="cpu")
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    shared = key[:1].expand(2, -1, -1, -1)
    forms = [indices.expand(2, 2), *(indices.to(x) for x in (torch.int32, torch.int16, torch.int8, torch.uint8))]
    for q, k, i in ((transposed, key, indices), *((query, key, form) for form in forms)):
        assert all(map(torch.equal, attention_with_token_maps(q, k, value, i, backend="cpu"), expected))
    columns = torch.tensor([[1, 9, 2, 9], [1, 9, 2, 9]])[:, ::2]
    assert all(map(torch.equal, attention_with_token_maps(query, key, value, columns, backend="cpu"), expected))
    expected = attention_with_token_maps(query, shared.clone(), value, indices, backend="cpu")
    assert all(map(torch.equal, attention_with_token_maps(query, shared, value, indices, backend="cpu"), expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=5)
def test_views_at_an_odd_element(dtype):
    arguments = make((1, 40, 10, 2, 24), [3], dtype)
    odd = []
    for x in arguments[:3]:
        memory = torch.empty(x.numel() + 1, dtype=dtype)
        odd.append(memory[1:].view(x.shape).copy_(x))
    expected = attention_with_token_maps(*arguments, backend="cpu")
    assert all(map(torch.equal, attention_with_token_maps(*odd, arguments[3], backend="cpu"), expected))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(0, 5, 4, 2, 8), (2, 0, 4, 2, 8)], ids=["B=0", "N=0"])
@pytest.mark.fault(number=9)
def test_empty_dimensions_give_empty_or_zero_results(sizes, backend):
    out, maps = attention_with_token_maps(*make(sizes, [1, 2]), backend=backend)
    assert out.shape == (*sizes[:2], 2, 8) and maps.shape == (*sizes[:2], 2)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.fault(number=9)
def test_without_keys_the_output_is_zero(backend):
    out, maps = attention_with_token_maps(*make((2, 5, 0, 2, 8), []), backend=backend)
    assert torch.equal(out, torch.zeros(2, 5, 2, 8)) and maps.shape == (2, 5, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.fault(number=12)
def test_live_nan_and_inf(value, dtype):
    query, key, v, indices = make((2, 70, 20, 2, 24), [3, 4], dtype)
    query[0, 5, 1, 2] = value  # reaches the outputs of this query and head
    key[1, 7, 0, 3] = value  # reaches this head of row 1
    check_positions((query, key, v, indices))
    query, key, v, indices = make((2, 70, 20, 2, 24), [3, 4], dtype)
    v[1, 9, 1, 5] = value  # reaches one channel
    check_positions((query, key, v, indices))


def check_positions(arguments):
    got = attention_with_token_maps(*arguments, backend="cpu")
    for x, truth in zip(got, reference.attention_with_token_maps(*doubled(arguments))):
        assert torch.equal(x.isfinite(), truth.isfinite())


@pytest.mark.fault(number=13)
def test_garbage_past_the_tail():
    sizes = (1, 37, 19, 2, 20)
    query, key, value, indices = make(sizes, [3])
    expected = attention_with_token_maps(query, key, value, indices, backend="cpu")
    padded = []
    for x in (query, key, value):
        memory = torch.full((1, x.shape[1] + 40, 3, 50), math.nan)
        memory[:, : x.shape[1], :2, :20] = x
        padded.append(memory[:, : x.shape[1], :2, :20])
    assert all(map(torch.equal, attention_with_token_maps(*padded, indices, backend="cpu"), expected))


@pytest.mark.fault(number=14)
def test_scores_beyond_fp16():
    query = torch.full((1, 33, 1, 64), 300.0, dtype=torch.float16)
    value = torch.randn(1, 5, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    arguments = (query, query[:, :5], value, torch.tensor([2]))
    check(arguments)
    assert all(x.isfinite().all() for x in attention_with_token_maps(*arguments, backend="cpu"))


def test_maps_of_all_keys_sum_to_one():
    _, maps = attention_with_token_maps(*make((2, 100, 77, 8, 40), list(range(77))), backend="cpu")
    total = maps.sum(-1)
    assert_matches(total, torch.ones_like(total), torch.ones_like(total).double())


@pytest.mark.fault(number=30)
@pytest.mark.fault(number=31)
def test_threads_and_batch_order_do_not_change_a_bit():
    query, key, value, indices = make((4, 300, 33, 2, 40), [[1], [2], [3], [4]])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(attention_with_token_maps(query, key, value, indices, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([3, 1, 0, 2])
    results.append(attention_with_token_maps(query[order], key[order], value[order], indices[order], backend="cpu"))
    for out, maps in results[1:3]:
        assert torch.equal(out, results[0][0]) and torch.equal(maps, results[0][1])
    assert all(torch.equal(x, y[order]) for x, y in zip(results[3], results[0]))


@pytest.mark.fault(number=28)
def test_gradients_use_the_reference():
    query, key, value, indices = make((1, 10, 5, 2, 8), [1])
    query = query.clone().requires_grad_()
    out, maps = attention_with_token_maps(query, key, value, indices)
    (out.sum() + maps.sum()).backward()
    assert query.grad.isfinite().all()
    with pytest.raises(NotImplementedError, match=r"attention_with_token_maps: gradients: .*'cpu'.*'reference'"):
        attention_with_token_maps(query, key, value, indices, backend="cpu")


def test_float64_uses_the_reference():
    arguments = doubled(make((1, 10, 5, 2, 8), [1]))
    out, maps = attention_with_token_maps(*arguments)
    assert out.dtype == maps.dtype == torch.float64


def test_autocast():
    arguments = make((1, 40, 10, 2, 16), [3])
    with torch.autocast("cpu", torch.bfloat16):
        out, maps = attention_with_token_maps(*arguments, backend="cpu")
    expected = attention_with_token_maps(*(x.bfloat16() for x in arguments[:3]), arguments[3], backend="cpu")
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected[0]) and torch.equal(maps, expected[1])


def op_arguments():
    query, key, value, indices = make((2, 40, 10, 2, 16), [[3, 4], [0, 9]])
    outputs = (torch.full((2, 40, 2, 16), math.nan), torch.full((2, 40, 2), math.nan))
    return (query, key, value, indices.int(), 0.25, *outputs)


@pytest.mark.fault(number=26)
def test_passes_opcheck():
    torch.library.opcheck(torch.ops.lr_kernels.attention_with_token_maps_cpu.default, op_arguments())


def test_the_op_writes_every_element_and_refuses_wrong_indices():
    arguments = op_arguments()
    torch.ops.lr_kernels.attention_with_token_maps_cpu(*arguments)
    assert arguments[5].isfinite().all() and arguments[6].isfinite().all()
    for wrong in (-1, 10):
        arguments[3][1, 0] = wrong
        with pytest.raises(RuntimeError, match="token_indices: expected 0 to 9"):
            torch.ops.lr_kernels.attention_with_token_maps_cpu(*arguments)


@pytest.mark.fault(number=29)
def test_compiles_without_breaks_or_recompiles():
    compiled = torch.compile(attention_with_token_maps, fullgraph=True, backend="aot_eager")
    compiled(*make((1, 40, 10, 2, 16), [3]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for token in (3, 4):
            arguments = make((1, 40, 10, 2, 16), [token], seed=token)
            assert all(map(torch.equal, compiled(*arguments), attention_with_token_maps(*arguments)))


Q, K = torch.zeros(2, 6, 2, 8), torch.zeros(2, 5, 2, 8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, r"query: expected shape \(batch, tokens, heads, head_dim\)"),
        ({"query": Q.int()}, TypeError, "query: expected one of float32"),
        ({"query": torch.zeros(2, 6, 2, 257)}, ValueError, "query: expected head_dim from 1 to 256, got 257"),
        ({"query": torch.zeros(2, 6, 2, 0)}, ValueError, "query: expected head_dim from 1 to 256, got 0"),
        ({"query": torch.zeros(2, 6, 0, 8)}, ValueError, "query: expected at least one head"),
        ({"query": torch.zeros(2, 6, 8, 2).mT}, ValueError, "query: expected a contiguous last dimension"),
        ({"key": K[:1]}, ValueError, r"key: expected shape \(2, keys, 2, 8\)"),
        ({"key": K[..., :4]}, ValueError, r"key: expected shape \(2, keys, 2, 8\)"),
        ({"key": K.half()}, TypeError, "key: expected torch.float32, got torch.float16"),
        ({"key": K.to("meta")}, ValueError, "key: expected cpu, got meta"),
        ({"value": K[:, :4]}, ValueError, "value: expected 5 keys as in key, got 4"),
        ({"value": K[:, :, :1]}, ValueError, "value: expected shape"),
        ({"token_indices": torch.tensor(1)}, ValueError, r"token_indices: expected shape \(T,\) or \(2, T\)"),
        ({"token_indices": torch.zeros(3, 1).long()}, ValueError, r"token_indices: expected shape \(T,\) or \(2, T\)"),
        ({"token_indices": torch.tensor([1.0])}, TypeError, "token_indices: expected an integer dtype"),
        ({"token_indices": torch.tensor([True])}, TypeError, "token_indices: expected an integer dtype"),
        (
            {"token_indices": torch.tensor([1], dtype=torch.uint16)},
            TypeError,
            "token_indices: .* int32.*, got torch.uint16",
        ),
        (
            {"token_indices": torch.tensor([1], dtype=torch.uint32)},
            TypeError,
            "token_indices: .* int32.*, got torch.uint32",
        ),
        (
            {"token_indices": torch.tensor([1], dtype=torch.uint64)},
            TypeError,
            "token_indices: .* int32.*, got torch.uint64",
        ),
        ({"token_indices": torch.tensor([0, 5])}, ValueError, r"token_indices: expected integers in \[0, 5\)"),
        ({"token_indices": torch.tensor([-1])}, ValueError, r"token_indices: expected integers in \[0, 5\)"),
        ({"token_indices": torch.tensor([2**32])}, ValueError, r"token_indices: expected integers in \[0, 5\)"),
        ({"token_indices": torch.tensor([1], device="meta")}, ValueError, "token_indices: expected cpu, got meta"),
        ({"backend": "flash"}, ValueError, "backend: expected one of auto"),
        ({"backend": "cuda"}, RuntimeError, "backend: 'cuda' cannot run"),
        ({"query": Q.double(), "key": K.double(), "value": K.double(), "backend": "cpu"}, TypeError, "one of float32"),
    ],
)
def test_rows7_17_18_errors(changes, error, message):
    call = {"query": Q, "key": K, "value": K, "token_indices": torch.tensor([1])} | changes
    with pytest.raises(error, match=rf"^lr_kernels\.attention_with_token_maps: .*{message}"):
        attention_with_token_maps(**call)
