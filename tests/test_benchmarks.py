"""What the benchmarks measure and write, on work of known size."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks import (
    gpu,
    gpu_attention,
    gpu_masks,
    gpu_peers,
    harness,
    mask_cases,
    operators,
    overhead,
    readme,
    table,
)
from benchmarks.attention import VISIBLE, Layer
from benchmarks.gpu_attention import Case, contenders
from benchmarks.harness import OURS, Contender, NotRun, Problem
from benchmarks.target import FLOOR, Target
from lr_kernels.runtime.schemas import SCHEMAS


def refuse():
    raise NotRun("no such thing here")


def problem(visible="100%", share=1.0):
    contenders = {
        OURS: Contender(lambda: None),
        "peer": Contender(lambda: None, threads=1),
        "absent": Contender(refuse),
    }
    return Problem(
        "op", "layer", "model", "1x1", "fp32", 1e9, contenders, lambda *_: 0.5, visible, share, baseline="peer"
    )


def test_rows_table_and_csv(tmp_path):
    rows = harness.measure([problem(), problem("50%", 0.5)], repeats=3)
    machine = harness.machine()
    harness.finish(rows)
    ours, peer, absent = rows[:3]
    assert float(ours["gflops"]) > 0 and float(ours["percent_of_peak"]) > 0 and ours["error_vs_sdpa"] == "1.00"
    assert peer["threads"] == "1" and float(peer["ours_is_faster"]) > 0
    assert absent["not_run"] == "no such thing here" and absent["ms"] == ""
    assert ours["time_vs_share"] == "" and float(rows[3]["time_vs_share"]) > 0
    text = table.markdown(rows, machine)
    assert "absent: not run: no such thing here" in text and len(text.splitlines()) == 6
    table.write_csv(tmp_path / "rows.csv", rows, machine)
    with (tmp_path / "rows.csv").open() as file:
        assert [r["contender"] for r in csv.DictReader(file)] == [OURS, "peer", "absent"] * 2


def test_captions_of_cpu_tables_name_the_instruction_set_and_say_when_bf16_pays():
    for name in ("attention", "operators", "masks", "retouch", "price"):
        assert re.search(r"\((baseline|avx2|avx512|avx512bf16|amx)\), \d+ threads", readme.TABLES[name]()), name
    for text in (readme.attention_table(), readme.masks_table(), readme.retouch_table(), table.markdown(*one_row())):
        assert "bf16 pays where the processor multiplies it (avx512bf16, amx)" in text


def one_row():
    rows, machine = harness.measure([problem()], repeats=1), harness.machine()
    harness.finish(rows)
    return rows, machine


def test_when_ours_does_not_run_the_peers_still_count():
    alone = problem()
    alone.contenders[OURS] = Contender(refuse)
    rows = harness.measure([alone], repeats=1)
    machine = harness.machine()
    harness.finish(rows)
    assert rows[1]["ours_is_faster"] == "" and float(rows[1]["ms"]) > 0
    assert "not run: no such thing here, peer takes" in table.markdown(rows, machine)


def test_peak_memory_leaves_out_the_result_and_counts_kept_scratch():
    """In a fresh process; 64 MiB are needed for a while, 32 MiB are returned. The call before the measured ones, which
    the harness makes too, brings torch's code into memory: megabytes that are none of the call's."""
    code = (
        "import torch\n"
        "from benchmarks.harness import peak_memory\n"
        "call = lambda: torch.ones(2**24).view(2, -1).sum(0)\n"
        "call()\n"
        "for _ in range(2):\n"
        "    print(peak_memory(call))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(60 << 20 < int(line) < 72 << 20 for line in run.stdout.split()), run.stdout


def test_peak_is_that_of_the_threads():
    threads = torch.get_num_threads()
    assert harness.sample_peak("fp32", 1) > 1
    assert torch.get_num_threads() == threads


def test_the_gpu_script_runs_dry(tmp_path):
    """Without a GPU, at toy sizes: every contender is called, nothing is timed, and the CSV says so."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    ran = ("tests", "ceilings", "lse", "references", "masks", "layer", "unet", "tiles", "operators", "report")
    command = [str(root / "benchmarks" / "gpu_run.sh"), "--dry", *ran, "sanitizer"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with (tmp_path / "parts.csv").open() as file:
        parts = {row["part"]: row["status"] for row in csv.DictReader(file)}
    assert parts == {**dict.fromkeys(ran, "ok"), "sanitizer": "not run"}
    table_of_all = (tmp_path / "table.md").read_text()
    assert "## attention\n\nnot run" in table_of_all and "not run: dry run" in table_of_all
    with (tmp_path / "operators.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == set(operators.SMALL)
    assert all(row["ms"] == "" and row["not_run"] for row in rows)
    elsewhere = ("xformers", "scikit-image", "OpenCV", OURS)  # not installed, or without the CUDA C++ extension
    other = {r["op"] + r["contender"]: r["not_run"] for r in rows if r["not_run"] != "dry run"}
    assert all(name.endswith(elsewhere) for name in other), other
    assert {name for name in other if name.endswith(OURS)} <= {"step_blend" + OURS}, other


def test_the_op_whose_overhead_is_measured_takes_the_call():
    x = torch.randn(1, 1, 1, 8)
    overhead.call_of_op(x, 3)()


def test_every_operator_has_problems():
    assert set(operators.OPERATORS) == set(SCHEMAS)


@pytest.mark.parametrize("operator", operators.SMALL)
def test_every_contender_is_right_and_a_wrong_one_is_refused(operator):
    """At toy sizes, uncompiled: what the benchmark checks before it times."""
    for build in operators.SMALL[operator](("fp32", "bf16"), Target(toy=True, compiles=False)):
        for problem in build():
            assert problem.op == operator and next(iter(problem.contenders)) == OURS
            for name, contender in problem.contenders.items():
                try:
                    result = contender.call()
                except NotRun:
                    continue
                assert problem.error(name, result) < 0.1
                if name != "eager" and not name.startswith(FLOOR) and result is not None:
                    with pytest.raises(AssertionError):
                        problem.error(name, wrong(result))


def wrong(result: object) -> object:
    """Every number another one."""
    if isinstance(result, Tensor):
        return ~result if result.dtype == torch.bool else result + 1
    return type(result)(map(wrong, result)) if isinstance(result, (tuple, list)) else result


def test_compiled_peers_are_among_the_contenders_where_wanted():
    """And one that the compiler cannot take is not run, with its reason."""
    line = Target().compiled({"compiled": lambda: torch._dynamo.graph_break()})["compiled"]
    with pytest.raises(NotRun):
        line()
    assert Target(compiles=False).compiled({"compiled": line}) == {}


TOY = Layer("toy", "toy", 70, 2, 40)


def plain_attention(query, key, value, causal=False, window_size=(-1, -1)):
    """(N, H, D), (M, H or fewer, D) -> out (N, H, D), lse (H, N)"""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key.float()) * query.shape[-1] ** -0.5
    before = torch.arange(len(query))[:, None] - torch.arange(len(key)) + len(key) - len(query)
    hidden = causal & (before < 0)
    if window_size[0] >= 0:
        hidden = hidden | (before > window_size[0])
    scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), value.float())
    return out.to(query.dtype), scores.logsumexp(-1)


def plain_flash(query, key, value, **order):
    """FlashAttention in plain PyTorch: out (B, N, H, D), lse (B, H, N)"""
    assert len(query) == len(key) == len(value)
    outs, lses = zip(*(plain_attention(*row, **order) for row in zip(query, key, value)))
    return torch.stack(outs), torch.stack(lses)


def plain_padded_flash(query, key, value, lengths):
    """The same over the first keys of each row."""
    rows = zip(query, key, value, lengths, strict=True)
    outs, lses = zip(*(plain_attention(q, k[: int(n)], v[: int(n)]) for q, k, v, n in rows))
    return torch.stack(outs), torch.stack(lses)


def plain_paged_flash(query, key_pages, value_pages, page_table, lengths):
    """The same over the tokens of each row's pages, up to its length; keys and values (pages, tokens, H, D)"""
    assert page_table.dtype == lengths.dtype == torch.int32 and len(query) == len(page_table) == len(lengths)
    rows = []
    for row, table_, length in zip(query, page_table, lengths):
        key, value = (x[table_.long()].flatten(0, 1)[: int(length)] for x in (key_pages, value_pages))
        rows.append(plain_attention(row, key, value))
    outs, lses = zip(*rows)
    return torch.stack(outs), torch.stack(lses)


def plain_fa3():
    def flash_attn_func(q, k, v, *, causal=False, window_size=(-1, -1), return_attn_probs=False):
        out, lse = plain_flash(q, k, v, causal=causal, window_size=window_size)
        return (out, lse) if return_attn_probs else out

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, page_table=None, return_softmax_lse=False):
        assert return_softmax_lse == (page_table is not None)
        if page_table is None:
            return plain_padded_flash(q, k_cache, v_cache, cache_seqlens)[0]
        return (*plain_paged_flash(q, k_cache, v_cache, page_table, cache_seqlens), torch.empty(0), torch.empty(0))

    return dict(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def plain_fa4():
    def flash_attn_func(q, k, v, *, causal=False, window_size=(-1, -1), return_lse=False):
        out, lse = plain_flash(q, k, v, causal=causal, window_size=window_size)
        return out, lse if return_lse else None

    def flash_attn_varlen_func(q, k, v, *, seqused_k, page_table=None, return_lse=False):
        assert return_lse == (page_table is not None)
        if page_table is None:
            return plain_padded_flash(q, k, v, seqused_k)[0], None
        return plain_paged_flash(q, k, v, page_table, seqused_k)

    return dict(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


class Place:
    """A tensor of a graph of cuDNN: only its layout."""

    def __init__(self, dim=None, stride=None):
        self.dim, self.stride = dim, stride

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_output(self, _):
        return self

    set_data_type = set_output


class PlainGraph:
    """cuDNN's attention graphs in plain PyTorch, (B, H, N, D), which take tensors of the layouts that were declared."""

    def __init__(self, **types):
        self.ready = False

    def tensor(self, *, name, dim, stride, data_type):
        return Place(dim, stride)

    def sdpa(self, *, q, k, v, attn_scale, generate_stats):
        self.inputs, self.results = [q, k, v], [Place(), Place() if generate_stats else None]
        return self.results

    def sdpa_backward(self, *, q, k, v, o, dO, stats, attn_scale):
        self.inputs, self.results = [q, k, v, dO], [Place(), Place(), Place()]
        return self.results

    def build(self, modes):
        self.ready = True

    def get_workspace_size(self):
        return 0

    def execute(self, tensors, workspace, handle):
        assert self.ready
        for place, x in tensors.items():
            assert place.dim == list(x.shape) and place.stride == list(x.stride()) and not x.requires_grad
        query, key, value, *grad = (tensors[place].transpose(1, 2).clone().requires_grad_() for place in self.inputs)
        with torch.enable_grad():
            out, lse = plain_flash(query, key, value)
        found = [out.transpose(1, 2), lse[..., None]]
        if grad:
            found = [x.transpose(1, 2) for x in torch.autograd.grad(out, (query, key, value), *grad)]
        for place, x in zip(self.results, found):
            if place is not None:
                tensors[place].copy_(x)


@pytest.fixture(autouse=True)
def no_graphs_yet(monkeypatch):
    """Those that cuDNN has built are kept for the whole process."""
    monkeypatch.setitem(gpu_attention.ONE_CALL, "cuDNN frontend", gpu_peers.CudnnFrontend())


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the peers' packages; returns the graphs that cuDNN's is asked for."""
    graphs = []

    def pygraph(**types):
        graphs.append(PlainGraph(**types))
        return graphs[-1]

    cudnn = dict(
        pygraph=pygraph,
        create_handle=object,
        set_stream=lambda handle, stream: None,
        data_type=SimpleNamespace(BFLOAT16=0, HALF=1, FLOAT=2),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
    )
    for name, contents in {"fa3_fwd_interface": plain_fa3(), "flash_attn.cute": plain_fa4(), "cudnn": cudnn}.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return graphs


@pytest.fixture
def dry(monkeypatch):
    """benchmarks.gpu as with --dry; returns its timer."""
    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    return gpu.Timer()


@pytest.mark.parametrize("mask_rows", (1, 3))
def test_key_lists_name_exactly_the_visible_keys(mask_rows):
    mask = torch.rand(mask_rows, 50, generator=torch.Generator().manual_seed(0)) < 0.4
    if mask_rows > 1:
        mask[1] = False
    table_, lengths = gpu_peers.key_list(mask, 3)
    assert table_.dtype == lengths.dtype == torch.int32 and table_.is_contiguous()
    assert table_.shape == (3, int(lengths.max()))
    for row, (places, length, visible) in enumerate(zip(table_, lengths, mask.expand(3, -1))):
        assert torch.equal(places[:length].long() - 50 * row, visible.nonzero()[:, 0])
        assert ((places >= 50 * row) & (places < 50 * (row + 1))).all()  # the rest too is memory of the row


def test_key_lists_of_a_source_without_visible_keys():
    assert gpu_peers.key_list(torch.zeros(1, 50, dtype=torch.bool), 2).table.shape == (2, 0)


@pytest.mark.parametrize("partial", (gpu_peers.fa3_partial, gpu_peers.fa4_partial))
@pytest.mark.parametrize("visible", VISIBLE)
@pytest.mark.parametrize("readers", (1, 3))
def test_one_call_per_source_reads_the_visible_keys_and_copies_none(libraries, partial, visible, readers):
    case = Case(TOY, "bf16", VISIBLE[visible], readers, "cpu", training=False)

    def in_place(query, key, value, keys):
        assert any(key is s.key and value is s.value for s in case.sources)
        assert gpu_peers.pages(key).data_ptr() == key.data_ptr()
        return partial(query, key, value, keys)

    out = gpu_peers.per_source(in_place, case.query, case.sources, case.lists)
    assert case.error("peer", out) < 0.01
    hidden = case.lists[-1]
    if hidden is not None:  # another key in the list is another result
        hidden.table[:, 0] = int((~case.sources[-1].key_mask[0]).nonzero()[0])
        wrong_out = gpu_peers.per_source(partial, case.query, case.sources, case.lists)
        with pytest.raises(AssertionError):
            case.error("peer", wrong_out)


def test_one_call_per_source_leaves_out_sources_without_visible_keys(libraries):
    case = Case(TOY, "bf16", (0.5, 0.0, 0.5), 2, "cpu", training=False)
    out = gpu_peers.per_source(gpu_peers.fa4_partial, case.query, case.sources, case.lists)
    assert case.error("peer", out) < 0.01
    case = Case(TOY, "bf16", (0.0, 0.0, 0.0), 2, "cpu", training=False)
    with pytest.raises(NotRun, match="no key is visible"):
        gpu_peers.per_source(gpu_peers.fa4_partial, case.query, case.sources, case.lists)


@pytest.mark.parametrize("visible", ("100%", "30%"))
@pytest.mark.parametrize("training", (False, True))
def test_gpu_peers_of_attention_are_right_where_their_libraries_are(libraries, visible, training):
    """Libraries that keep to their contracts; in training the gradients are compared too."""
    case = Case(TOY, "bf16", VISIBLE[visible], 2, "cpu", training)
    calls = contenders(case)
    how = "cat" if visible == "100%" else "gather"
    for name in ("FA3", "FA4", "cuDNN frontend", "SDPA (cuDNN)", "SDPA (flash)", "SDPA (efficient)"):
        assert f"{how} + {name}" in calls
    for name in (f"{how} + FA3", f"{how} + FA4", f"{how} + cuDNN frontend", OURS):
        if training:
            assert case.error_of_gradients(name, calls[name]) < 0.02
        else:
            assert case.error(name, calls[name]()) < 0.01
    with pytest.raises(AssertionError):
        if training:
            case.error_of_gradients("peer", lambda: calls["naive"]() + case.query * 0.01)
        else:
            case.error("peer", calls["naive"]() * 1.1)
    if training:
        for name in ("per source + FA3", "per source + FA4"):
            with pytest.raises(NotRun, match="backward"):
                calls[name]()


def test_gpu_peers_of_masks_are_right_where_their_libraries_are(libraries):
    target, ran = Target(toy=True, compiles=False), set()
    for build in (mask_cases.causal, mask_cases.window, mask_cases.blocks, mask_cases.padding, mask_cases.grouped):
        more = {mask_cases.padding: (2048, "30, 60, 90, 100%"), mask_cases.grouped: (4096, 4)}.get(build, ())
        case = build(gpu_masks.WIDE, "bf16", target, *more)
        calls, problem = gpu_masks.contenders(case, target), case.problem("bf16", {})
        for name in calls.keys() & {"FA3", "FA4", "FA3, lengths", "FA4, lengths"}:
            assert problem.error(name, calls[name]()) < 0.01
            ran.add((case.op, name[:3]))
    assert ran == {(op, name) for op in ("causal", "window", "padding", "grouped heads") for name in ("FA3", "FA4")}


def test_cudnn_builds_a_graph_once_per_layout_and_asks_for_the_lse_in_training_alone(libraries):
    attend = gpu_peers.CudnnFrontend()
    query, key, value = (torch.randn(2, tokens, 2, 40).bfloat16() for tokens in (20, 30, 30))
    for _ in range(2):
        attend(query, key, value)
    assert len(libraries) == 1 and libraries[0].results[1] is None
    fused = torch.randn(2, 30, 3, 2, 40).bfloat16()[:, :, 1]
    attend(query, fused, value)
    assert len(libraries) == 2
    for _ in range(2):
        attend(query.requires_grad_(), key, value).sum().backward()
    assert len(libraries) == 4 and libraries[2].results[1] is not None


def test_a_peer_that_is_missing_or_refuses_has_a_row_with_its_reason(dry, monkeypatch):
    for name in gpu_peers.WHEELS:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    case = Case(TOY, "bf16", VISIBLE["30%"], 2, "cpu", training=False)

    class OwnError(Exception):
        pass

    def refuse_strangely():
        raise OwnError("too small\nand more")

    calls = {**contenders(case), "strange": refuse_strangely}
    rows = {row["contender"]: row for row in gpu.compare({}, 1.0, calls, case.error, dry)}
    assert rows[OURS]["not_run"] == "dry run"
    for backend, language in (("triton", "Triton"), ("cuda", "CUDA")):  # on CPU tensors
        assert f"backend: '{backend}' cannot run: " in rows[f"{OURS} ({language})"]["not_run"]
    for name in ("gather + FA3", "per source + FA3"):
        assert rows[name]["not_run"].startswith("fa3-fwd: ModuleNotFoundError"), rows[name]
    for name in ("gather + FA4", "per source + FA4"):
        assert rows[name]["not_run"].startswith("flash-attn-4: ModuleNotFoundError"), rows[name]
    assert rows["gather + cuDNN frontend"]["not_run"].startswith("nvidia-cudnn-frontend: ModuleNotFoundError")
    assert rows["strange"]["not_run"] == "OwnError: too small"
    with pytest.raises(OwnError):  # from ours it is a fault to be seen
        list(gpu.compare({}, 1.0, {OURS: refuse_strangely}, case.error, dry))


def test_the_gpu_script_names_the_wheels_of_all_peers():
    script = (Path(__file__).parent.parent / "benchmarks" / "gpu_run.sh").read_text()
    assert all(f" {package}==" in script for package in gpu_peers.WHEELS.values())
