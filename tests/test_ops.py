"""The registered op: schema, fake kernel, compile, determinism. The numbers in the `fault` marks are those
of the fault list in DESIGN.md."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lr_kernels import Source, multi_source_attention, plan_attention
from lr_kernels.testing import CASES, AttentionCase, attention_inputs

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")


def op_arguments(case: AttentionCase, dtype=torch.float32) -> tuple:
    inputs = attention_inputs(case, dtype)
    query, sources = inputs.query, inputs.sources
    plan = plan_attention([s.key_mask for s in sources], [s.key_groups for s in sources], inputs.query_groups)
    count = len(sources)
    return (
        query,
        [s.key for s in sources],
        [s.value for s in sources],
        [s.rows for s in sources],
        list(plan.key_index),
        list(plan.key_count),
        [1] * count,
        [None] * count,
        [None] * count,
        [s.key_bias for s in sources],
        [None] * count,
        [None] * count,
        plan.query_order,
        plan.class_start,
        0,
        [0] * count,
        [None],
        [None] * count,
        [None] * count,
        0.3,
        torch.full(query.shape, torch.nan, dtype=dtype),
        torch.full(query.shape[:3], torch.nan),
    )


@pytest.mark.parametrize("case", [CASES[2], CASES[-1]], ids=lambda c: c.id)
@pytest.mark.fault(number=26)
@pytest.mark.fault(number=27)
def test_passes_opcheck(case):
    torch.library.opcheck(torch.ops.lr_kernels.multi_source_attention_cpu.default, op_arguments(case))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.fault(number=29)
def test_compiles_without_break_or_recompile(backend):
    """One graph for three steps, masks and blend values, with a plan passed in and one built inside."""
    query, key = torch.randn(2, 32, 2, 16), torch.randn(2, 32, 2, 16)

    def layer(query, key, mask, plan, strength):
        sources = [Source(key, key), Source(key[:1], key[:1], key_mask=mask, logit_scale=strength)]
        return multi_source_attention(query, sources, plan=plan) + multi_source_attention(query, sources)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(3):
        mask = torch.rand(1, 32, generator=torch.Generator().manual_seed(step)) < 0.5
        arguments = (query, key, mask, plan_attention([None, mask]), torch.tensor(1.0 + step))
        assert torch.equal(compiled(*arguments), layer(*arguments))
    assert counter.frame_count == 1


@pytest.mark.fault(number=30)
def test_forward_is_bitwise_deterministic_over_runs_and_threads():
    inputs = attention_inputs(CASES[-1], torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 4)
            results.append(
                multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups, backend="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], x) for x in results)


@pytest.mark.fault(number=30)
def test_calls_from_several_threads_at_once_give_the_same_bits():
    inputs = attention_inputs(CASES[-1], torch.bfloat16)

    def call(_=None):
        return multi_source_attention(inputs.query, inputs.sources, query_groups=inputs.query_groups, backend="cpu")

    expected = call()
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(expected, x) for x in pool.map(call, range(64)))


def tasks() -> int:
    """Threads of this process, as the kernel counts them."""
    return len(os.listdir("/proc/self/task"))


def new_threads(threads: int | None = None) -> int:
    """How many threads the process has more after a call that is large enough for several."""
    x = torch.zeros(1, 256, 1, 16)  # too small for threads of torch itself
    own = torch.get_num_threads()
    torch.set_num_threads(threads or own)
    try:
        before = tasks()
        multi_source_attention(x, [Source(x, x)], backend="cpu")
        return tasks() - before
    finally:
        torch.set_num_threads(own)


class NewThreads(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[int, int]:
        return torch.get_num_threads(), new_threads()


@linux
@pytest.mark.fault(number=30)
def test_a_dataloader_worker_keeps_its_one_thread():
    new_threads(threads=2)  # the parent has a pool of its own, which a forked worker must not wait for
    found = list(torch.utils.data.DataLoader(NewThreads(), batch_size=None, num_workers=2))
    assert found == [[1, 0]] * 3


@linux
@pytest.mark.fault(number=30)
def test_set_num_threads_is_obeyed():
    """In a fresh process, which has no pool of threads yet."""
    code = "from test_ops import new_threads; print([new_threads(n) for n in (1, 2, 4)])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.path.dirname(__file__)])},
    )
    assert run.stdout.split("\n")[0] == "[0, 1, 2]", run.stdout


def test_out_of_range_rows_are_refused_by_the_op_itself():
    arguments = list(op_arguments(CASES[2]))
    arguments[3] = [torch.tensor([0, 5], dtype=torch.int32), None]
    with pytest.raises(RuntimeError, match=r"rows\[0\]: expected -1 to 1, got 5"):
        torch.ops.lr_kernels.multi_source_attention_cpu(*arguments)
