"""The coefficient tables of diffusers schedulers, DDIM inversion, and the blend weights of the layout stage."""

import pytest
import torch
from diffusers import DDIMScheduler

from lr_kernels.diffusers import blend_weights, ddim_table, invert
from lr_kernels.step_blend import step_blend

TOLERANCE = 1e-3
"""Of latents in float32, where their standard deviation is about 1."""


def tiny_scheduler(**config) -> DDIMScheduler:
    base = {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction", "steps_offset": 1}
    return DDIMScheduler(**{**base, **config})


def distance(a, b) -> float:
    assert a.isfinite().all() and b.isfinite().all()
    return (a - b).abs().max().item()


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "leading", "set_alpha_to_one": False},
        {"timestep_spacing": "trailing", "beta_schedule": "squaredcos_cap_v2"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_steps_are_those_of_the_scheduler(config, prediction_type, eta):
    scheduler = tiny_scheduler(prediction_type=prediction_type, **config)
    scheduler.set_timesteps(10)
    table = ddim_table(scheduler, guidance_scale=3.0, eta=eta)
    x, uncond, cond, noise = torch.randn(4, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        guided = uncond + 3.0 * (cond - uncond)
        expected = scheduler.step(guided, t, x, eta=eta, variance_noise=noise).prev_sample
        out = step_blend(x, [uncond, cond], table, i, noise=noise)
        assert distance(out, expected) <= TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_inversion_undoes_the_steps_of_a_constant_noise(set_alpha_to_one):
    scheduler = tiny_scheduler(prediction_type="epsilon", timestep_spacing="leading", set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(10)
    clean, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    trajectory = invert(lambda x, t: noise, clean, scheduler)
    table = ddim_table(scheduler, guidance_scale=1)
    for i in range(10):
        back = step_blend(trajectory[i], [noise, noise], table, i)
        assert distance(back, trajectory[i + 1]) <= TOLERANCE
    assert torch.equal(trajectory[-1], clean) and len(trajectory) == 11
    later = invert(lambda x, t: noise, clean, scheduler, start=4)
    assert len(later) == 7 and torch.equal(later[0], trajectory[4])


def test_blend_weights():
    assert blend_weights("hard", 2, 5).tolist() == [0, 0, 1, 1, 1]
    assert blend_weights(lambda i: i / 4, 0, 5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    for kind in ("linear", "cosine"):
        weights = blend_weights(kind, 2, 6)
        assert weights[:2].tolist() == [0, 0] and weights[-1] == 1 and (weights.diff() >= 0).all()
