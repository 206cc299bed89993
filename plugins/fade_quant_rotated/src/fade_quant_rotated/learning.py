"""From a prompt to the transforms of its keys and values, with one wait for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import PromptView, Side
from fade_quant_rotated.calibrate import side_from
from fade_quant_rotated.calibration import SideCalibration
from fade_quant_rotated.klt import nearly_klt
from fade_quant_rotated.prompt import moments_of, shortcoming
from fade_quant_rotated.statistics import LayerMoments


@dataclass(frozen=True)
class Learnt:
    """What a layer's prompt leads to.

    Attributes:
        sides: by side, its calibration and the inverse of the transform, float32 ``[H, D, D]``, on the prompt's device, and the
            channels' worth once more, on the CPU.
    """

    sides: Mapping[Side, tuple[SideCalibration, Tensor, Tensor]]


def learn(prompt: PromptView, needed: int, reach: int) -> Learnt | str:
    """Transforms of a layer's keys and values; or why there are none.

    Args:
        prompt: the layer's attention.
        needed: as for ``shortcoming``.
        reach: as for ``moments_of``.
    """
    moments, facts = moments_of(prompt, reach=reach)
    sides = _sides(moments)
    worths = [calibration.worth for calibration, _ in sides.values()]
    told = torch.cat(
        [facts, *(worth.flatten().double() for worth in worths)]
    ).cpu()  # the host waits here, and nowhere else
    why_not = shortcoming(told[: len(facts)].tolist(), needed, prompt.queries.shape[1] // prompt.keys.shape[1])
    if why_not:
        return why_not
    read = told[len(facts) :].split([worth.numel() for worth in worths])
    known = (worth.view(like.shape) for worth, like in zip(read, worths, strict=True))
    return Learnt({side: (*own, worth) for (side, own), worth in zip(sides.items(), known, strict=True)})


def _sides(moments: LayerMoments) -> dict[Side, tuple[SideCalibration, Tensor]]:
    """Calibrations and inverses of keys and values, decomposed together where both have as many channels."""
    pairs = [(moments.key_cov, moments.query_square), (moments.value_cov, moments.metric)]
    if pairs[0][0].shape == pairs[1][0].shape:
        cov, metric = (torch.cat(both) for both in zip(*pairs, strict=True))
        found = list(zip(*(part.chunk(2) for part in nearly_klt(cov, metric)), strict=True))
    else:
        found = [nearly_klt(*pair) for pair in pairs]
    names: tuple[Side, ...] = ("key", "value")
    sides: dict[Side, tuple[SideCalibration, Tensor]] = {}
    for side, (transform, variance, inverse) in zip(names, found, strict=True):
        calibration = side_from(moments, side, transform, variance)
        stored = (
            calibration.transform.double()
        )  # as rounded, close to ``transform``: a step of Newton's finds its inverse
        start = inverse * transform.norm(dim=-2)[..., None]
        sides[side] = calibration, (2 * start - start @ stored @ start).float()
    return sides
