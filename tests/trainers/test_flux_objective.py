"""FLUX's packing, sigmas, target and loss against diffusers and float64 computations."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from scipy import stats
from torch import Tensor, nn

from trainers.flux.packing import image_ids, pack, prompt_ids, unpack
from trainers.objectives import RectifiedFlowObjective
from trainers.recipe import FlowNoise
from trainers.timesteps import flow_sigmas, resolution_shift, shifted


def test_packing_is_that_of_diffusers() -> None:
    latents = torch.randn(2, 16, 6, 8)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 8))
    assert torch.equal(unpack(packed, 6, 8), latents)
    assert torch.equal(unpack(packed, 6, 8), FluxPipeline._unpack_latents(packed, 48, 64, vae_scale_factor=8))
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(image_ids(6, 8, latents), ids)
    assert torch.equal(prompt_ids(5, latents), torch.zeros(5, 3))


@pytest.mark.parametrize("image_tokens", [16, 256, 1024, 4096])
def test_the_shift_is_that_of_diffusers(image_tokens: int) -> None:
    mu = resolution_shift(image_tokens, 0.5, 1.15)
    assert mu == pytest.approx(calculate_shift(image_tokens, 256, 4096, 0.5, 1.15))
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = torch.linspace(0.01, 0.99, 50)
    torch.testing.assert_close(shifted(sigmas, mu), scheduler.time_shift(mu, 1.0, sigmas))


def test_sigmas_follow_the_logit_normal_distribution() -> None:
    normals = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sigmas = flow_sigmas(normals, FlowNoise(logit_mean=0.3, logit_std=0.8, resolution_shift=None), image_tokens=256)
    logits = torch.logit(sigmas.double()).numpy()
    assert stats.kstest(logits, stats.norm(0.3, 0.8).cdf).pvalue > 0.01
    moved = flow_sigmas(normals, FlowNoise(logit_mean=0.3, logit_std=0.8), image_tokens=4096)
    # In logits the shift is an addition of mu.
    np.testing.assert_allclose(torch.logit(moved.double()).numpy() - logits, 1.15, atol=2e-3)


class Recorder(nn.Module):
    """A transformer that remembers what it is told and predicts a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.told: dict[str, Any] = {}

    def forward(self, **told: Any) -> tuple[Tensor]:
        self.told = told
        return (torch.full_like(told["hidden_states"], 0.25),)


@pytest.mark.parametrize("guidance", [None, torch.full((3,), 1.0)])
def test_loss_and_inputs_equal_a_float64_computation(guidance: Tensor | None) -> None:
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(2, 3, 16, 4, 6, generator=generator).unbind(0)
    sigmas = torch.tensor([0.0, 0.3, 1.0])
    transformer = Recorder()
    losses = RectifiedFlowObjective()(
        transformer,
        latents=latents,
        noise=noise,
        sigmas=sigmas,
        prompt_embeds=torch.zeros(3, 5, 8),
        pooled_prompt_embeds=torch.zeros(3, 8),
        guidance=guidance,
    )
    x, e, s = latents.double().numpy(), noise.double().numpy(), sigmas.double().numpy().reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(losses.numpy(), ((0.25 - (e - x)) ** 2).mean(axis=(1, 2, 3)), rtol=1e-5)
    told = transformer.told
    expected = torch.from_numpy((1 - s) * x + s * e).float()
    torch.testing.assert_close(unpack(told["hidden_states"], 4, 6), expected)
    assert torch.equal(told["timestep"], sigmas)
    assert told["guidance"] is guidance
    assert told["img_ids"].shape == (6, 3)
    assert told["txt_ids"].shape == (5, 3)


def test_noisy_latents_are_those_of_diffusers_scheduler() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    latents, noise = torch.randn(2, 4, 16, 4, 4).unbind(0)
    at = torch.tensor([0, 250, 500, 999])
    transformer = Recorder()
    RectifiedFlowObjective()(
        transformer,
        latents=latents,
        noise=noise,
        sigmas=scheduler.sigmas[at],
        prompt_embeds=torch.zeros(4, 5, 8),
        pooled_prompt_embeds=torch.zeros(4, 8),
        guidance=None,
    )
    expected = scheduler.scale_noise(latents, scheduler.timesteps[at], noise)
    torch.testing.assert_close(unpack(transformer.told["hidden_states"], 4, 4), expected)
