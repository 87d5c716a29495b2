"""The benchmarks of masks, padding and grouped heads, and that of runs in several processes, at toy sizes."""

import pytest

from benchmarks import many, mask_cases, masks
from benchmarks.harness import OURS, NotRun
from benchmarks.target import Target


@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_every_contender_of_the_cases_of_masks_is_right_and_a_wrong_one_is_refused(dtype):
    """At toy sizes, uncompiled; diffusers' backends that do not run say why."""
    ops, refused = set(), {}
    for build in masks.problems((dtype,), Target(toy=True, compiles=False)):
        for problem in build():
            ops.add(problem.op)
            assert next(iter(problem.contenders)) == OURS and problem.baseline in problem.contenders
            for name, contender in problem.contenders.items():
                try:
                    result = contender.call()
                except NotRun as reason:
                    refused[name] = str(reason)
                    continue
                assert problem.error(name, result) < 0.1
                with pytest.raises(AssertionError):
                    problem.error(name, result + 1)
    assert ops == {"causal", "window", "block mask", "padding", "grouped heads"}
    assert "not supported" in refused["_native_flash"] and all(refused.values())
    assert not refused.keys() & {"native", "_native_math", "FlexAttention"}


def test_a_mask_of_other_keys_is_a_wrong_result():
    for build in (mask_cases.causal, mask_cases.window, mask_cases.blocks):
        case = build(masks.LAYERS[0], "fp32", Target(toy=True))
        problem = case.problem("fp32", {OURS: case.ours("cpu")})
        problem.error(OURS, case.ours("cpu")())
        problem.error(OURS + mask_cases.ALL_KEYS, case.all_keys("cpu")())
        with pytest.raises(AssertionError):
            problem.error(OURS, case.all_keys("cpu")())


def test_a_run_of_many_prompts_in_two_processes_is_timed(monkeypatch):
    monkeypatch.setattr(many, "PROCESSES", (2,))
    (row,) = many.measure(["ball"], samples=1, steps=1, rounds=1)
    assert (row["processes"], row["images"], row["byte_identical"]) == ("2", str(len(many.PLACES)), "yes")
    assert 0 < float(row["seconds_drawing"]) < float(row["seconds_command"])


def test_runs_of_many_prompts_that_differ_in_a_byte_are_refused(monkeypatch):
    def other_files(run, output, processes):
        output.mkdir()
        (output / "0.png").write_bytes(bytes([processes]))
        return 1.0, 2.0

    monkeypatch.setattr(many, "timed", other_files)
    with pytest.raises(SystemExit, match=r"2 processes, round 0: .*0\.png"):
        many.measure(["ball"], samples=1, steps=1, rounds=1)
