"""Bad input gets an error that names the argument, what was expected and what came.

The numbers in the `fault` marks are those of the fault list in DESIGN.md.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lr_kernels import Source, merge_attention_states, multi_source_attention, plan_attention
from lr_kernels.runtime import ops

OP = r"lr_kernels\.multi_source_attention: "


def good(count=3, rows=2, keys=7, heads=2, head_dim=16):
    query = torch.randn(2, 5, heads, head_dim)
    return query, [Source(torch.randn(rows, keys, heads, head_dim), torch.randn(rows, keys, heads, head_dim))] * count


@settings(max_examples=40, deadline=None)
@given(
    index=st.integers(0, 2),
    argument=st.sampled_from(["key", "value"]),
    fault=st.sampled_from(["head_dim", "heads", "rows", "keys", "rank"]),
)
@pytest.mark.fault(number=7)
def test_disagreeing_shapes_name_source_and_argument(index, argument, fault):
    query, sources = good()
    shape = {
        "head_dim": (2, 7, 2, 80),
        "heads": (2, 7, 3, 16),
        "rows": (3, 7, 2, 16),
        "keys": (2, 8, 2, 16),
        "rank": (2, 7, 32),
    }[fault]
    sources[index] = sources[index]._replace(**{argument: torch.randn(shape)})
    named = 1 if (index, argument, fault) == (0, "value", "head_dim") else index  # the others are not as the first one
    with pytest.raises(ValueError, match=OP + rf"(key|value|rows)\[{named}\]: expected .*, got "):
        multi_source_attention(query, sources)


@pytest.mark.fault(number=7)
def test_errors_have_one_form():
    query, sources = good(head_dim=64)
    sources[2] = sources[2]._replace(key=torch.randn(2, 7, 2, 80))
    with pytest.raises(ValueError, match=OP + r"key\[2\]: expected head_dim 64, got 80"):
        multi_source_attention(query, sources)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(softmax_group=torch.tensor(1)), TypeError, r"softmax_group\[1\]: expected an int, got tensor\(1\)"),
        (dict(rows=torch.tensor([0])), ValueError, r"rows\[1\]: expected shape \(2,\), got \(1,\)"),
        (dict(rows=torch.tensor([0.0, 1.0])), TypeError, r"rows\[1\]: expected an integer dtype, got torch.float32"),
        (dict(rows=torch.tensor([0, 2])), ValueError, r"rows\[1\]: expected -1 to 1, got 0 to 2"),
        (dict(rows=torch.tensor([-2, 0])), ValueError, r"rows\[1\]: expected -1 to 1, got -2 to 0"),
        (dict(key_mask=torch.ones(2, 7)), TypeError, r"key_mask\[1\]: expected torch.bool, got torch.float32"),
        (
            dict(key_mask=torch.ones(2, 8).bool()),
            ValueError,
            r"key_mask\[1\]: expected shape \(2 or 1, 7\), got \(2, 8\)",
        ),
        (dict(key_mask=torch.ones(7).bool()), ValueError, r"key_mask\[1\]: expected shape"),
        (
            dict(key_groups=torch.ones(1, 7).byte()),
            ValueError,
            r"query_groups: expected a tensor, since key_groups\[1\]",
        ),
        (dict(key_bias=torch.ones(3, 7)), ValueError, r"key_bias\[1\]: expected shape \(2 or 1, 7\), got \(3, 7\)"),
        (dict(logit_scale=torch.ones(3)), ValueError, r"logit_scale\[1\]: expected a scalar, \(2,\) or \(2, 2\), got"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.fault(number=7)
def test_tables_of_a_source(change, error, message):
    query, sources = good()
    sources[1] = sources[1]._replace(**change)
    with pytest.raises(error, match=OP + message):
        multi_source_attention(query, sources)


@pytest.mark.fault(number=7)
def test_query_and_groups():
    query, sources = good()
    with pytest.raises(
        ValueError, match=OP + r"query: expected shape \(batch, tokens, heads, head_dim\), got \(5, 32\)"
    ):
        multi_source_attention(torch.randn(5, 32), sources)
    with pytest.raises(ValueError, match=OP + "sources: expected 1 to 16, got 0"):
        multi_source_attention(query, [])
    with pytest.raises(ValueError, match=OP + "query: expected head_dim from 1 to 256, got 257"):
        multi_source_attention(torch.randn(1, 2, 1, 257), sources)
    with pytest.raises(TypeError, match=OP + r"query_groups: expected torch.uint8, got torch.int64"):
        multi_source_attention(query, sources, query_groups=torch.ones(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=OP + r"query_groups: expected shape \(2 or 1, 5\), got \(2, 6\)"):
        multi_source_attention(query, sources, query_groups=torch.ones(2, 6, dtype=torch.uint8))
    wide = Source(torch.randn(3, 7, 2, 16), torch.randn(3, 7, 2, 16))
    with pytest.raises(
        ValueError, match=OP + r"rows\[0\]: expected a tensor, since key\[0\] has 3 rows for a batch of 2"
    ):
        multi_source_attention(query, [wide])


@pytest.mark.fault(number=7)
def test_plan_and_merge():
    with pytest.raises(ValueError, match=r"lr_kernels\.plan_attention: key_groups: expected 2 entries, got 1"):
        plan_attention([None, None], [None])
    with pytest.raises(ValueError, match=r"lr_kernels\.merge_attention_states: lses: expected 2 tensors"):
        merge_attention_states([torch.randn(1, 2, 1, 4)] * 2, [torch.randn(1, 2, 1)])


@pytest.mark.parametrize(
    ("backend", "argument", "named", "able"),
    [
        ("cpu", "logit_scale", r"gradients of logit_scale\[1\]", "'reference'"),
        ("cpu", "logit_bias", r"gradients of logit_bias\[1\]", "'reference'"),
        ("cpu", "weight", r"gradients of weight\[1\]", "'reference'"),
        ("triton", "weight", r"gradients of weight\[1\]", "'reference'"),
    ],
)
@pytest.mark.fault(number=16)
def test_unsupported_argument_names_itself_and_who_supports_it(backend, argument, named, able, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    query, sources = good(count=2)
    given = getattr(sources[1], argument)
    given = (torch.rand(2) if given is None else given.clone()).requires_grad_()
    sources[1] = sources[1]._replace(**{argument: given}, softmax_group=1)
    with pytest.raises(
        NotImplementedError, match=OP + f"{named}: not supported by backend '{backend}'; supported by {able}"
    ):
        multi_source_attention(query, sources, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.fault(number=17)
def test_dtypes_that_do_not_fit_are_named(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    query, sources = good()
    sources[0] = sources[0]._replace(value=sources[0].value.half())
    with pytest.raises(TypeError, match=OP + r"value\[0\]: expected torch.float32, got torch.float16"):
        multi_source_attention(query, sources, backend=backend)
    for dtype in (torch.int32, torch.bool):
        with pytest.raises(TypeError, match=OP + "query: expected one of float32, float16, bfloat16, float64"):
            multi_source_attention(query.to(dtype), sources, backend=backend)
    double = [s._replace(key=s.key.double(), value=s.value.double()) for s in good()[1]]
    with pytest.raises(TypeError, match=OP + "query: expected one of float32, float16, bfloat16, got torch.float64"):
        multi_source_attention(query.double(), double, backend=backend)


@pytest.mark.parametrize("argument", ["key", "value", "rows", "key_mask"])
@pytest.mark.fault(number=18)
def test_devices_that_do_not_fit_are_named(argument):
    query, sources = good()
    away = {
        "key": sources[0].key,
        "value": sources[0].value,
        "rows": torch.zeros(2, dtype=torch.int32),
        "key_mask": torch.ones(1, 7, dtype=torch.bool),
    }[argument].to("meta")
    sources[0] = sources[0]._replace(**{argument: away})
    with pytest.raises(ValueError, match=OP + rf"{argument}\[0\]: expected cpu, got meta"):
        multi_source_attention(query, sources)


@pytest.mark.fault(number=42)
def test_unavailable_backend_says_why(monkeypatch):
    query, sources = good()
    with pytest.raises(ValueError, match=OP + "backend: expected one of auto, cuda, triton, cpu, reference, got 'tpu'"):
        multi_source_attention(query, sources, backend="tpu")
    with pytest.raises(RuntimeError, match=OP + "backend: 'cuda' cannot run: .*(CUDA C|needs a CUDA device)"):
        multi_source_attention(query, sources, backend="cuda")
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=OP + "backend: 'triton' cannot run: needs a CUDA device"):
        multi_source_attention(query, sources, backend="triton")


X = torch.randn(2, 8, 2, 16)
BYTES = torch.ones(2, 8, dtype=torch.uint8)


def attend_with(**changes):
    """A call whose source or arguments are changed."""
    fields = {k: v for k, v in changes.items() if k in Source._fields}
    arguments = {k: v for k, v in changes.items() if k not in fields}
    arguments = {"query": X, "sources": [Source(X, X)._replace(**fields)]} | arguments
    return multi_source_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": None}, "query: expected a tensor, got NoneType"),
        ({"sources": [(X, X)]}, r"sources\[0\]: expected a Source, got tuple"),
        ({"key": None}, r"key\[0\]: expected a tensor, got NoneType"),
        ({"rows": [0, 1]}, r"rows\[0\]: expected a tensor or None, got list"),
        ({"logit_scale": "2"}, r"logit_scale\[0\]: expected a number"),
        ({"weight": [1.0]}, r"weight\[0\]: expected a number"),
        ({"key_bias": BYTES == 1}, r"key_bias\[0\]: .*a mask goes to key_mask"),
        ({"plan": [None]}, "plan: expected an AttentionPlan"),
        ({"scale": torch.tensor(1.0)}, "scale: expected a number, got Tensor"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.fault(number=17)
def test_types_that_do_not_fit_are_named(changes, message):
    with pytest.raises(TypeError, match=message):
        attend_with(**changes)


@pytest.mark.fault(number=17)
def test_a_plan_of_something_else_is_refused():
    with pytest.raises(TypeError, match=r"key_mask\[0\]: expected a tensor or None, got list"):
        plan_attention([[True]])


@pytest.mark.parametrize("groups", [torch.ones(3, 8, dtype=torch.uint8), torch.ones(2, 7, dtype=torch.uint8)], ids=str)
@pytest.mark.fault(number=7)
def test_masks_and_groups_of_different_shape_are_refused(groups):
    with pytest.raises(ValueError, match=r"key_groups\[0\]: expected shape \(2 or 1, 8\)"):
        plan_attention([BYTES == 1], [groups], BYTES)


@pytest.mark.parametrize("backend", ["cpu", "auto"])
@pytest.mark.fault(number=28)
def test_forward_mode_is_refused_or_right_never_dropped(backend):
    def attend(query):
        return multi_source_attention(query, [Source(X, X)], backend=backend)

    tangent = torch.ones_like(X)
    if backend == "cpu":
        with pytest.raises(NotImplementedError, match="forward-mode gradients"):
            torch.func.jvp(attend, (X,), (tangent,))
        return
    found = torch.func.jvp(attend, (X,), (tangent,))[1]
    wide, step = X.double(), 1e-5
    sources = [Source(wide, wide)]
    ends = (multi_source_attention(wide + x, sources, backend="reference") for x in (step, -step))
    torch.testing.assert_close(found.double(), torch.sub(*ends) / (2 * step), rtol=1e-3, atol=1e-4)


@pytest.mark.fault(number=17)
def test_autocast_casts_what_pytorch_casts():
    with torch.autocast("cpu", torch.bfloat16):
        assert multi_source_attention(X, [Source(X, X)]).dtype == torch.bfloat16
        wide = X.double()
        assert multi_source_attention(wide, [Source(wide, wide)]).dtype == torch.float64
        with pytest.raises(TypeError, match="query"):
            multi_source_attention(X.long(), [Source(X.long(), X.long())])


@pytest.mark.fault(number=29)
def test_a_byte_that_is_not_named_is_an_error_in_a_compiled_plan_too():
    groups = torch.tensor([[1, 2, 4, 1]], dtype=torch.uint8)

    def plan(x):
        return plan_attention([None], [x], x, query_classes=(1, 2))

    compiled = torch.compile(plan, fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="query_classes"):
        compiled(groups)
