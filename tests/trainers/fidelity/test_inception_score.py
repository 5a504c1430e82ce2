"""Inception Score against closed forms and torchmetrics."""

import numpy as np
import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from tests.trainers.fidelity.test_frechet import Mean
from trainers.fidelity.inception_score import class_probabilities, inception_score


def test_closed_forms() -> None:
    assert inception_score(np.eye(7)) == pytest.approx(7)  # sure, and every class once
    assert inception_score(np.eye(7)[[2, 2, 2]]) == pytest.approx(1)  # sure, always the same
    assert inception_score(np.full((5, 7), 1 / 7)) == pytest.approx(1)  # unsure
    # Two images that are (p, 1 - p) and (1 - p, p): the divergence is log 2 less the entropy of p.
    p = 0.9
    entropy = -p * np.log(p) - (1 - p) * np.log(1 - p)
    assert inception_score(np.array([[p, 1 - p], [1 - p, p]])) == pytest.approx(2 / np.exp(entropy))


def test_is_torchmetrics_score_on_the_same_logits() -> None:
    images = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (40, 3, 4, 4), dtype=np.uint8))
    metric = InceptionScore(feature=Mean(), splits=1).set_dtype(torch.float64)
    metric.update(images)
    mean, _ = metric.compute()
    assert inception_score(class_probabilities(Mean()(images).numpy())) == pytest.approx(mean.item(), rel=1e-9)


def test_large_logits_do_not_overflow() -> None:
    probabilities = class_probabilities(np.array([[1e4, 0], [0, 1e4]], np.float32))
    assert inception_score(probabilities) == pytest.approx(2)
