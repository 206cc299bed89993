"""From a prompt to the transforms of its keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fade_core.interfaces import PromptView, Side
from fade_quant_rotated.calibrate import side_from
from fade_quant_rotated.calibration import SideCalibration
from fade_quant_rotated.klt import nearly_klt
from fade_quant_rotated.prompt import moments_of, shortcoming
from fade_quant_rotated.statistics import LayerMoments


class Learning:
    """What a layer's prompt leads to; enqueued at once, and read when it is asked for.

    Args:
        prompt: the layer's attention.
        needed: as for ``shortcoming``.
        reach: as for ``moments_of``.
    """

    def __init__(self, prompt: PromptView, needed: int, reach: int) -> None:
        moments, facts = moments_of(prompt, reach=reach)
        self._needed, self._group = needed, prompt.queries.shape[1] // prompt.keys.shape[1]
        self._sides = _sides(moments)
        worths = (calibration.worth.flatten().double() for calibration, _ in self._sides.values())
        told = torch.cat([facts, *worths])
        self._told = told.to("cpu", non_blocking=told.is_cuda)
        self._copied = torch.cuda.current_stream(told.device).record_event() if told.is_cuda else None

    @cached_property
    def found(self) -> Mapping[Side, Learnt] | str:
        """What is learnt of each side, or why nothing can be. The host waits for the GPU to come this far, no further."""
        if self._copied is not None:
            self._copied.synchronize()
        sizes = [calibration.worth.numel() for calibration, _ in self._sides.values()]
        facts, *worths = self._told.split([len(self._told) - sum(sizes), *sizes])
        why_not = shortcoming(facts.tolist(), self._needed, self._group)
        return why_not or {
            side: Learnt(calibration, inverse, worth.view(calibration.worth.shape))
            for (side, (calibration, inverse)), worth in zip(self._sides.items(), worths, strict=True)
        }


class Learnt(NamedTuple):
    """Keys or values of a layer.

    Attributes:
        calibration: on the prompt's device.
        inverse: of its transform, float32 ``[H, D, D]``.
        worth: its channels' once more, float64 on the CPU.
    """

    calibration: SideCalibration
    inverse: Tensor
    worth: Tensor


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
