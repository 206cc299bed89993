"""Fitting the network to what tokens turned out to be worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fade_core.errors import InputError
from fade_policy_learned.features import FEATURES
from fade_policy_learned.network import Geometry, ScoreNetwork
from fade_policy_learned.policy import LearnedPolicy

Loss = Literal["squares", "tweedie"]
"""``squares``: mean squared error of standardised targets. ``tweedie``: deviance of power 1.5 with a logarithmic link
(Jorgensen, "Exponential dispersion models", 1987), for targets that are mostly near zero and rarely large; the score is the
log of the expected target."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained policy and what it does on tokens that it was not trained on.

    Attributes:
        policy: ready to use or to save.
        train_tokens: tokens trained on.
        held_out_tokens: tokens measured on.
        train_mse: mean squared error on the first, targets standardised (loss ``tweedie``: mean deviance).
        held_out_mse: the same on the second.
        held_out_r2: share of the held-out variance (or deviance) explained; 0 is what predicting the mean gives, it may be
            negative.
        held_out_rank_correlation: Spearman's, in [-1, 1]; eviction uses nothing but the order.
        losses: training loss of each epoch.
        held_out: bool ``[N]``, the tokens that were measured on.
    """

    policy: LearnedPolicy
    train_tokens: int
    held_out_tokens: int
    train_mse: float
    held_out_mse: float
    held_out_r2: float
    held_out_rank_correlation: float
    losses: tuple[float, ...]
    held_out: Tensor


def train_policy(
    features: Tensor,
    targets: Tensor,
    *,
    groups: Tensor | None = None,
    geometry: Geometry | None = None,
    loss: Loss = "squares",
    hidden: int = 32,
    epochs: int = 20,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    held_out: float = 0.2,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Fit a policy with Adam (arXiv 1412.6980); the same seed gives the same policy.

    Args:
        features: float ``[N, len(FEATURES)]``, from ``token_features``.
        targets: float ``[N]``, what each token turned out to be worth (say, the log of the attention it received
            later); larger is kept longer. With least squares any affine change of the targets gives the same order; the
            loss ``tweedie`` takes them as they are, without logarithm, and any factor gives the same order.
        groups: int ``[N]``, the text each token came from. Whole groups are held out, because tokens of one text
            resemble each other. Without it single tokens are held out, which flatters the figures.
        geometry: shape of the model that the features come from; heads then get terms of their own, and the policy serves
            no model of another shape. ``None`` treats all heads alike.
        loss: what is minimised.
        hidden: width of the network.
        epochs: passes over the training tokens.
        batch_size: tokens a step.
        learning_rate: Adam's, decayed to zero along a cosine.
        weight_decay: decoupled weight decay.
        held_out: share of the tokens or groups to measure on, between 0 and 1.
        seed: of the split, the initial weights and the order.
        progress: called with the epochs done and the epochs in all.

    Raises:
        InputError: shapes that do not match, values that are not finite, fewer than two tokens on a side of the
            split, targets without variance, or an option out of range.
    """
    _check(features, targets, groups, hidden, epochs, batch_size, learning_rate, weight_decay, held_out)
    _check_loss(loss, targets)
    features, targets = features.detach().float().cpu(), targets.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    train, test = _split(len(targets), groups, held_out, generator)
    mean, deviation = targets[train].mean(), targets[train].std()
    if deviation == 0:
        raise InputError("all training targets are equal: there is no order to learn")
    wanted = (targets - mean) / deviation if loss == "squares" else targets / mean
    network = _network(features[train], hidden, geometry, generator)
    settings = _Settings(loss, epochs, batch_size, learning_rate, weight_decay, progress)
    losses = _fit(network, features[train], wanted[train], settings, generator)
    with torch.no_grad():
        predicted = torch.cat([network(part) for part in features.split(65536)])
    train_error, test_error, usual = (
        float(_error(p, wanted[part], loss).mean())
        for p, part in ((predicted[train], train), (predicted[test], test), (_constant(wanted[test], loss), test))
    )
    is_test = torch.zeros(len(targets), dtype=torch.bool)
    is_test[test] = True
    return TrainingResult(
        policy=LearnedPolicy(network),
        train_tokens=len(train),
        held_out_tokens=len(test),
        train_mse=train_error,
        held_out_mse=test_error,
        held_out_r2=1 - test_error / max(usual, 1e-12),
        held_out_rank_correlation=_rank_correlation(predicted[test], wanted[test]),
        losses=tuple(losses),
        held_out=is_test,
    )


@dataclass(frozen=True)
class _Settings:
    loss: Loss
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    progress: Callable[[int, int], None] | None


def _error(score: Tensor, wanted: Tensor, loss: Loss) -> Tensor:
    """Squared error, or deviance of power 1.5 (0 where ``exp(score)`` is what was wanted)."""
    if loss == "squares":
        return (score - wanted).square()
    root = (score / 2).exp()
    return 4 * (root - wanted.sqrt()).square() / root


def _constant(wanted: Tensor, loss: Loss) -> Tensor:
    """The best score that is the same for all."""
    mean = wanted.mean()
    return (mean if loss == "squares" else mean.clamp(min=1e-12).log()).expand_as(wanted)


def _network(features: Tensor, hidden: int, geometry: Geometry | None, generator: torch.Generator) -> ScoreNetwork:
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights of its own
        network = ScoreNetwork(features.shape[1], hidden, geometry)
    network.initialise(generator)
    network.standardise(features)
    return network


def _fit(
    network: ScoreNetwork, features: Tensor, targets: Tensor, settings: _Settings, generator: torch.Generator
) -> list[float]:
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    steps = settings.epochs * math.ceil(len(targets) / settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    losses = []
    for epoch in range(settings.epochs):
        total = 0.0
        for batch in torch.randperm(len(targets), generator=generator).split(settings.batch_size):
            loss = _error(network(features[batch]), targets[batch], settings.loss).mean()
            optimiser.zero_grad()
            loss.backward()
            if settings.loss == "tweedie":  # a rare large target
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(targets))
        if settings.progress is not None:
            settings.progress(epoch + 1, settings.epochs)
    return losses


def _split(tokens: int, groups: Tensor | None, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    of_token = torch.arange(tokens) if groups is None else groups.detach().cpu()
    names = of_token.unique()
    count = min(max(round(held_out * len(names)), 1), len(names) - 1)
    chosen = names[torch.randperm(len(names), generator=generator)[:count]]
    is_test = torch.isin(of_token, chosen)
    train, test = (~is_test).nonzero().flatten(), is_test.nonzero().flatten()
    if min(len(train), len(test)) < 2:
        raise InputError(
            f"the split leaves {len(train)} tokens to train on and {len(test)} to measure on; each needs at least two"
        )
    return train, test


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation, ties sharing their mean rank."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / norms.prod()) if norms.prod() > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    _, index, counts = x.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[index]


def _check(
    features: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    hidden: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    held_out: float,
) -> None:
    if features.dim() != 2 or features.shape[1] != len(FEATURES):
        raise InputError(
            f"features must be [N, {len(FEATURES)}] ({', '.join(FEATURES)}); found {list(features.shape)}. "
            f"Flatten token_features(view) and leave out slots where view.valid is false"
        )
    if targets.shape != features.shape[:1]:
        raise InputError(f"targets must be [{len(features)}], one a token; found {list(targets.shape)}")
    for name, tensor in (("features", features), ("targets", targets)):
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} hold {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite")
    if len(targets) < 4:
        raise InputError(f"{len(targets)} tokens are too few to train on and to measure on; at least 4 are needed")
    if groups is not None and (groups.shape != targets.shape or groups.is_floating_point()):
        raise InputError(f"groups must be integers [{len(targets)}]; found {groups.dtype} {list(groups.shape)}")
    if groups is not None and len(groups.unique()) < 2:
        raise InputError("all tokens are of one group, so none can be held out; collect a second text")
    for name, count in (("hidden", hidden), ("epochs", epochs), ("batch_size", batch_size)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, found {count}")
    if not 0 < held_out < 1:
        raise InputError(f"held_out must lie between 0 and 1, found {held_out}")
    if not (learning_rate > 0 and weight_decay >= 0):
        raise InputError(
            f"learning_rate must be positive and weight_decay not negative, found {learning_rate} and {weight_decay}"
        )


def _check_loss(loss: str, targets: Tensor) -> None:
    if loss not in get_args(Loss):
        raise InputError(f"no loss is called {loss!r}; there are {', '.join(get_args(Loss))}")
    if loss == "tweedie" and bool((targets < 0).any()):
        raise InputError(
            f"the loss 'tweedie' takes targets that are not negative (attention, not its log); found {float(targets.min()):g}"
        )
