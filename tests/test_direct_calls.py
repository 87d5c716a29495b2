"""torch.ops.lr_kernels.* called directly: no arguments end the process or reach outside a tensor. Number 45 of
DESIGN.md's fault list; `make fuzz` makes 20,000 such calls on a build with sanitizers (see direct_calls.py)."""

import math
import re

import pytest
import torch
from direct_calls import ON_CPU, OPERATORS, Draw, at, make_call, own, places, replaced

from lr_kernels import Source, attention_with_token_maps, multi_source_attention, step_blend
from lr_kernels.runtime import ops, platform
from lr_kernels.runtime.schemas import COLUMNS

OPS = torch.ops.lr_kernels
VALUE_INDEX = 10
"""The place of value_index among the arguments of multi_source_attention_backward."""
BACKENDS = [
    pytest.param("cpu", marks=pytest.mark.skipif(not platform.ERRORS_REACH_PYTHON, reason="errors end the process")),
    "triton",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.skipif(ops.cuda_extension_error is not None, reason="not compiled"),
            pytest.mark.skipif(not platform.ERRORS_REACH_PYTHON, reason="errors end the process"),
        ],
    ),
]

pytestmark = pytest.mark.usefixtures("device")


def full_call(name: str, backend: str) -> list:
    """The right call of 50 with the most tensors, none of them empty but gradients that are not wanted."""
    best: tuple[int, list] = (-1, [])
    for seed in range(50):
        arguments = OPERATORS[name](Draw(seed))
        tensors = [x for x in (at(arguments, p) for p in places(arguments)) if isinstance(x, torch.Tensor)]
        if (backend, name) == ("triton", "multi_source_attention_backward") and any(
            x is not None for x in arguments[VALUE_INDEX]
        ):
            continue  # which has no Triton kernel
        if all(x.numel() or x.dim() == 1 for x in tensors) and len(tensors) > best[0]:
            best = len(tensors), arguments
    return best[1]


def move(x: object, device: str) -> object:
    if isinstance(x, list):
        return [move(y, device) for y in x]
    return x.to(device) if isinstance(x, torch.Tensor) else x


def refuse(name: str, backend: str, arguments: list, device: str) -> str:
    """Call with arguments that must be refused; returns the message."""
    on = device if backend == "triton" else backend
    with pytest.raises((RuntimeError, ValueError, TypeError), match=rf"^lr_kernels\.{name}: ") as error:
        getattr(OPS, f"{name}_{backend}")(*(move(x, on) for x in arguments))
    return str(error.value)


@pytest.mark.parametrize("name", ON_CPU)
def test_right_calls_are_taken(name):
    for seed in range(30):
        getattr(OPS, f"{name}_cpu")(*OPERATORS[name](Draw(seed)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.fault(number=45)
def test_every_tensor_is_checked(name, backend, device):
    """Dtype and number of dimensions of each, and the message names it."""
    if not hasattr(OPS, f"{name}_{backend}") or (backend, name) == ("cpu", "compact_keys"):
        pytest.skip("no such op")
    arguments = full_call(name, backend)
    schema = [x.name for x in getattr(OPS, f"{name}_{backend}").default._schema.arguments]
    checked = 0
    for place in places(arguments):
        x = at(arguments, place)
        if isinstance(x, torch.Tensor) and x.numel():
            label = schema[place[0]] + (rf"(\[{place[1]}\])?" if len(place) > 1 else "")
            for wrong in (x.int() if x.is_floating_point() and x.itemsize > 1 else x.double(), x[None]):
                message = refuse(name, backend, replaced(arguments, place, own(wrong)), device)
                assert re.search(f": {label}: expected", message), message
            checked += 1
    assert checked >= 2


def first_output(op: torch._ops.OpOverload) -> int:
    """The place of the first argument that the schema marks as written."""
    written = [x.alias_info is not None and x.alias_info.is_write for x in op._schema.arguments]
    return written.index(True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.fault(number=6)
@pytest.mark.fault(number=45)
def test_outputs_have_memory_of_their_own(name, backend, device):
    if not hasattr(OPS, f"{name}_{backend}") or (backend, name) == ("cpu", "compact_keys"):
        pytest.skip("no such op")
    arguments = full_call(name, backend)
    place = first_output(getattr(OPS, f"{name}_{backend}").default)
    out = arguments[place]
    on = device if backend == "triton" else backend
    same = out[:1].to(on).expand(out.shape) if out.shape[0] > 1 else out[:, :1].to(on).expand(out.shape)
    shared = out.new_zeros(out.numel(), device=on).view(out.shape)
    like = [p for p in places(arguments) if p[0] < place and getattr(at(arguments, p), "shape", None) == out.shape]
    inputs = [p for p in like if at(arguments, p).dtype == out.dtype]
    cases = [(replaced(arguments, (place,), same), "elements that share no memory|no gaps")]
    if inputs:
        cases.append((replaced(replaced(arguments, inputs[0], shared), (place,), shared), "memory of its own"))
    for lying, message in cases:
        with pytest.raises((RuntimeError, ValueError), match=message):
            getattr(OPS, f"{name}_{backend}")(*(move(x, on) if x is not same else x for x in lying))


def attention(**changes):
    """A right call of two sources, two classes of queries and two groups, by name."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 2, 8, generator=g)
    index = torch.arange(6, dtype=torch.int32)
    arguments = {
        "query": x,
        "key": [x.clone(), x.clone()],
        "value": [x.clone(), x.clone()],
        "rows": [None, torch.tensor([1, -1], dtype=torch.int32)],
        "key_index": [index.expand(2, 1, 1, 6).clone(), None],
        "key_count": [torch.full((2, 1, 1), 4, dtype=torch.int32), None],
        "key_block": [1, 1],
        "key_range": [None, torch.tensor([[0, 6]] * 6, dtype=torch.int32)[None]],
        "value_index": [None, index[None].clone()],
        "key_bias": [None] * 2,
        "logit_scale": [None] * 2,
        "logit_bias": [None] * 2,
        "query_order": index[None].clone(),
        "class_start": torch.tensor([[0, 2, 6]], dtype=torch.int32),
        "query_block": 0,
        "softmax_group": [0, 1],
        "weight": [None] * 2,
        "key_scale": [None] * 2,
        "value_scale": [None] * 2,
        "scale": 0.3,
        "out": torch.empty(2, 6, 2, 8),
        "lse": None,
    }
    assert changes.keys() <= arguments.keys()
    return list((arguments | changes).values())


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


BITS, SCALE = torch.zeros(2, 6, 2, 8, dtype=torch.int8), torch.ones(2, 6, 2)
IN_8_BITS = {"key": [BITS] * 2, "value": [BITS] * 2, "key_scale": [SCALE] * 2, "value_scale": [SCALE] * 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [None, int32(2, 0)]}, r"rows\[1\]: expected -1 to 1, got 2"),
        ({"rows": [None, int32(0)]}, r"rows\[1\]: expected shape \(2\), got \(1\)"),
        ({"rows": [None]}, "rows: expected 2 entries, got 1"),
        ({"key": [torch.zeros(3, 6, 2, 8)] * 2, "value": [torch.zeros(3, 6, 2, 8)] * 2}, r"rows\[0\]: expected a tens"),
        ({"key_index": [int32([[[0, 1, 2, 6, 0, 0]]] * 2)[:, 0, None], None]}, r"key_index\[0\]: expected shape"),
        (
            {"key_index": [int32([[[0, 1, 2, 6, 0, 0]]], [[[0] * 6]]), None]},
            r"key_index\[0\]: expected 0 to 5",
        ),
        ({"key_count": [int32([[7]], [[0]]), None]}, r"key_count\[0\]: expected 0 to 6, got 7"),
        ({"key_count": [int32([[-1]], [[0]]), None]}, r"key_count\[0\]: expected 0 to 6, got -1"),
        ({"key_block": [3, 1]}, r"key_block\[0\]: expected a power of two up to 65536, got 3"),
        ({"key_block": [4, 1]}, r"key_index\[0\]: expected shape \(2, 1, 1, 2\), got \(2, 1, 1, 6\)"),
        ({"key_block": [1]}, "key_block: expected 2 entries, got 1"),
        (
            {
                "key_block": [4, 1],
                "key_index": [int32([[[1, 0]]], [[[0, 1]]]), None],
                "key_count": [int32([[2]], [[2]]), None],
            },
            r"key_index\[0\]: expected 0 to 0, got 1",
        ),
        (
            {"key_range": [None, int32([[0, 6]] * 5)]},
            r"key_range\[1\]: expected shape \(2 or 1, 6, 2\), got \(1, 5, 2\)",
        ),
        ({"query_block": -1}, "query_block: expected 0 to 2147483647, got -1"),
        ({"query_block": 4}, "query_order: expected None beside a query_block"),
        (
            {"key": [torch.zeros(2, 6, 3, 8)] * 2, "value": [torch.zeros(2, 6, 3, 8)] * 2},
            r"key\[0\]: expected 2 heads or a divisor of it, got 3",
        ),
        ({"value": [torch.zeros(2, 6, 2, 8), torch.zeros(2, 6, 2, 9)]}, r"value\[1\]: expected shape \(2, any, 2, 8\)"),
        ({"key_count": [None] * 2}, r"key_count\[0\]: expected a tensor beside key_index"),
        ({"value_index": [None, int32([0, 1, 2, 3, 4, 6])]}, r"value_index\[1\]: expected 0 to 5, got 6"),
        ({"query_order": int32([0, 1, 2, 3, 4, 6])}, "query_order: expected 0 to 5, got 6"),
        ({"query_order": int32([0, 1, 2])}, r"query_order: expected shape \(2 or 1, 6\), got \(1, 3\)"),
        ({"query_order": None}, "class_start: expected a tensor beside query_order"),
        ({"class_start": int32([0, 2, 7])}, "class_start: expected entries that ascend from 0 to 6"),
        ({"class_start": int32([0, 4, 2, 6])}, "class_start: expected entries that ascend from 0 to 6"),
        ({"class_start": int32([1, 2, 6])}, "class_start: expected entries that ascend from 0 to 6"),
        ({"softmax_group": [0, 2]}, r"softmax_group\[1\]: expected numbers that ascend from 0"),
        ({"softmax_group": [1, 1]}, r"softmax_group\[0\]: expected numbers that ascend from 0"),
        ({"softmax_group": [0, 0]}, "weight: expected 1 entry, got 2"),
        ({"lse": torch.empty(2, 6, 2)}, "lse: expected None, since each of 2 softmax groups has its own"),
        ({"query": torch.zeros(2, 6, 2, 300)}, "query: expected head_dim from 1 to 256, got 300"),
        ({"query": torch.zeros(2, 6, 2, 8).mT}, "query: expected no gaps in the last 1 of 4|query: expected"),
        ({"out": torch.empty(2, 6, 2, 8, dtype=torch.half)}, "out: expected float32, got float16"),
        ({"out": torch.empty(2, 5, 2, 8)}, r"out: expected shape \(2, 6, 2, 8\), got \(2, 5, 2, 8\)"),
        ({"key": []}, "key: expected 1 to 16 entries, got 0"),
        ({"key_scale": [None]}, "key_scale: expected 2 entries, got 1"),
        (
            {"key_scale": [SCALE, None]},
            r"key_scale\[0\]: expected None beside a key of the query's dtype, got a tensor",
        ),
        ({"value_scale": [None, SCALE]}, r"value_scale\[1\]: expected None beside a key of the query's dtype"),
        ({"key": [BITS] * 2}, r"value\[0\]: expected int8, got float32"),
        ({**IN_8_BITS, "key_scale": [None] * 2}, r"key_scale\[0\]: expected a tensor beside an 8-bit key, got None"),
        ({**IN_8_BITS, "value_scale": [None, SCALE]}, r"value_scale\[0\]: expected a tensor beside an 8-bit key"),
        ({**IN_8_BITS, "key_scale": [SCALE[:, :5]] * 2}, r"key_scale\[0\]: expected shape \(2 or 1, 6 or 1, 2 or 1\)"),
        ({**IN_8_BITS, "key_scale": [SCALE.double()] * 2}, r"key_scale\[0\]: expected float32, got float64"),
        ({**IN_8_BITS, "key": [BITS.view(torch.uint8)] * 2}, r"key\[0\]: expected float32, got uint8"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
@pytest.mark.fault(number=45)
def test_lists_of_attention_that_do_not_fit_are_refused(changes, message):
    OPS.multi_source_attention_cpu(*attention())
    with pytest.raises(RuntimeError, match=rf"^lr_kernels\.multi_source_attention: {message}"):
        OPS.multi_source_attention_cpu(*attention(**changes))


@pytest.mark.fault(number=45)
def test_only_listed_keys_are_looked_at():
    """What lies past key_count is never read."""
    arguments = attention()
    expected = torch.empty_like(arguments[-2])
    OPS.multi_source_attention_cpu(*arguments[:-2], expected, None)
    arguments[4][0][..., 4:] = 2**31 - 1
    OPS.multi_source_attention_cpu(*arguments)
    assert torch.equal(arguments[-2], expected)


X, MASK = torch.zeros(1, 5, 2, 8), torch.zeros(1, 2, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OPS.adain_cpu(X, X, None, None, 0.0, X.clone()), "adain: eps: expected a number above 0, got 0"),
        (lambda: OPS.subject_mask_cpu(X, None, math.nan, 1, MASK), "subject_mask: quantile: expected 0 to 1"),
        (lambda: OPS.subject_mask_cpu(X, 0.5, 0.5, 1, MASK), "subject_mask: quantile: expected None beside a thresh"),
        (lambda: OPS.subject_mask_cpu(X, None, 0.5, 1, MASK[:, :0]), "subject_mask: out: expected at least one pixel"),
        (lambda: OPS.subject_mask_cpu(X, None, None, 2**62 + 1, MASK), "subject_mask: smoothing: expected an odd"),
        (
            lambda: OPS.correspondence_cpu(
                X[0], X[0], 0, torch.zeros(1).long(), torch.empty(5, 2).long(), torch.empty(5, 2) > 0
            ),
            "correspondence: columns: expected at least 1, got 0",
        ),
        (
            lambda: OPS.correspondence_cpu(
                X[0], X[0], 1, torch.tensor([-1]), torch.empty(5, 2).long(), torch.empty(5, 2) > 0
            ),
            "correspondence: radius_squared: expected numbers of at least 0, got -1",
        ),
        (
            lambda: OPS.attention_with_token_maps_cpu(
                X, X, X, int32([5]), 1.0, torch.empty_like(X), torch.empty(1, 5, 1)
            ),
            "attention_with_token_maps: token_indices: expected 0 to 4, got 5",
        ),
        (
            lambda: OPS.step_blend_cpu(
                X, [X], torch.zeros(2, 1, 10), int32(2), 0, None, None, None, None, None, X.clone(), None, None
            ),
            "step_blend: step: expected 0 to 1, got 2",
        ),
        (
            lambda: OPS.step_blend_cpu(
                X, [X], torch.zeros(2, 1, 10), torch.empty(0, dtype=torch.int32), 0, None, None, None, None, None,
                X.clone(), None, None,
            ),
            r"step_blend: step: expected shape \(1\), got \(0\)",
        ),
    ],
)  # fmt: skip
@pytest.mark.fault(number=45)
def test_numbers_out_of_range_are_refused(call, message):
    with pytest.raises(RuntimeError, match=rf"^lr_kernels\.{message}"):
        call()


@pytest.mark.parametrize("left", [0, 64])
@pytest.mark.fault(number=45)
def test_memory_that_was_given_back_is_refused(left):
    x, out = torch.zeros(2, 8, 2, 16), torch.empty(2, 8, 2, 16)
    x.untyped_storage().resize_(left)
    with pytest.raises(RuntimeError, match="adain: x: expected memory for 512 elements"):
        OPS.adain_cpu(x, torch.zeros(2, 8, 2, 16), None, None, 1e-5, out)


@pytest.mark.skipif(not platform.ERRORS_REACH_PYTHON, reason="errors end the process")
@pytest.mark.fault(number=45)
def test_a_share_of_the_fuzz():
    outcomes = [make_call(seed)[1] for seed in range(300)]
    assert outcomes.count("refused by the op") > 100 and outcomes.count("succeeded") > 30


def graph_of(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="eager")


class TestWhereErrorsOfTheExtensionEndTheProcess:
    """As with torch 2.11: Python refuses wrong arguments before the op does, in compiled graphs too. The wording of the
    message shows that Python refused."""

    @pytest.fixture(autouse=True)
    def older(self, monkeypatch):
        monkeypatch.setattr(platform, "ERRORS_REACH_PYTHON", False)

    @pytest.mark.parametrize("field", ["rows", "value_index"])
    def test_index_tables_of_attention(self, field):
        x = torch.zeros(2, 4, 1, 8)
        right = torch.zeros(2, dtype=torch.int32) if field == "rows" else torch.zeros(1, 4, dtype=torch.int32)

        def call(table):
            return multi_source_attention(x, [Source(x, x)._replace(**{field: table})], backend="cpu")

        compiled = graph_of(call)
        assert torch.equal(compiled(right), call(right))
        with pytest.raises(RuntimeError, match=rf"{field}\[0\]: expected -?[01] to [13](?!, got)"):
            compiled(right + 7)

    def test_token_indices(self):
        x, right = torch.zeros(1, 4, 1, 8), torch.tensor([0, 3])
        compiled = graph_of(lambda tokens: attention_with_token_maps(x, x, x, tokens, backend="cpu"))
        compiled(right)
        with pytest.raises(RuntimeError, match=r"token_indices: expected 0 to 3(?!, got)"):
            compiled(right + 7)

    @pytest.mark.parametrize(
        ("column", "name"), [("sigma", "noise"), ("h", "history"), (None, "step")], ids=["noise", "history", "step"]
    )
    def test_step_blend(self, column, name):
        sample, table = torch.zeros(1, 2, 4, 4), torch.zeros(3, 1, 1 + len(COLUMNS))
        if column:
            table[1, 0, 1 + COLUMNS.index(column)] = 0.5

        def call(step):
            return step_blend(sample, [sample], table, step, backend="cpu")

        compiled = graph_of(call)
        right, wrong = torch.tensor([0]), torch.tensor([1 if column else 5])
        assert torch.equal(compiled(right), call(right))
        with pytest.raises(RuntimeError, match=rf"lr_kernels\.step_blend: {name}: expected"):
            compiled(wrong)
        if column:
            with pytest.raises(RuntimeError, match=rf"{name}: expected a tensor, since its coefficients of this step"):
                call(1)
