"""Product quantization codebooks: one set of centroids a sub-vector of a head (Jegou, Douze, Schmid, TPAMI 2011)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fade_core import FileHeader, FileKind
from fade_core.errors import CheckpointError, ConfigError, InputError

CODEBOOK_FILE = FileKind(
    "fade-kv-codebooks",
    1,
    "a codebook file",
    "'fade train-codebook --model MODEL --text FILE -o FILE' makes one",
    FileHeader,
)
"""Its format is raised when the meaning of a tensor changes."""

SIZES = (2, 4, 8, 16, 32, 64, 256)
"""Numbers of centroids whose codes can be packed."""


class PQCodebook:
    """Centroids of every sub-vector of a head.

    Args:
        centroids: float ``[S, C, d]``: ``C`` centroids of ``d`` channels for each of the ``S = D / d`` sub-vectors.

    Attributes:
        centroids: float32 ``[S, C, d]``.

    Raises:
        ConfigError: a shape whose codes cannot be packed.
    """

    def __init__(self, centroids: Tensor) -> None:
        if centroids.dim() != 3 or not centroids.is_floating_point():
            raise ConfigError(f"centroids must be a float tensor [S, C, d]; found {tuple(centroids.shape)}")
        check_size(int(centroids.shape[1]))
        self.centroids = centroids.float()

    @property
    def head_dim(self) -> int:
        """Channels ``D`` of a head."""
        return int(self.centroids.shape[0] * self.centroids.shape[2])

    @property
    def sub_dim(self) -> int:
        """Channels ``d`` of a sub-vector."""
        return int(self.centroids.shape[2])

    @property
    def num_centroids(self) -> int:
        """Centroids ``C`` of a sub-vector."""
        return int(self.centroids.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the centroids."""
        return self.centroids.numel() * self.centroids.element_size()

    @classmethod
    def train(cls, vectors: Tensor, sub_dim: int = 4, num_centroids: int = 256, seed: int = 0) -> PQCodebook:
        """k-means (scikit-learn's ``MiniBatchKMeans``) on every sub-vector by itself.

        Args:
            vectors: float ``[..., D]``: keys or values of one layer, all heads together.
            sub_dim: channels of a sub-vector; divides ``D``.
            num_centroids: centroids of a sub-vector, a power of two that can be packed.
            seed: the same seed and vectors give the same centroids.

        Raises:
            ConfigError: a ``sub_dim`` that does not divide ``D``, or an unpackable ``num_centroids``.
            InputError: fewer vectors than centroids, or vectors that are not finite.
        """
        from sklearn.cluster import MiniBatchKMeans

        channels = vectors.shape[-1]
        check_split(channels, sub_dim)
        check_size(num_centroids)
        flat = vectors.detach().reshape(-1, channels).float().cpu()
        if len(flat) < num_centroids:
            raise InputError(
                f"{len(flat)} vectors cannot train {num_centroids} centroids; give at least as many (some 40 a "
                f"centroid are better), or ask for fewer centroids"
            )
        if not bool(flat.isfinite().all()):
            raise InputError("the vectors hold NaN or infinity; no codebook can be trained on them")
        found = []
        for part in flat.split(sub_dim, dim=-1):
            means = MiniBatchKMeans(num_centroids, batch_size=4096, n_init=1, max_iter=50, random_state=seed)
            found.append(torch.from_numpy(means.fit(part.contiguous().numpy()).cluster_centers_).float())
        return cls(torch.stack(found))

    def encode(self, x: Tensor) -> Tensor:
        """Nearest centroid of each sub-vector: int64 ``[..., S]`` of ``[..., D]``."""
        split = x.float().unflatten(-1, (-1, self.sub_dim)).transpose(-2, -3)  # [..., S, T, d]
        centroids = self.centroids.to(x.device)
        distance = centroids.square().sum(-1)[:, None] - 2 * split @ centroids.transpose(-1, -2)  # [..., S, T, C]
        result: Tensor = distance.argmin(-1).transpose(-1, -2)
        return result

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 ``[..., D]`` of int ``[..., S]``."""
        parts = torch.arange(self.centroids.shape[0], device=codes.device)
        return self.centroids.to(codes.device)[parts, codes.long()].flatten(-2)


def check_size(num_centroids: int) -> int:
    """Bits of a code. Raises ``ConfigError`` unless that many centroids can be packed."""
    if num_centroids not in SIZES:
        raise ConfigError(f"num_centroids={num_centroids} cannot be packed; choose one of {', '.join(map(str, SIZES))}")
    return num_centroids.bit_length() - 1


def check_split(head_dim: int, sub_dim: int) -> None:
    """Refuse a ``sub_dim`` that does not divide ``head_dim``. Raises ``ConfigError``."""
    if sub_dim < 1 or head_dim % sub_dim:
        fitting = [d for d in range(1, min(head_dim, 16) + 1) if head_dim % d == 0]
        raise ConfigError(f"sub_dim={sub_dim} must divide head_dim={head_dim}; {', '.join(map(str, fitting))} do")


def save_codebooks(codebooks: Mapping[str, PQCodebook], path: str | Path) -> None:
    """Write codebooks, named ``"LAYER.keys"`` and ``"LAYER.values"``, to ``path`` (safetensors with a checksum).

    Raises:
        CheckpointError: if it cannot be written.
    """
    CODEBOOK_FILE.write(path, {}, {f"{name}.centroids": book.centroids.clone() for name, book in codebooks.items()})


def load_codebooks(path: str | Path) -> dict[str, Tensor]:
    """What ``save_codebooks`` wrote, as ``cache.set_codebooks`` takes it: ``"LAYER.SIDE.centroids"`` to ``[S, C, d]``.

    Raises:
        CheckpointError: if the file is missing, is none, or is damaged.
    """
    _, tensors = CODEBOOK_FILE.read(path)
    for name, found in tensors.items():
        try:
            if not re.fullmatch(r"(0|[1-9][0-9]{0,4})\.(keys|values)\.centroids", name) or not bool(
                found.isfinite().all()
            ):
                raise ConfigError("finite centroids of the keys or values of a layer were expected")
            PQCodebook(found)
        except ConfigError as error:
            raise CheckpointError(
                f"{str(path)!r} is damaged: tensor {name!r}: {error}; 'fade train-codebook' makes another"
            ) from error
    return {name: found.clone() for name, found in tensors.items()}
