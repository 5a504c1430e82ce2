"""Inception Score: are images classified with confidence, and are the classes varied?"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import entr, softmax

from trainers.fidelity.statistics import Float64


def class_probabilities(logits: NDArray[np.floating[Any]]) -> Float64:
    """Logits [N, C] -> probabilities [N, C] in float64."""
    return np.asarray(softmax(logits.astype(np.float64), axis=1))


def inception_score(probabilities: Float64) -> float:
    """exp E KL(p(y|x) || p(y)) of [N, C]: Salimans et al. 2016 (arXiv 1606.03498, Sec. 4), over all images at once.

    The published code averages over 10 splits, each with its own p(y); that lowers the score at small N.
    The expected divergence is the entropy of the mean less the mean of the entropies.
    """
    information = entr(probabilities.mean(axis=0)).sum() - entr(probabilities).sum(axis=1).mean()
    return float(np.exp(information))
