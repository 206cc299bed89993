"""The merge of what the splits of each row and head have left behind ``decode_kernel``."""

from __future__ import annotations

from torch import Tensor

MERGED = 4096
"""Elements of the parts that a program of the merge kernel holds at once."""

NARROWEST = 16
"""Channels that such a program takes at least."""


def merge_options(splits: int, padded_dim: int) -> dict[str, int]:
    """Launch options of the merge kernel: all parts at once, in as many programs as that takes: each wait costs."""
    chunk = min(1 << max(splits - 1, 15).bit_length(), MERGED // NARROWEST)
    return {"CHUNK": chunk, "CHANNELS": min(padded_dim, MERGED // chunk), "num_warps": 4}


def merge(
    part: Tensor, part_lse: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, overlap: bool = False
) -> None:
    """Weigh the parts by their log-sum-exp and write ``out`` and ``lse``.

    Args:
        part: float32 ``[B * H_kv, splits, columns, D]``, normalised; a column is a query token and head of the KV head's group.
        part_lse: float32 ``[B * H_kv, splits, columns]``, base 2; -inf for a part that is empty.
        sinks: attention-sink logits ``[H_q]``, or ``None``.
        out: ``[B, H_q, Q, D]``, contiguous along the channels.
        lse: natural log-sum-exps, sinks included, float32 ``[B, H_q, Q]``.
        overlap: start before the launch that leaves the parts ends.
    """
    from fade_kernels_triton.jit.decode import merge_kernel

    groups, splits, columns, dim = part.shape
    rows, _, q_len, _ = out.shape
    padded = max(64, 1 << (dim - 1).bit_length())
    options = merge_options(splits, padded)
    merge_kernel[(columns, groups, padded // options["CHANNELS"])](
        part,
        part_lse,
        sinks,
        out,
        lse,
        splits,
        groups // rows,
        *out.stride()[:3],
        HEADS=columns // q_len,
        Q_LEN=q_len,
        D=dim,
        PDL=overlap,
        **options,
        **({"launch_pdl": True} if overlap else {}),
    )
