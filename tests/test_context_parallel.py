"""Attention over several cards: processes on gloo against one process, for the backend under every kind of context
parallelism of diffusers and for layers that read more than their own tokens under Ulysses. parallel_cases.py has the
cases."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from parallel_cases import CASES, REFUSALS
from tiny_parallel import last_velocity, small_flux_pipeline

from lr_kernels.diffusers import CustomAttnProcessor, MultiSourceAttnProcessor, TokenMapAttnProcessor
from lr_kernels.testing import assert_matches

SCRIPT = Path(__file__).with_name("context_parallel_process.py")
PATIENCE = 280
"""Seconds for all groups, which count their own time too."""


@pytest.fixture(autouse=True)
def restored():
    """`set_attention_backend` changes the default of all models."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict]]:
    """By the number of processes, what each found of all cases."""
    folder = tmp_path_factory.mktemp("groups")
    paths = os.pathsep.join([str(SCRIPT.parent.parent), str(SCRIPT.parent)])
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, str(SCRIPT), str(folder)]
    with (folder / "log").open("w") as log:
        groups = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = groups.wait(PATIENCE)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(groups.pid, signal.SIGKILL)  # also those that were forked
    assert code == 0, (folder / "log").read_text()
    return {world: [torch.load(folder / f"found-{world}-{rank}") for rank in range(world)] for world in (2, 4)}


def joined(case, name: str, cards: list[dict]) -> torch.Tensor:
    """A tensor of a case, of what each card found."""
    of_cards = [x[name] for x in cards]
    if case.parts:
        return torch.cat(of_cards, 1)
    if name in ("out", "after", "maps"):
        assert all(torch.equal(x, of_cards[0]) for x in of_cards[1:]), f"{name}: cards have different ones"
        return of_cards[0]
    return torch.stack(of_cards).sum(0)


@pytest.mark.filterwarnings("ignore:.* covers")  # a model with random weights finds subjects nearly everywhere
@pytest.mark.parametrize("name", CASES)
@pytest.mark.fault(number=1)
def test_several_cards_find_what_one_finds(name, found):
    case = CASES[name]
    cards = [x[name] for x in found[case.world]]
    assert not any("error" in x for x in cards), "\n".join(x.get("where", "none") for x in cards)
    low, exact = case.alone(case.dtype), case.alone(torch.float64)
    assert all(x.keys() == exact.keys() for x in cards)
    for key in exact:
        assert_matches(joined(case, key, cards), low[key], exact[key].double(), key, case.dtype)


def test_the_documented_script_runs(found):
    cards = [x["script"] for x in found[2]]
    assert not any("error" in x for x in cards), cards[0]["where"]
    assert torch.equal(cards[0]["out"], cards[1]["out"])
    pipe = small_flux_pipeline()
    generator = torch.Generator().manual_seed(0)
    expected = last_velocity(pipe, lambda: pipe("a ball on a table", generator=generator))
    torch.testing.assert_close(cards[0], expected)


MESSAGES = {
    "a mask": "attn_mask: expected None under ring attention",
    "a mask, unified": "attn_mask: expected None under ring attention",
    "a causal mask": "is_causal: expected none",
    "dropout": "dropout_p: expected none",
    "fewer heads of keys": "key: expected shape (2, M, 4, 16) under context parallelism",
    "heads that two cards do not divide": "query: expected heads that ulysses_degree=2 divides, got 3",
    "heads too few for four cards": "query: expected heads that ulysses_degree=4 divides, got 2",
    "another backend's argument": "window_size: expected none",
    "a gradient of the mask": "attn_mask: expected no gradient under context parallelism",
    "a gradient of the lse": "return_lse: expected no gradient of the lse",
    "gradients of gradients": "_parallel_config: expected no gradients of gradients",
    "gradients of gradients, ring": "_parallel_config: expected no gradients of gradients",
    "gradients of other keys": "key: expected 8 tokens, as query has, for gradients under Ulysses",
    "a function, ring": "CustomFluxAttnProcessor: _parallel_config: expected None, or ulysses_degree alone",
    "a function, unified": "got context parallelism, ring_degree=2, ulysses_degree=2",
    "a function, anything": "ulysses_degree=2, ulysses_anything",
    "a function, switched on later": "CustomFluxAttnProcessor: _parallel_config: expected None, or ulysses_degree",
    "a function in single blocks alone": "attn: expected layers with text and image apart that have such a processor",
    "a retouch, ring": "FluxRetouchProcessor: _parallel_config: expected None, or ulysses_degree alone",
    "a bank, ring": "MultiSourceFlux2KVAttnProcessor: _parallel_config: expected None, or ulysses_degree alone",
    "a pass that fills a cache": "_parallel_config: expected None while the processor is active, got context paralle",
    "heads that four cards do not divide": "attn: expected heads that ulysses_degree=4 divides, got 2",
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.fault(number=16)
def test_what_is_not_served_is_named_on_every_card(name, found):
    for card in found[REFUSALS[name].world]:
        assert card[name].get("error", "no error").startswith("NotImplementedError: lr_kernels.")
        assert MESSAGES[name] in card[name]["error"]


@pytest.mark.parametrize("kind", [CustomAttnProcessor, MultiSourceAttnProcessor, TokenMapAttnProcessor])
@pytest.mark.fault(number=16)
def test_processors_of_unets_refuse_every_parallelism(kind):
    processor = kind()
    assert hasattr(processor, "_parallel_config")  # else `enable_parallelism` passes it over
    processor._parallel_config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: _parallel_config: expected None while"):
        processor(None, torch.zeros(1, 4, 8))
