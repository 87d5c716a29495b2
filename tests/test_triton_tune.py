"""The tuner: what it tries, and that a tile which gives wrong numbers is never the fastest."""

import pytest
import torch

from lr_kernels.triton import tiles, tune

CASES = [tune.Case(head_dim, kind) for head_dim in (40, 80, 128) for kind in tune.KINDS]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"D{c.head_dim}-{c.kind}")
def test_the_tile_of_the_table_comes_first_and_none_twice(case):
    now = tune.table_tile(case, 90)
    found = tune.candidates(case, now)
    assert found[0] == now and len(found) == len(set(found)) > 10
    assert all(tile.D0 + tile.D1 >= case.head_dim for tile in found)


def test_only_the_case_gets_another_tile():
    other = tiles.Tile(16, 16, 4, 1, 64, 0)
    with tune.with_tile(tune.Case(64, "query"), other):
        assert tiles.backward_tile(90, 64, torch.bfloat16, "query") == other
        assert tiles.backward_tile(90, 64, torch.bfloat16, "source") != other
    assert tiles.backward_tile(90, 64, torch.bfloat16, "query") != other


@pytest.mark.parametrize("kind", ["dense", "gathered", "biased", "grouped"])
@pytest.mark.fault(number=37)
def test_a_tile_that_writes_nothing_is_not_timed(kind, device, monkeypatch):
    job = (tune.Case(40, kind), tune.table_tile(tune.Case(40, kind), 0), device)
    assert tune.compile_tile(job) == ""
    monkeypatch.setattr(tune, "kernel", lambda operator, backend: lambda *arguments: None)
    assert "finite on one side only" in tune.compile_tile(job)


def test_best_of_ranks_by_all_sizes():
    def row(BM, ms, reason=""):
        tile = tiles.Tile(BM, 64, 4, 3, 64, 0)._asdict()
        times = dict(zip((f"ms_{n}" for n in tune.TOKENS), ms))
        return {"arch": 90, "head_dim": 64, "kind": "dense", **tile, **times, "not_run": reason}

    rows = [row(128, ("2", "4")), row(64, ("1", "7")), row(256, ("1", "9")), row(32, ("", ""), "spills")]
    assert tune.best_of(rows) == [
        "D64 dense: best (64 64 4 3 64 0) 1 / 7 ms, first (128 64 4 3 64 0) 2 / 4 ms",
    ]
