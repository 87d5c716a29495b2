"""`python -m benchmarks.readme`: rewrites the tables of README and of pages from the files under benchmarks/results."""

import csv
import json
import re
from pathlib import Path

from .harness import OURS
from .mask_cases import ALL_KEYS
from .table import BF16_PAYS
from .target import FLOOR

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAYERS = ("sd64", "sd32", "sd16", "xl64", "xl32")


def attention_table() -> str:
    """How much faster lr_kernels is than the strongest ways of today, per layer and dtype."""
    with (RESULTS / "cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    # A file of before the other cases has no column `op`, nor the measured peak
    rows = [r for r in rows if r.get("op", "attention") == "attention"]
    found = {(r["layer"], r["dtype"], r["visible"], r["contender"]): r for r in rows}
    lines = [
        "| layer (tokens × heads × head_dim) | dtype | vs cat + SDPA | % of FMA peak | 67 % visible: vs SDPA + mask "
        "| vs gather + SDPA | extra memory vs cat + SDPA |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer in LAYERS:
        for dtype in ("fp32", "bf16"):
            ours, cat = (found[layer, dtype, "100%", name] for name in ("lr_kernels", "cat + SDPA"))
            mask, gather = (found[layer, dtype, "67%", name] for name in ("SDPA + mask", "gather + SDPA"))
            lines.append(
                f"| {ours['model']} ({ours['shape'].replace('x', ' × ')}) | {dtype} | {cat['ours_is_faster']}× "
                f"| {ours.get('percent_of_peak', '–')} | {mask['ours_is_faster']}× | {gather['ours_is_faster']}× "
                f"| {ours['peak_mib']} / {cat['peak_mib']} MiB |"
            )
    lines += ["", f"{about_cpu(rows[0])}: "]
    lines[-1] += "batch 2, three sources, medians of interleaved runs, memory beyond inputs and result; "
    lines[-1] += f"`make bench` writes the file behind this table. {BF16_PAYS}"
    return "\n".join(lines)


def operators_table() -> str:
    """Every other operator against the strongest peer of each of its cases."""
    with (RESULTS / "operators.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases: dict[str, dict[tuple[str, str], list[dict[str, str]]]] = {}
    for row in rows:
        timed = row["ms"] and not row["contender"].startswith(FLOOR)
        if timed:
            cases.setdefault(row["op"], {}).setdefault((row["dtype"], row["layer"]), []).append(row)
    lines = [
        "| operator | cases | vs the strongest peer: fp32 | bf16 | which those are | extra memory, largest case |",
        "|---|---|---|---|---|---|",
    ]
    for op, found in cases.items():
        best = {case: strongest([r for r in group if r["contender"] != OURS], "") for case, group in found.items()}
        fp32 = [r for (dtype, _), r in best.items() if dtype != "bf16"]  # masks, which have no dtype, among them
        bf16 = [r for (dtype, _), r in best.items() if dtype == "bf16"]
        names = "; ".join(dict.fromkeys(r["contender"] for r in best.values()))
        ours = found[fp32[-1]["dtype"], fp32[-1]["layer"]][0]
        memory = f"{ours['peak_mib']} / {fp32[-1]['peak_mib']} MiB"
        lines.append(f"| `{op}` | {len(fp32)} | {_range(fp32)} | {_range(bf16)} | {names} | {memory} |")
    text = (
        f"{about_cpu(rows[0])}: the range over the cases of SD1.5 and SDXL, medians of interleaved runs; below 1, in "
    )
    text += "bold, the peer is faster. The peer is the fastest of each case, torch.compile among them."
    return "\n".join([*lines, "", text])


def _range(rows: list[dict[str, str]]) -> str:
    """From the smallest to the largest of how many times as fast as the peers ours is; in bold where it is slower."""
    if not rows:
        return "–"
    low, high = (pick(float(r["ours_is_faster"]) for r in rows) for pick in (min, max))
    text = f"{low:.2f}–{high:.2f}×"
    return f"**{text}**" if low < 1 else text


GPU_LAYERS = (*LAYERS, "sd3", "flux")


def newest_gpu(part: str) -> list[dict[str, str]]:
    """Rows of one part of the newest run on a GPU; empty without one."""
    for path in sorted(RESULTS.glob(f"gpu-*/{part}.csv"), reverse=True):
        with path.open() as file:
            return list(csv.DictReader(file))
    return []


def strongest(rows: list[dict[str, str]], prefix: str) -> dict[str, str]:
    """The fastest contender whose name starts so."""
    return min((r for r in rows if r["contender"].startswith(prefix) and r["ms"]), key=lambda r: float(r["ms"]))


def about_cpu(m: dict[str, str]) -> str:
    return f"{m['device']} ({m['isa']}), {m['threads']} threads, torch {m['torch']}, commit {m['commit']}"


def about_gpu(m: dict[str, str]) -> str:
    return f"{m['device']}, torch {m['torch']}, Triton {m['triton']}, commit {m['commit']}"


def gpu_table() -> str:
    """Attention on a GPU: ours against the strongest way of each kind."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    rows = [r for r in newest_gpu("attention") if r["dtype"] == "bf16"]
    for row in rows:
        found.setdefault((row["layer"], row["visible"]), []).append(row)
    lines = [
        "| layer (tokens × heads × head_dim) | TFLOP/s | vs cat + a peer | 30 % visible: vs SDPA + mask "
        "| vs gather + a peer | extra memory vs cat + a peer |",
        "|---|---|---|---|---|---|",
    ]
    for layer in GPU_LAYERS:
        dense, masked = found[layer, "100%"], found[layer, "30%"]
        ours, cat = dense[0], strongest(dense, "cat + ")
        mask, gather = (strongest(masked, name) for name in ("SDPA + mask", "gather + "))
        lines.append(
            f"| {ours['model']} ({ours['shape'].replace('x', ' × ')}) | {float(ours['tflops']):.0f} "
            f"| {cat['ours_is_faster']}× | {mask['ours_is_faster']}× | {gather['ours_is_faster']}× "
            f"| {ours['peak_mib']} / {cat['peak_mib']} MiB |"
        )
    text = (
        f"{about_gpu(rows[0])}: bf16, batch 2, three sources, the card's own time, each against the fastest peer that "
    )
    text += "ran there (attention.csv lists them)."
    return "\n".join([*lines, "", text])


def step_table() -> str:
    """A whole denoising step of the retouch stage on a GPU."""
    cases: dict[str, list[dict[str, str]]] = {}
    rows = newest_gpu("unet")
    for row in rows:
        cases.setdefault(f"{row['model']}, {row['shape']}", []).append(row)
    lines = [
        "| UNet | lr_kernels, ms | nothing shared | two passes (MasaCtrl) | cat + SDPA with masks |",
        "|---|---|---|---|---|",
    ]
    for name, group in cases.items():
        by = {r["contender"]: r for r in group}
        others = (by[c] for c in ("nothing shared (stock)", "two passes (MasaCtrl)", "cat + SDPA with masks"))
        times = " | ".join(f"{r['ms']} ({r['ours_is_faster']}×)" for r in others)
        lines.append(f"| {name} | {by['lr_kernels']['ms']} | {times} |")
    return "\n".join([*lines, "", f"{about_gpu(rows[0])}: bf16, CUDA graphs, subject 30 % of the image."])


def retouch_table() -> str:
    """A retouch step on the CPU: all its self-attention, and the whole UNet."""
    with (RESULTS / "retouch.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| SD1.5, 6 rows, 64² | dtype | lr_kernels, s | nothing shared | two passes (MasaCtrl) | cat + SDPA with masks "
        "| extra memory vs cat |",
        "|---|---|---|---|---|---|---|",
    ]
    parts = {"retouch step": "self-attention, 16 layers", "whole step": "the whole UNet"}
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in rows):
        by = {r["contender"]: r for r in rows if (r["op"], r["dtype"]) == (op, dtype)}

        def time(name: str, by: dict[str, dict[str, str]] = by) -> str:
            return f"{float(by[name]['ms']) / 1e3:.2f} ({by[name]['ours_is_faster']}×)" if name in by else "–"

        names = ("nothing shared (stock)", "two passes (MasaCtrl)", "cat + SDPA with masks")
        ours, cat = by["lr_kernels"], by[names[-1]]
        times = " | ".join(map(time, names))
        lines.append(
            f"| {parts[op]} | {dtype} | {float(ours['ms']) / 1e3:.2f} | {times} "
            f"| {ours['peak_mib']} / {cat['peak_mib']} MiB |"
        )
    about = f"{about_cpu(rows[0])}: random weights, a subject of 30 % of the image, medians of interleaved runs of "
    return "\n".join([*lines, "", f"{about}one process. {BF16_PAYS}"])


BASELINES = ("SDPA", "SDPA + mask", "native")
"""What the cases of masks are compared with first: SDPA, which is diffusers' native backend too."""


def masks_table() -> str:
    """Causal order, windows, blocks, padding and grouped heads on the CPU."""
    with (RESULTS / "masks.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("op", "model", "shape", "visible", "dtype"))
        cases.setdefault(key, {})[row["contender"]] = row
    lines = [
        "| what a query sees | queries × heads × head_dim | dtype | ms "
        "| visible keys: time ÷ that with all keys | vs SDPA | vs the fastest other | extra memory: ours / SDPA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (op, model, shape, visible, dtype), found in cases.items():
        ours, stock = found[OURS], next(found[name] for name in BASELINES if name in found)
        peers = [r for n, r in found.items() if r["ms"] and not n.startswith(OURS) and not n.endswith(ALL_KEYS)]
        others = [r for r in peers if r is not stock]
        whole, share, other = found.get(OURS + ALL_KEYS), "–", "–"
        if whole:
            share = f"{visible}: {1 / float(whole['ours_is_faster']):.2f}"
        if others:
            best = strongest(others, "")
            other = f"{best['ours_is_faster']}× ({best['contender']})"
        lines.append(
            f"| {op}: {model} | {shape.replace('x', ' × ')} | {dtype} | {ours['ms']} | {share} "
            f"| {stock['ours_is_faster']}× | {other} | {ours['peak_mib']} / {stock['peak_mib']} MiB |"
        )
    backends = [r for r in rows if r["op"] == "padding" and ", " not in r["contender"] and r["contender"] != OURS]
    every = dict.fromkeys(r["contender"] for r in backends)
    ran = dict.fromkeys(r["contender"] for r in backends if r["ms"])
    text = f"{about_cpu(rows[0])}: medians of interleaved rounds, and of the ratios of each round. "
    text += "Padding goes through diffusers' dispatch, against its default backend, which is SDPA. "
    text += f"Backends that take its mask on this machine: {', '.join(f'`{name}`' for name in ran)}; masks.csv says of "
    text += f"the {len(every) - len(ran)} others why they do not run. {BF16_PAYS}"
    return "\n".join([*lines, "", text])


STAGE_COLUMNS = {
    "identity": "identity ↑",
    "histogram": "colour histogram ↑",
    "encoder": "ImageNet encoder ↑",
    "background": "background right ↑",
    "position_std": "position spread ↑",
    "diversity": "1 − mIoU ↑",
    "layout_iou": "IoU with layout ↑",
}


def stage_lines(stages: dict[str, dict[str, str]]) -> list[str]:
    """A Markdown table of the columns that the stages have."""
    names = [name for name in STAGE_COLUMNS if name in next(iter(stages.values()))]
    lines = ["| stage | " + " | ".join(STAGE_COLUMNS[name] for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for stage, values in stages.items():
        mark = "**" if stage == "retouch" else ""
        lines.append(f"| {mark}{stage}{mark} | " + " | ".join(values[name] for name in names) + " |")
    return lines


def demo_table() -> str:
    """The toy model's metrics per stage."""
    report = json.loads((RESULTS / "demo.json").read_text())
    cells = {stage: {name: f"{x:.3f}" for name, x in found.items()} for stage, found in report["stages"].items()}
    pairs = (
        f"{pair}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        for pair, (mean, low, high) in report["identity_differences"].items()
    )
    about = f"{report['subject']}, {report['images']} images a stage; paired identity {'; '.join(pairs)}; "
    about += f"{report['instruction_set']}, torch {report['versions']['torch']}."
    intro = "`make demo`, on its own subject, one of the three on which the defaults were chosen:"
    return "\n".join([intro, "", *stage_lines(cells), "", about])


def method_table() -> str:
    """The toy evaluation: every method, and what attention sharing contributes for each subject."""
    found = json.loads((RESULTS / "evaluation" / "report.json").read_text())
    columns = {
        "identity": "identity ↑",
        "histogram": "colour histogram ↑",
        "encoder": "ImageNet encoder ↑",
        "background": "background right ↑",
        "outline_diversity": "1 − mIoU ↑",
        "layout_iou": "IoU with layout",
    }
    lines = [table_line(["method", *columns.values()]), "|---" * (len(columns) + 1) + "|"]
    for method, entry in found["methods"].items():
        shown = f"**{method}**" if method == "retouch" else method
        lines.append(table_line([shown, *(interval(entry[name]) for name in columns)]))
    subjects = found["concepts"]
    lines += ["", table_line(["retouch − control", "all", *subjects]), "|---" * (len(subjects) + 2) + "|"]
    for name in ("identity", "histogram", "encoder"):
        entry = found["differences"]["retouch"][name]
        cells = [entry["all"], *(entry["concepts"][subject] for subject in subjects)]
        lines.append(table_line([columns[name][:-2], *(interval(x, "+") for x in cells)]))
    asked = {"both_objects": "both objects", "other_shape": "the second one's shape", "other_color": "its colour"}
    lines += ["", table_line(["prompts with a second object", *asked.values()]), "|---" * (len(asked) + 1) + "|"]
    for method in ("personalized", "layout", "control", "retouch"):
        entry = found["methods"][method]
        lines.append(table_line([method, *(interval(entry[name]) for name in asked)]))
    m, count = found["machine"], found["methods"]["retouch"]["identity"]["values"]
    text = (
        f"{count} images of every method: {len(subjects)} subjects, 12 prompts each, half with a second object, "
        f"{found['samples']} samples; {round(100 * found['level'])} % intervals over subjects, prompts and samples. "
        f"{m['device']} ({m['isa']}), torch {m['torch']}, commit {m['commit']}; `make evaluation` draws, scores and "
        "compares anew, by [benchmarks/evaluation/toy.yaml](benchmarks/evaluation/toy.yaml)."
    )
    return "\n".join([*lines, "", text])


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def interval(entry: dict[str, float], sign: str = "") -> str:
    return f"{entry['mean']:{sign}.3f} [{entry['low']:{sign}.3f}, {entry['high']:{sign}.3f}]"


def many_table() -> str:
    """A run of `generate` in one process and in two."""
    with (RESULTS / "many.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = ["| processes | seconds of drawing | of the whole command | drawing, times as fast | command |"]
    lines.append("|---|---|---|---|---|")
    for r in rows:
        times = f"{r['drawing_as_fast']}× | {r['command_as_fast']}×"
        lines.append(f"| {r['processes']} | {r['seconds_drawing']} | {r['seconds_command']} | {times} |")
    m = rows[0]
    text = (
        f"{m['device']} ({m['isa']}), torch {m['torch']}, commit {m['commit']}: {m['images']} images of the toy model "
    )
    text += (
        f"by the method, {m['steps']} steps, one thread for each process, medians of {m['rounds']} rounds that take "
    )
    text += f"turns. The files of all runs are byte-identical: {m['byte_identical']}."
    return "\n".join([*lines, "", text])


def price_table() -> str:
    """Both stages beside plain generation."""
    with (RESULTS / "price.csv").open() as file:
        rows = list(csv.DictReader(file))
    lines = ["What the whole method costs, on the CPU at SD1.5's size:", ""]
    lines += ["| run | images through the UNet | seconds | times plain |", "|---|---|---|---|"]
    lines += [f"| {r['run']} | {r['rows']} | {r['seconds']} | {r['times_plain']} |" for r in rows]
    m = rows[0]
    about = f"{m['side']}², {m['steps']} steps, one image with guidance, fp32, random weights; {about_cpu(m)}."
    return "\n".join([*lines, "", about])


def transformers_rows(op: str) -> list[dict[str, str]]:
    with (RESULTS / "transformers.csv").open() as file:
        return [r for r in csv.DictReader(file) if r["op"] == op]


def by_contender(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """(layer, dtype, visible, model) -> contender -> row, in the order of the file."""
    found: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("layer", "dtype", "visible", "model"))
        found.setdefault(key, {})[row["contender"]] = row
    return found


def references_table() -> str:
    """Cached references: a layer, and calls of a small pipeline."""
    rows = transformers_rows("cached references")
    lines = [
        "| references | dtype | ms | stock: cat + SDPA | SDPA, concatenated before | 8-bit references "
        "| extra memory: ours / stock |",
        "|---|---|---|---|---|---|---|",
    ]
    calls = ["| call | seconds | stock takes |", "|---|---|---|"]
    for (layer, dtype, _, _), found in by_contender(rows).items():
        ours = found[OURS]
        if "SDPA, concatenated before" not in found:
            stock = float(found["stock"]["ms"])
            calls += [f"| {n} | {float(r['ms']) / 1e3:.2f} | {stock / float(r['ms']):.2f}× |" for n, r in found.items()]
            about = f"{ours['model']}, {ours['shape']}, {dtype}"
            continue
        cat, joined, small = (
            found[name] for name in ("cat + SDPA", "SDPA, concatenated before", f"{OURS}, 8-bit references")
        )
        lines.append(
            f"| {layer} | {dtype} | {ours['ms']} | {cat['ours_is_faster']}× | {joined['ours_is_faster']}× "
            f"| {1 / float(small['ours_is_faster']):.2f}× as fast | {ours['peak_mib']} / {cat['peak_mib']} MiB |"
        )
    lines += [
        "",
        f"{about_cpu(rows[0])}: attention of a layer with the heads of klein 9B (32 × 128) at a quarter of a ",
    ]
    lines[-1] += "megapixel's tokens, medians of interleaved rounds; how many times as long the others take is the "
    lines[-1] += "median of the ratios of each round."
    text = f"A whole call, {about}, random weights; `{OURS}` reads a bank, the row of the first prompt also makes it:"
    return "\n".join([*lines, "", text, "", *calls])


def eight_bits_table() -> str:
    """The error of attention's result with keys and values in 8 bits, by what shares a scale."""
    with (RESULTS / "eight_bit.csv").open() as file:
        rows = list(csv.DictReader(file))
    inputs = list(dict.fromkeys(r["inputs"] for r in rows))
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        errors.setdefault((row["dtype"], row["granularity"]), {}).setdefault(row["inputs"], []).append(
            float(row["error"])
        )
    lines = ["| dtype | one scale for each | " + " | ".join(inputs) + " |", "|---" * (len(inputs) + 2) + "|"]
    for (dtype, granularity), found in errors.items():
        cells = [f"{100 * sum(found[x]) / len(found[x]):.2f} %" for x in inputs]
        lines.append(f"| {dtype} | {granularity or '–'} | " + " | ".join(cells) + " |")
    m = rows[0]
    text = f"{m['device']} ({m['isa']}), torch {m['torch']}, commit {m['commit']}: relative L2 error of attention's "
    text += "result against float64, the mean of the layers; the banks have a scale for each token and head. "
    return "\n".join([*lines, "", text + "`python -m benchmarks.eight_bit` writes the file behind this table."])


def backend_table() -> str:
    """The attention backend against diffusers' own default."""
    rows = transformers_rows("attention backend")
    lines = ["| model | tokens | dtype | visible keys | ms | stock takes | extra memory: ours / stock |"]
    lines.append("|---|---|---|---|---|---|---|")
    for (layer, dtype, visible, model), found in by_contender(rows).items():
        ours, stock = found[OURS], found["native (stock)"]
        lines.append(
            f"| {model} | {layer.removesuffix(' tokens')} | {dtype} | {visible} | {ours['ms']} "
            f"| {stock['ours_is_faster']}× | {ours['peak_mib']} / {stock['peak_mib']} MiB |"
        )
    text = f"{about_cpu(rows[0])}: medians of interleaved rounds, and of the ratios of each round; "
    text += "24 heads of 128, random weights. "
    return "\n".join([*lines, "", text + "Below 1×, diffusers' default is faster."])


TABLES = {
    "attention": attention_table,
    "operators": operators_table,
    "masks": masks_table,
    "retouch": retouch_table,
    "gpu": gpu_table,
    "step": step_table,
    "demo": demo_table,
    "method": method_table,
    "price": price_table,
}


PAGES = {
    "README.md": TABLES,
    "docs/references.md": {"references": references_table, "eight bits": eight_bits_table},
    "docs/attention-backend.md": {"backend": backend_table},
    "docs/many-prompts.md": {"many": many_table},
}


def main() -> None:
    for page, tables in PAGES.items():
        path = ROOT / page
        text = path.read_text()
        for name, make in tables.items():
            table = make()
            marked = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text, count = re.subn(marked, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)
            if count != 1:
                raise SystemExit(f"{page}: expected one place marked 'table: {name}', found {count}")
        path.write_text(text)


if __name__ == "__main__":
    main()
