import torch
from torch import nn

from trainers.ema import EMA


def test_average_equals_the_closed_form() -> None:
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.6)
    weights = [model.weight.detach().double().clone()]
    for _ in range(12):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(model)
        weights.append(model.weight.detach().double().clone())

    # a_n = sum_k (1 - d_k) prod_{j > k} d_j w_k, with d_0 = 0 for the initial weights
    decays = [0.0] + [min(0.6, (1 + n) / (10 + n)) for n in range(1, 13)]
    expected = torch.zeros_like(weights[0])
    for k, weight in enumerate(weights):
        later = torch.tensor(decays[k + 1 :], dtype=torch.float64).prod()
        expected += (1 - decays[k]) * later * weight
    torch.testing.assert_close(ema.average["weight"].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_was_not_applied_leaves_average_and_count_to_the_bit() -> None:
    model = nn.Linear(3, 2)
    for decay in (0.9, 0.0):
        ema = EMA(model, decay=decay)
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(model)
        average = {name: value.clone() for name, value in ema.average.items()}
        ema.update(model, torch.tensor(False))
        assert int(ema.num_updates) == 1
        assert all(torch.equal(value, average[name]) for name, value in ema.average.items())
    assert torch.equal(ema.average["weight"], model.weight), "without decay, the weights themselves"


def test_swapping_twice_gives_back_the_very_bits() -> None:
    model = nn.Linear(4, 4)
    ema = EMA(model, decay=0.9)
    with torch.no_grad():
        model.weight.add_(1.0)
    weight, average = model.weight.detach().clone(), ema.average["weight"].clone()
    ema.swap(model)
    assert torch.equal(model.weight, average)
    ema.swap(model)
    assert torch.equal(model.weight, weight)
    assert torch.equal(ema.average["weight"], average)


def test_frozen_weights_take_no_memory() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    ema = EMA(model, decay=0.9)
    assert set(ema.average) == {"1.weight", "1.bias"}
