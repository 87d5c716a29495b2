"""Recorded calls: the arguments of a launch that runs again are those that laying it out anew would give."""

import pytest
import torch

from lr_kernels import Source, multi_source_attention, plan_attention, quantize
from lr_kernels.attention.repeats import signature
from lr_kernels.attention.tables import lay_out
from lr_kernels.testing import CASES, attention_inputs
from lr_kernels.triton import attention, attention_replay, replay

KERNEL = attention.multi_source_attention_forward_kernel
BY_ID = {case.id: case for case in CASES}


class Compiled:
    """Stands for a compiled kernel: keeps what it is launched with."""

    function = packed_metadata = launched = None

    def launch_metadata(self, *arguments):
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        self.launched = (x, y, z, stream, arguments)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(attention_replay.recorder, "_launches", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    active = type("Active", (), {"get_current_stream": staticmethod(lambda device: 7)})
    monkeypatch.setattr(replay, "driver", type("Driver", (), {"active": active}))


def recordable(query, sources, query_groups, scale, return_lse, plan):
    """The call as `prepare` sees it, or None where it must be laid out anew."""
    decides = signature(query, sources, query_groups, scale, return_lse, plan)
    return None if decides is None else attention_replay.Call(*decides, return_lse)


def inputs_of(case_id: str, seed: int, dtype=torch.bfloat16):
    inputs = attention_inputs(BY_ID[case_id], dtype, seed)
    strengths = {"logit_scale", "logit_bias"}  # numbers are not recorded: they become tensors anew in every call
    sources = [
        s._replace(**{k: torch.tensor(v) for k, v in s._asdict().items() if k in strengths and isinstance(v, float)})
        for s in inputs.sources
    ]
    sources = [
        s._replace(value_index=s.value_index.int()) if s.value_index is not None else s for s in sources
    ]  # as kernels read it: in another dtype the launcher copies it
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], inputs.query_groups)
    return inputs.query, sources, inputs.query_groups, plan


def in_8_bits(source, dtype):
    (key, key_scale), (value, value_scale) = quantize(source.key, dtype), quantize(source.value, dtype)
    return source._replace(key=key, value=value, key_scale=key_scale, value_scale=value_scale)


def as_pointers(x):
    if isinstance(x, tuple):
        return tuple(map(as_pointers, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def laid_out(call, query, sources, plan):
    if not hasattr(call, "out"):
        call.allocate(query)
    tables = lay_out(query, sources, plan, None)
    arguments, constants, programs = attention.launch_arguments(query, tables, call.out, call.lse, 90)
    return arguments, constants, programs


@pytest.mark.parametrize("dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "case_id", ["self", "shared-reference", "cfg-halves", "masked-67", "groups-3-masked", "warped-values", "key-bias",
                "logit-scale-and-bias", "everything", "everything-grouped", "d37"],
)  # fmt: skip
def test_a_recorded_launch_takes_the_pointers_of_its_own_call(case_id, dtype, no_gpu):
    """dtype: of a first source in 8 bits."""
    one_group = BY_ID[case_id].softmax_groups is None
    query, sources, groups, plan = inputs_of(case_id, 0)
    if dtype is not None:
        sources[0] = in_8_bits(sources[0], dtype)
    call = recordable(query, sources, groups, None, one_group, plan)
    assert call is not None and call.recorded is None
    arguments, constants, programs = laid_out(call, query, sources, plan)
    compiled = Compiled()
    launch = replay.record(KERNEL, compiled, programs, arguments, constants, call.pointers)
    if any(p % 16 for p in call.pointers):
        assert launch is None
        return
    attention_replay.recorder.add(call.key, launch)
    assert not any(isinstance(x, torch.Tensor) for x in torch.utils._pytree.tree_leaves(launch.arguments)), "kept alive"

    query, sources, groups, plan = inputs_of(case_id, 1)
    if dtype is not None:
        sources[0] = in_8_bits(sources[0], dtype)
    again = recordable(query, sources, groups, None, one_group, plan)
    assert again.key == call.key and again.recorded is launch
    again.replay(query)
    arguments, constants, programs = laid_out(again, query, sources, plan)
    whole = (*arguments, *(constants[name] for name in KERNEL.arg_names[len(arguments) :]))
    assert compiled.launched == (programs, 1, 1, 7, tuple(map(as_pointers, whole)))


def variant(**changes):
    """A call with one thing changed, as `recordable` sees it."""
    torch.manual_seed(0)
    about = dict(dtype=torch.bfloat16, tokens=64, keys=64, strided=False, rows=None, scale=None, lse=False, alias=False)
    about |= changes
    query = torch.randn(2, about["tokens"], 2, 64).to(about["dtype"])
    wide = torch.randn(2, about["keys"], 4, 64).to(about["dtype"])
    key = wide[:, :, :2] if about["strided"] else wide[:, :, :2].contiguous()
    value = key if about["alias"] else key.clone() if not about["strided"] else wide[:, :, 2:]
    source = Source(key, value, about["rows"], softmax_group=about.get("group", 0))
    if "scaled" in about:
        source = in_8_bits(source, about["scaled"])
    return recordable(query, [source], None, about["scale"], about["lse"], None)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": torch.float16}, {"tokens": 65}, {"keys": 63}, {"strided": True}, {"scale": 0.5}, {"lse": True},
     {"alias": True}, {"scaled": torch.int8}, {"rows": torch.tensor([1, 0], dtype=torch.int32)}],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_what_decides_a_launch_is_in_the_key(changes, no_gpu):
    assert variant().key == variant().key
    assert variant(**changes).key != variant().key


def test_the_setting_for_tf32_is_in_the_key(no_gpu):
    exact, before = variant(dtype=torch.float32).key, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert variant(dtype=torch.float32).key != exact
    finally:
        torch.set_float32_matmul_precision(before)


def test_calls_that_must_take_the_long_way(no_gpu):
    query, key = torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    mask = torch.rand(1, 8) < 0.5
    plan = plan_attention([mask])

    def found(sources, plan=None, groups=None):
        return recordable(query, sources, groups, None, False, plan)

    assert found([Source(key, key, key_mask=mask)], plan) is not None
    assert found([Source(key, key, key_mask=mask)]) is None, "a mask without a plan"
    assert found([Source(key, key, key_mask=mask.clone())], plan) is None, "a plan for another mask"
    assert found([Source(key, key)] * 2, plan) is None, "a plan for one source"
    assert found([Source(key, key, logit_scale=0.5)]) is None, "a number as strength"
    assert found([Source(key.requires_grad_(), key)]) is None, "a gradient"
    with torch.no_grad():
        assert found([Source(key, key)]) is not None


@pytest.mark.fault(number=5)
def test_addresses_off_a_16_byte_boundary_are_not_replayed(no_gpu):
    wide = torch.randn(2, 64, 2, 72).bfloat16()
    aligned, shifted = wide[..., :64], wide[..., 4:68]
    calls = [recordable(q, [Source(q, q)], None, None, False, None) for q in (aligned, shifted)]
    assert calls[0].key != calls[1].key
    attention_replay.recorder.add(calls[0].key, None)
    arguments, constants, programs = laid_out(calls[1], shifted, [Source(shifted, shifted)], plan_attention([None]))
    assert replay.record(KERNEL, Compiled(), programs, arguments, constants, calls[1].pointers) is None


@pytest.mark.parametrize("change", [{"softmax_group": 0.0}, {"softmax_group": [0]}, {"key": [1]}], ids=str)
def test_what_the_checks_refuse_reaches_them(change, no_gpu):
    x = torch.randn(2, 8, 2, 16)
    assert recordable(x, [Source(x, x)._replace(**change)], None, None, False, None) is None
    assert recordable(x, [(x, x)], None, None, False, None) is None


@pytest.mark.fault(number=28)
def test_forward_mode_takes_the_long_way(no_gpu):
    x = torch.randn(2, 8, 2, 16)
    with torch.autograd.forward_ad.dual_level():
        assert recordable(x, [Source(x, x)], None, None, False, None) is None


def test_tensors_that_the_launcher_makes_are_not_recorded(no_gpu):
    """An int64 row table is converted in every call: its address says nothing about the next call's."""
    query, key = (torch.randn(2, 8, 2, 16).bfloat16() for _ in range(2))
    sources = [Source(key, key, rows=torch.tensor([1, 0]))]
    call = recordable(query, sources, None, None, False, None)
    arguments, constants, programs = laid_out(call, query, sources, plan_attention([None]))
    assert replay.record(KERNEL, Compiled(), programs, arguments, constants, call.pointers) is None


def test_the_number_of_recorded_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(replay, "RECORDED_CALLS", 3)
    recorder = replay.Recorder()
    for i in range(10):
        recorder.add((i,), None)
        assert len(recorder._launches) <= 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_second_call_is_the_first_bit_for_bit():
    for case_id in ("self", "cfg-halves", "groups-3-masked", "everything"):
        found = []
        for _ in range(3):
            query, sources, groups, plan = inputs_of(case_id, 0)
            on_gpu = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
            sources = [Source(*map(on_gpu, s)) for s in sources]
            groups = on_gpu(groups)
            plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], groups)
            found.append(multi_source_attention(query.cuda(), sources, query_groups=groups, plan=plan))
        assert all(torch.equal(found[0], x) for x in found[1:])
