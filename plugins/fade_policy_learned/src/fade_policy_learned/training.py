"""Fitting the network to what tokens turned out to be worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fade_core.errors import InputError
from fade_policy_learned.features import FEATURES
from fade_policy_learned.network import ScoreNetwork
from fade_policy_learned.policy import LearnedPolicy


@dataclass(frozen=True)
class TrainingResult:
    """A trained policy and what it does on tokens that it was not trained on.

    Attributes:
        policy: ready to use or to save.
        train_tokens: tokens trained on.
        held_out_tokens: tokens measured on.
        train_mse: mean squared error on the first, targets standardised.
        held_out_mse: the same on the second.
        held_out_r2: share of the held-out variance explained; 0 is what predicting the mean gives, it may be negative.
        held_out_rank_correlation: Spearman's, in [-1, 1]; eviction uses nothing but the order.
        losses: training loss of each epoch.
    """

    policy: LearnedPolicy
    train_tokens: int
    held_out_tokens: int
    train_mse: float
    held_out_mse: float
    held_out_r2: float
    held_out_rank_correlation: float
    losses: tuple[float, ...]


def train_policy(
    features: Tensor,
    targets: Tensor,
    *,
    groups: Tensor | None = None,
    hidden: int = 32,
    epochs: int = 20,
    batch_size: int = 1024,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-4,
    held_out: float = 0.2,
    seed: int = 0,
) -> TrainingResult:
    """Fit a policy by least squares with Adam (arXiv 1412.6980); the same seed gives the same policy.

    Args:
        features: float ``[N, len(FEATURES)]``, from ``token_features``.
        targets: float ``[N]``, what each token turned out to be worth (say, the log of the attention it received
            later); larger is kept longer. Any affine change of the targets gives the same order.
        groups: int ``[N]``, the text each token came from. Whole groups are held out, because tokens of one text
            resemble each other. Without it single tokens are held out, which flatters the figures.
        hidden: width of the network.
        epochs: passes over the training tokens.
        batch_size: tokens a step.
        learning_rate: Adam's, decayed to zero along a cosine.
        weight_decay: decoupled weight decay.
        held_out: share of the tokens or groups to measure on, between 0 and 1.
        seed: of the split, the initial weights and the order.

    Raises:
        InputError: shapes that do not match, values that are not finite, fewer than two tokens on a side of the
            split, targets without variance, or an option out of range.
    """
    _check(features, targets, groups, hidden, epochs, batch_size, learning_rate, weight_decay, held_out)
    features, targets = features.detach().float().cpu(), targets.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    train, test = _split(len(targets), groups, held_out, generator)
    if targets[train].std() == 0:
        raise InputError("all training targets are equal: there is no order to learn")
    mean, deviation = targets[train].mean(), targets[train].std()
    wanted = (targets - mean) / deviation
    network = _network(features[train], hidden, generator)
    losses = _fit(network, features[train], wanted[train], epochs, batch_size, learning_rate, weight_decay, generator)
    with torch.no_grad():
        predicted = network(features)
    train_mse = float((predicted[train] - wanted[train]).square().mean())
    test_mse = float((predicted[test] - wanted[test]).square().mean())
    return TrainingResult(
        policy=LearnedPolicy(network),
        train_tokens=len(train),
        held_out_tokens=len(test),
        train_mse=train_mse,
        held_out_mse=test_mse,
        held_out_r2=1 - test_mse / max(float(wanted[test].var(correction=0)), 1e-12),
        held_out_rank_correlation=_rank_correlation(predicted[test], wanted[test]),
        losses=tuple(losses),
    )


def _network(features: Tensor, hidden: int, generator: torch.Generator) -> ScoreNetwork:
    with torch.random.fork_rng(devices=[]):  # torch draws initial weights of its own
        network = ScoreNetwork(features.shape[1], hidden)
    for layer in network.layers:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)
    network.standardise(features)
    return network


def _fit(
    network: ScoreNetwork,
    features: Tensor,
    targets: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    generator: torch.Generator,
) -> list[float]:
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
    steps = epochs * math.ceil(len(targets) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(targets), generator=generator).split(batch_size):
            loss = nn.functional.mse_loss(network(features[batch]), targets[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(targets))
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
