"""The prediction of a set of chips: what the pictures and the page show."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from utils.report.metrics import intervals, scores

import numpy as np


@dataclass
class Prediction:
    """Prediction of N chips in C classes, from D features each.

    Attributes:
        classes: names of the classes, [C].
        settings: {constant: value} of the run.
        steps: {name: (labels [N] int, confidence [N] float)} after each step of the pipeline, in their
            order; the last step is the submission. A higher confidence is more in distribution.
        probabilities: [N, C] class probabilities before the vote, 0..1.
        clusters: [N] cluster of each chip, 0..K-1.
        groups: [N] group of each chip, 0..G-1; the intervals take the chips of a group as dependent.
        features: [N, D].
        chips: function from indices, int64 [B], to the chips, uint8 [B, S, S].
        seconds: time per chip, s.
        counts: number of training chips of each class, [C].
        vote: what the vote did, in words.
        nearest: [N, C] classes in the order of the distance from their mean feature to the chip, or None.
        truth: labels [N] (-1 where out of distribution) and ood [N] bool, as of `data.labelled.Labelled`;
            None without a reference.
    """

    classes: list
    settings: dict
    steps: dict
    probabilities: np.ndarray
    clusters: np.ndarray
    groups: np.ndarray
    features: np.ndarray
    chips: Any
    seconds: float
    counts: list
    vote: str = ""
    nearest: np.ndarray = None
    truth: Any = None

    @property
    def labels(self):
        """Submitted labels, [N]."""
        return list(self.steps.values())[-1][0]

    @property
    def confidence(self):
        """Submitted confidence, [N]."""
        return list(self.steps.values())[-1][1]

    @property
    def labels_before_vote(self):
        """[N]."""
        return self.probabilities.argmax(1)

    @property
    def in_distribution(self):
        """[N] bool; needs truth."""
        return ~self.truth.ood

    @property
    def can_be_scored(self):
        """Whether there is a reference with at least one chip in distribution."""
        return self.truth is not None and bool(self.in_distribution.any())

    @cached_property
    def scores(self):
        """{step: scores of `utils.report.metrics.scores`}; needs truth."""
        return {name: scores(*step, self.truth.labels, self.truth.ood) for name, step in self.steps.items()}

    @cached_property
    def intervals(self):
        """{score: (low, high)} of the last step, 95 % intervals from a bootstrap over the groups; needs truth."""
        return intervals(self.labels, self.confidence, self.truth.labels, self.truth.ood, self.groups)

    @cached_property
    def confusion(self):
        """Number of chips in distribution by true class (row) and predicted class, [C, C]; needs truth."""
        matrix = np.zeros((len(self.classes),) * 2, np.int64)
        known = self.in_distribution
        np.add.at(matrix, (self.truth.labels[known], self.labels[known]), 1)
        return matrix
