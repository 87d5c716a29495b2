"""Does the emulator notice? Breaks the Hopper kernel one line at a time and runs it: every planted fault must show.

`python tests/hopper_faults.py [PART OF A NAME ...]` prints how each was found. A fault that stays unseen is a gap of the
emulator or of the cases.
"""

import multiprocessing
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import library_paths

sys.path.insert(0, str(Path(__file__).parent))

import emulated
from eight_bit_inputs import problem

from lr_kernels.testing import AttentionCase, AttentionInputs, attention_inputs, check_attention

CSRC = emulated.ROOT / "csrc"
PLAIN, GENERAL = "kPlain", "kGeneral"

_LONG = {"batch": 1, "queries": 131, "heads": 2}
CASES = {
    "dense": AttentionCase("dense", **_LONG, keys=(700,), rows=(None,)),
    "short": AttentionCase("short", batch=1, queries=70, heads=1, keys=(90,), rows=(None,)),
    "several": AttentionCase("several", batch=2, queries=150, heads=1, keys=(257, 64, 401), rows=(None, None, 1)),
    "rows": AttentionCase("rows", batch=3, queries=70, heads=1, keys=(70, 190), rows=(None, (1, -1, 0))),
    "listed": AttentionCase("listed", batch=2, queries=100, heads=1, keys=(700, 300), rows=(None, 1), visible=0.4),
    "classes": AttentionCase(
        "classes", batch=2, queries=300, heads=1, keys=(310, 200), rows=(None, 1), visible=0.6, groups=3
    ),
    "nothing": AttentionCase("nothing", batch=1, queries=40, heads=1, keys=(99, 50), rows=(None, 1), visible=0.0),
    "nearly": AttentionCase("nearly", batch=1, queries=70, heads=1, keys=(100,), rows=(None,), visible=0.97),
    "few": AttentionCase("few", batch=1, queries=70, heads=1, keys=(5,), rows=(None,), key_bias=True),
    "huge": AttentionCase("huge", batch=1, queries=70, heads=1, keys=(90, 40), rows=(None, 1), visible=0.6),
    "far": AttentionCase("far", batch=1, queries=70, heads=1, keys=(100,), rows=(None,), key_bias=True),
    "apart": AttentionCase("apart", batch=1, queries=70, heads=1, keys=(90, 90), rows=(None, None), softmax_groups=(0, 1)),
    "bias": AttentionCase("bias", batch=2, queries=130, heads=1, keys=(640, 90), rows=(None, 1), key_bias=True),
    "strengths": AttentionCase(
        "strengths", batch=2, queries=70, heads=2, keys=(300, 170), rows=(None, 1), key_bias=True,
        logit_scale=(1.0, -0.5), logit_bias=(0.3, 2.0),
    ),
    "moved": AttentionCase(
        "moved", batch=2, queries=70, heads=1, keys=(300, 170), rows=(None, 1), value_index=True, visible=0.7
    ),
    "eight": AttentionCase(
        "eight", batch=2, queries=70, heads=2, keys=(500, 300), rows=(None, 1), visible=0.7, value_index=True
    ),
    "softmaxes": AttentionCase(
        "softmaxes", batch=2, queries=200, heads=2, keys=(300, 170, 64), rows=(None, 1, None), softmax_groups=(0, 1, 2)
    ),
}  # fmt: skip
TIMINGS = (
    emulated.Timing(0, 0, 3), emulated.Timing(2, 1, 3), emulated.Timing(2, 2, 3), emulated.Timing(1, 0, 3),
    emulated.Timing(0, 4, 3), emulated.Timing(2, 5, 3, 2),
)  # fmt: skip


class Fault(NamedTuple):
    """One line of a file under csrc/cuda/sm90, changed."""

    name: str
    file: str
    old: str
    new: str
    cases: tuple[str, ...]
    head_dim: int = 64
    kind: str = PLAIN


def fault(name: str, file: str, old: str, new: str, cases: str, head_dim: int = 64, kind: str = PLAIN) -> Fault:
    return Fault(name, f"cuda/sm90/{file}.h", old, new, tuple(cases.split()), head_dim, kind)


FAULTS = (
    # layouts and descriptors
    fault("keys' stride between rows", "config", "descriptor(tile, 16, EightRows, Swizzle)", "descriptor(tile, 16, EightRows / 2, Swizzle)", "short"),
    fault("values' offsets swapped", "config", "descriptor(tile, Column, EightRows, Swizzle)", "descriptor(tile, EightRows, Column, Swizzle)", "short", 128),
    fault("no swizzle in the copies", "config", "((unit ^ row * Width / 8) & (Width - 1)) * 16", "(unit & (Width - 1)) * 16", "listed"),
    fault("tiles not aligned to the swizzle", "config", "(shifts + C::ShiftBytes + 1023) & ~1023u", "(shifts + C::ShiftBytes + 127) & ~127u", "listed"),
    fault("channel step of a tile", "config", "2 * k % Width * 16) / 16", "2 * k % Width * 8) / 16", "short"),
    fault("channel step over columns", "config", "2 * k / Width * Column + ", "", "short", 80),
    fault("row step of the values", "config", "return 2 * k * EightRows / 16;", "return k * EightRows / 16;", "short"),
    fault("values not transposed", "consume", "Wgmma<D, C::Half, true>", "Wgmma<D, C::Half, false>", "short"),
    fault("queries' registers swapped", "consume", "q[k / 2][k % 2 * 2 + r]", "q[k / 2][k % 2 + 2 * r]", "short"),
    fault("results' rows swapped", "consume", "o[i] *= softmax.shrink[i / 2 % 2]", "o[i] *= softmax.shrink[i % 2]", "dense"),
    fault("channels that fill a step up not zeroed", "kernels", "if (C::Chunks < C::Keys::Units) {", "if (false) {", "listed", 40),
    fault("channels of TMA's second column", "produce", "i * C::Keys::Width * 8, h, start", "i * C::Keys::Width * 4, h, start", "short", 128),
    fault("queries of shared memory in another layout", "consume", "C::Queries::place(warp * 16 + i, unit)", "C::Queries::place(warp * 16 + i, unit ^ 1)", "short", 256),
    # order of copies and products
    fault("no fence between copies and products", "consume", '"full_value");\n      see_copies();', '"full_value");', "listed"),
    fault("queries used before all warps have copied theirs", "consume", "    barrier_sync(3 + number, 128);  // walk", "    // walk", "short", 256),
    fault("gathered tiles taken for those of TMA", "consume", "if (C::SharedQueries || x.gathers) fence_async();", "if (C::SharedQueries) fence_async();", "listed"),
    fault("zeros not fenced before TMA", "kernels", "    fence_async();  // TMA may write there next\n", "", "dense", 40),
    fault("no wgmma.fence", "consume", "      pin(o);\n      wgmma_fence();\n      start_scores();", "      pin(o);\n      start_scores();", "dense"),
    fault("scores read in flight", "consume", "wgmma_wait<1>();", "wgmma_wait<2>();", "dense"),
    fault("values not waited for", "consume", "    wgmma_wait<0>();\n    pin(o);\n    arrive(shared.empty_value", "    pin(o);\n    arrive(shared.empty_value", "dense"),
    fault("weights packed while the last ones are read", "consume", "      // Here and not before the scores", "      pack_weights();\n      // Here and not before the scores", "dense"),
    fault("values released before they are read", "consume", "    wgmma_wait<0>();\n    pin(o);\n    arrive(shared.empty_value(value.stage));", "    arrive(shared.empty_value(value.stage));\n    wgmma_wait<0>();\n    pin(o);", "dense"),
    fault("shifts released before they are read", "consume", "      softmax.template add_shifted<BN>(s, shuffle(w.alpha, cursor.source), shared.shift(key.stage, 0));\n      arrive(shared.empty_key(key.stage));", "      arrive(shared.empty_key(key.stage));\n      softmax.template add_shifted<BN>(s, shuffle(w.alpha, cursor.source), shared.shift(key.stage, 0));", "bias strengths", kind=GENERAL),
    fault("producer does not wait for free keys", "produce", 'if (ring.round) mbarrier_wait(shared.empty_key(ring.stage), ring.round - 1, "empty_key");', "", "dense"),
    fault("producer waits for the wrong phase", "produce", "shared.empty_value(ring.stage), ring.round - 1", "shared.empty_value(ring.stage), ring.round", "dense"),
    fault("consumer does not wait for values", "consume", '      mbarrier_wait(shared.full_value(value.stage), value.round, "full_value");\n      see', "      see", "dense"),
    fault("consumer does not wait for keys", "consume", '    mbarrier_wait(shared.full_key(key.stage), key.round, "full_key");\n    see', "    see", "short"),
    fault("consumer does not wait for the next keys", "consume", "if (t + 1 < tiles) mbarrier_wait", "if (false) mbarrier_wait", "dense"),
    fault("round counted twice", "config", "++stage == Stages) stage = 0, ++round;", "++stage == Stages) stage = 0, round += 2;", "dense"),
    fault("round never counted", "config", "++stage == Stages) stage = 0, ++round;", "++stage == Stages) stage = 0;", "dense"),
    # barriers
    fault("too few arrivals expected", "kernels", "mbarrier_init(shared.empty_key(i), 4 * C::Consumers)", "mbarrier_init(shared.empty_key(i), C::Consumers)", "dense"),
    fault("too many arrivals expected", "kernels", "mbarrier_init(shared.full_value(i), 128)", "mbarrier_init(shared.full_value(i), 129)", "short"),
    fault("shifts not announced", "kernels", "C::General ? 128 + 4 : 128", "128", "bias", kind=GENERAL),
    fault("copies never announced", "produce", "        copy_async_arrive(shared.full_value(ring.stage));\n", "", "listed"),
    fault("barriers used before they are there", "kernels", "  sync_block();\n", "", "short"),
    fault("nobody has the first turn", "consume", "if (number == C::Consumers - 1) barrier_arrive(1, 256);", "", "short"),
    fault("the last turn is left over", "consume", "if (number == 0) barrier_sync(1, 256);", "", "short"),
    fault("turns of different counts", "consume", "barrier_arrive(1 + (number + 1) % C::Consumers, 256)", "barrier_arrive(1 + (number + 1) % C::Consumers, 128)", "short"),
    fault("TMA: too few bytes announced", "produce", "mbarrier_arrive_expect(barrier, C::Keys::Bytes)", "mbarrier_arrive_expect(barrier, C::Keys::Bytes / 2)", "short"),
    fault("TMA: too many bytes announced", "produce", "mbarrier_arrive_expect(barrier, C::Keys::Bytes)", "mbarrier_arrive_expect(barrier, C::Keys::Bytes + 128)", "short"),
    fault("TMA: nobody arrives for the other threads", "produce", "      mbarrier_arrive(barrier, 127);\n", "", "short"),
    fault("more registers than there are", "config", "ConsumerRegisters = 224;\n  static_assert(Consumers * ConsumerRegisters + ProducerRegisters <= (Consumers + 1) * LaunchRegisters);", "ConsumerRegisters = 240;", "short"),
    # 8 bits
    fault("bytes become numbers before they have landed", "produce", "copy_async_wait<2>()", "copy_async_wait<3>()", "eight", kind=GENERAL),
    fault("groups of copies not told apart", "produce", "      copy_async_commit();\n", "", "eight", kind=GENERAL),
    fault("scale of another tile", "produce", "tile(behind), scale[2]", "tile(behind), scale[1]", "eight", kind=GENERAL),
    fault("scale of another row", "produce", "shuffle(scale, at.row)", "shuffle(scale, at.row ^ 1)", "eight", kind=GENERAL),
    fault("scale of the key for its value", "produce", "values ? keys.value(token, exists) : token", "token", "eight", kind=GENERAL),
    fault("numbers never announced", "produce", "    mbarrier_arrive(barrier);\n", "", "eight", kind=GENERAL),
    fault("numbers not fenced", "consume", '"full_value");\n      see_copies();', '"full_value");', "eight", kind=GENERAL),
    fault("bytes in the place of others", "produce", "8 * unit,", "8 * (unit ^ 1),", "eight", kind=GENERAL),
    fault("8-bit producer does not wait for free tiles", "produce", "        if (ring.round)\n          mbarrier_wait(values", "        if (false)\n          mbarrier_wait(values", "eight", kind=GENERAL),
    # what is computed
    fault("last tile not masked", "consume", "if (valid < BN) {", "if (valid < 0) {", "short"),
    fault("one key too few", "consume", "i % 2 + column >= valid", "i % 2 + column >= valid - 1", "short"),
    fault("keys past the end have a weight", "produce", "exists ? shift * kLog2e : -INFINITY", "shift * kLog2e", "few", kind=GENERAL),
    fault("list of the wrong row", "produce", "list += w.c * source.index_stride[0] + row * source.index_stride[1]", "list += w.c * source.index_stride[0]", "listed"),
    fault("list of the wrong class", "produce", "list += w.c * source.index_stride[0] + ", "list += ", "classes"),
    fault("reads past the list", "produce", "return place >= stop ? 0", "return place >= stop + 64 ? 0", "nearly"),
    fault("row of another batch row", "work", "s.r == 1 ? 0 : b", "0", "several"),
    fault("a source that is not read", "work", "if (wanted < 0 ||", "if (", "rows"),
    fault("a sum not joined over the lanes", "consume", "      sum[r] += shuffle_xor(sum[r], 2);\n", "", "short"),
    fault("queries past the end written", "consume", "exists[r] = at < w.end;", "exists[r] = at < w.end + 1;", "short"),
    fault("strength of another source", "consume", "shuffle(w.alpha, cursor.source)", "shuffle(w.alpha, 0)", "strengths", kind=GENERAL),
    fault("values of another place", "produce", "return entry < 0 ? 0 : entry < last ? entry : last;", "return token;", "moved", kind=GENERAL),
    fault("results of another group added", "consume", "if (g > 0) o[i] += load_own", "if (g > 1) o[i] += load_own", "softmaxes", kind=GENERAL),
    fault("weight of another query", "consume", "rows.query[r] * p.weight_stride[g][1]", "rows.query[0] * p.weight_stride[g][1]", "softmaxes", kind=GENERAL),
    fault("a part of the keys left out", "work", "const int low = clamp(int(all * part / x.parts)", "const int low = clamp(int(all * part / x.parts) + part", "dense"),
    fault("a part without keys counts in the merge", "kernels", "if (!(load_global(sums + 2 * i * cells + 1) == 0)) top", "top", "far", kind=GENERAL),
    fault("parts merged without their weights", "kernels", "return float(mine) * exp2_fast", "return exp2_fast", "dense"),
    fault("only the last softmax group is looked at", "consume", "again[r] |= rows.exists[r] && (", "again[r] = rows.exists[r] && (", "apart", kind=GENERAL),
    fault("numbers that left fp32 not done again", "consume", "again[r] |= rows.exists[r] && (", "again[r] |= false && (", "huge"),
    fault("done again with another value", "precise", "value.template number<C::Half>(32 * k)", "value.template number<C::Half>(16 * k)", "huge"),
    fault("done again without the list", "precise", "if (source.key_index)\n", "if (false)\n", "huge"),
    fault("lse without the sum", "work", "top + double(log2_fast(float(sum))) * kLn2", "top", "short"),
)  # fmt: skip


def compile_fault(x: Fault, folder: Path) -> Path:
    """The emulator with the fault: its own objects, but for the kernels of one head_dim."""
    text = (CSRC / x.file).read_text()
    assert text.count(x.old) >= 1, f"{x.name}: {x.old!r} is not in {x.file}"
    changed = folder / x.file
    changed.parent.mkdir(parents=True, exist_ok=True)
    changed.write_text(text.replace(x.old, x.new))
    objects = emulated.BUILD / "CMakeFiles"
    kept = [*(objects / "_C_emulator.dir" / "tests" / "emulator").glob("*.o")]
    kept += [o for o in objects.glob("sm90_emulated_*.dir/tests/emulator/*.o") if f"_{x.head_dim}.dir" not in str(o)]
    kernels, library = folder / "kernels.o", folder / "emulator.so"
    tests = emulated.ROOT / "tests"
    compiler = ["g++", "-std=gnu++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w"]
    for command in (
        [*compiler, f"-I{folder}", f"-I{CSRC}", f"-I{tests}", f"-DLR_HEAD_DIM={x.head_dim}", f"-DLR_KIND={x.kind}",
         "-c", tests / "emulator" / "one_kernel.cpp", "-o", kernels],
        [*compiler, "-shared", kernels, *kept, *(f"-L{p}" for p in library_paths()), "-ltorch", "-ltorch_cpu", "-o", library],
    ):  # fmt: skip
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert run.returncode == 0, f"{x.name}: {run.stderr}"
    return library


def inputs_of(name: str, head_dim: int) -> AttentionInputs:
    """Inputs of a case; hidden keys and values are NaN, those of the cases huge and far are beyond fp32."""
    if name == "eight":
        return problem(replace(CASES[name], head_dim=head_dim), torch.bfloat16, torch.int8, torch.float8_e4m3fn)
    inputs = attention_inputs(replace(CASES[name], head_dim=head_dim), torch.bfloat16)
    for source in inputs.sources:
        if source.key_mask is not None:
            source.key_mask[:, 0] = False  # what is copied in place of nothing
            hidden = ~source.key_mask.any(0)
            source.key[:, hidden] = source.value[:, hidden] = torch.nan
        if name == "huge":
            source.key.mul_(1e12)
        if name == "far":
            source.key_bias.fill_(torch.finfo(torch.float32).min)
    if name == "apart":
        bias = torch.full((1, 90), torch.finfo(torch.float32).min)
        inputs.sources[0] = inputs.sources[0]._replace(key_bias=bias)
    return inputs


def controls() -> tuple[Fault, ...]:
    """For each head_dim and kind, the kernel as it is, with all cases that faults of theirs run: nothing may show."""
    cases: dict[tuple[int, str], set[str]] = {}
    for x in FAULTS:
        cases.setdefault((x.head_dim, x.kind), set()).update(x.cases)
    name = "cuda/sm90/consume.h"
    return tuple(
        Fault(f"control {d} {kind}", name, "namespace lr", "namespace lr", tuple(sorted(cases[d, kind])), d, kind)
        for d, kind in cases
    )


def symptom(x: Fault, library: Path) -> str | None:
    """What shows the fault, or None. Only for a process that has not loaded the emulator."""
    emulated.use(library)
    for timing in TIMINGS[:2] if x.old == x.new else TIMINGS:
        for name in x.cases:
            inputs = inputs_of(name, x.head_dim)
            try:
                check_attention(lambda *a, timing=timing, **k: emulated.attend(*a, timing=timing, **k), inputs)
            except (RuntimeError, AssertionError) as error:
                return str(error).splitlines()[0]
    return None


def found_in_child(x: Fault, library: Path, pipe) -> None:
    torch.set_num_threads(1)
    pipe.send(symptom(x, library))


def hunt(faults: tuple[Fault, ...]) -> dict[str, str | None]:
    """By the name of a fault, its symptom."""
    emulated.build(emulated.BUILD)
    fork, found = multiprocessing.get_context("fork"), {}
    for x in faults:
        with tempfile.TemporaryDirectory() as folder:
            library = compile_fault(x, Path(folder))
            receiver, sender = fork.Pipe(False)
            child = fork.Process(target=found_in_child, args=(x, library, sender))
            child.start()
            sender.close()
            try:
                found[x.name] = receiver.recv() if receiver.poll(120) else "it never ends"
            except EOFError:
                found[x.name] = "the process ends"
            child.kill()
            child.join()
        if x.old != x.new:
            print(f"{'found ' if found[x.name] else 'MISSED'}  {x.name}: {found[x.name]}", flush=True)
    return found


if __name__ == "__main__":
    wanted = sys.argv[1:] or [""]
    spurious = {name: how for name, how in hunt(controls()).items() if how is not None}
    assert not spurious, f"the kernel as it is: {spurious}"
    result = hunt(tuple(x for x in FAULTS if any(part in x.name for part in wanted)))
    missed = [name for name, how in result.items() if how is None]
    print(f"{len(result) - len(missed)} of {len(result)} found")
    sys.exit(bool(missed))
