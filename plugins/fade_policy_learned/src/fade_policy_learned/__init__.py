"""Learned eviction for FADE: a small network that predicts what a token will be worth."""

from __future__ import annotations

from fade_policy_learned.features import FEATURES, token_features
from fade_policy_learned.network import Geometry
from fade_policy_learned.policy import LearnedPolicy
from fade_policy_learned.traces import Traces, collect
from fade_policy_learned.training import TrainingResult, train_policy

__all__ = [
    "FEATURES",
    "Geometry",
    "LearnedPolicy",
    "Traces",
    "TrainingResult",
    "collect",
    "token_features",
    "train_policy",
]
