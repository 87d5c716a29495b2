"""Gradients of multi_source_attention in Triton: the interpreter with checked accesses, or a GPU where there is one."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lr_kernels import Source, multi_source_attention
from lr_kernels.testing import (
    CASES,
    EXTREMES,
    ORDERED_CASES,
    AttentionCase,
    attention_inputs,
    check_attention_backward,
    extreme_inputs,
)

SEEDS = {torch.float32: 2, torch.bfloat16: 1, torch.float16: 1}
"""How many problems are compared together. In fp32 the largest error of one problem is left to chance; in 16 bits it is
the rounding of the result, for which one problem is enough."""

WITH_GRADIENTS = [case for case in (*CASES, *ORDERED_CASES) if not case.value_index]
PROBLEMS = [(case, torch.float32) for case in WITH_GRADIENTS]
PROBLEMS += [
    (case, (torch.bfloat16, torch.float16)[i % 2])
    for i, case in enumerate(WITH_GRADIENTS)
    if torch.cuda.is_available() or i % 3 == 0 or "everything" in case.id
]
"""Every case in fp32. On the interpreter, which is slow, a third of them in a 16-bit dtype too, where the kernels round
in places that hang on no feature of a case."""


def by_triton(*args, **kwargs):
    return multi_source_attention(*args, backend="triton", **kwargs)


@pytest.mark.parametrize("case, dtype", PROBLEMS, ids=lambda x: x.id if isinstance(x, AttentionCase) else str(x))
@pytest.mark.fault(number=28)
def test_gradients_match_the_formula(case, dtype, device):
    heads_matter = dtype == torch.float32 and (
        case.key_heads or case.blocks or case.logit_scale or case.rows == (None,)
    )
    if device == "cpu" and not heads_matter:  # half the interpreter's time; heads differ in addresses alone
        case = replace(case, heads=1, key_heads=None)
    problems = 1 if device == "cpu" and "everything" in case.id else SEEDS[dtype]  # their size makes up for the number
    check_attention_backward(by_triton, *(attention_inputs(case, dtype, i, device) for i in range(problems)))


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.fault(number=28)
def test_extreme_logits_of_all_visible_keys(extreme, device):
    """Where the log of the sum is lost beside the largest logit: a softmax of what the rounding leaves."""
    case = {"batch": 1, "queries": 9, "heads": 1, "head_dim": 8, "keys": (20, 7), "visible": 0.7}
    check_attention_backward(by_triton, extreme_inputs(extreme, torch.float32, device, **case))


@pytest.mark.fault(number=28)
def test_classes_of_several_tiles(device):
    case = AttentionCase("", batch=2, queries=150, heads=1, head_dim=16, keys=(140, 70), groups=3, visible=0.6)
    check_attention_backward(by_triton, attention_inputs(case, torch.bfloat16, device=device))


@pytest.mark.fault(number=28)
def test_every_source_row_is_summed_over_its_readers(device):
    """One row for six batch rows, and a table that leaves rows out: gradients of rows that nobody reads are 0."""
    query = torch.randn(6, 9, 2, 16, device=device)
    key, value = (torch.randn(4, 40, 2, 16, device=device, requires_grad=True) for _ in range(2))
    table = torch.tensor([2, 2, -1, 0, 2, -1], dtype=torch.int32, device=device)
    grads = torch.autograd.grad(by_triton(query, [Source(key, value, table)]).square().sum(), (key, value))
    expected = torch.autograd.grad(
        multi_source_attention(query, [Source(key, value, table)], backend="reference").square().sum(), (key, value)
    )
    for got, wanted in zip(grads, expected):
        assert (got[[1, 3]] == 0).all()
        torch.testing.assert_close(got, wanted)


@pytest.mark.fault(number=11)
def test_nan_in_hidden_keys_leaves_gradients_alone(device):
    inputs = attention_inputs(AttentionCase("masked", visible=0.5, groups=2), torch.float32, device=device)

    def gradients(poison):
        leaves, sources = [], []
        for s in inputs.sources:
            hidden = ~s.key_mask.expand(s.key.shape[0], -1)
            parts = [x.clone() for x in (s.key, s.value)]
            if poison:
                parts[0][hidden], parts[1][hidden] = math.nan, math.inf
            leaves += [x.requires_grad_() for x in parts]
            sources.append(s._replace(key=parts[0], value=parts[1]))
        out = by_triton(inputs.query, sources, query_groups=inputs.query_groups)
        return torch.autograd.grad(out.square().sum(), leaves)

    for clean, poisoned in zip(gradients(False), gradients(True)):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("keys", [0, 9])
@pytest.mark.fault(number=10)
def test_what_sees_nothing_gets_and_gives_no_gradient(keys, device):
    query = torch.randn(2, 6, 2, 16, device=device, requires_grad=True)
    key, value = (torch.randn(2, keys, 2, 16, device=device, requires_grad=True) for _ in range(2))
    nobody = Source(key, value, key_mask=torch.zeros(1, keys, dtype=torch.bool, device=device))
    grads = torch.autograd.grad(by_triton(query, [nobody]).sum(), (query, key, value))
    assert all((g == 0).all() for g in grads)


@pytest.mark.fault(number=28)
def test_gradients_through_value_index_are_refused_by_name(device):
    query, key, value = (torch.randn(1, 5, 1, 16, device=device, requires_grad=True) for _ in range(3))
    source = Source(key, value, value_index=torch.zeros(1, 5, dtype=torch.int32, device=device))
    message = r"gradients through value_index\[0\]: not supported by backend 'triton'; supported by 'cpu', 'reference'"
    with pytest.raises(NotImplementedError, match=message):
        by_triton(query, [source])


@pytest.mark.fault(number=28)
def test_checkpoints_and_gradients_of_gradients(device):
    query, key, value = (torch.randn(1, 5, 1, 16, device=device, requires_grad=True) for _ in range(3))
    layer = functools.partial(checkpoint, lambda q, k, v: by_triton(q, [Source(k, v)]).square(), use_reentrant=False)
    expected = torch.autograd.grad(by_triton(query, [Source(key, value)]).square().sum(), (query, key, value))
    assert all(map(torch.equal, torch.autograd.grad(layer(query, key, value).sum(), (query, key, value)), expected))
    message = r"gradients of gradients .*: not supported by backend 'triton'; supported by 'reference'"
    with pytest.raises(NotImplementedError, match=message):
        torch.autograd.grad(by_triton(query, [Source(key, value)]).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms: not supported by backend 'triton'"):
        torch.func.grad(lambda x: by_triton(x, [Source(key, value)]).sum())(query)
