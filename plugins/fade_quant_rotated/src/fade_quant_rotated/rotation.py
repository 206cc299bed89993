"""Orthogonal rotations of a head's channels: a randomised Hadamard transform, or a random orthogonal matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Literal

import torch
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError

RotationKind = Literal["hadamard", "orthogonal"]


class Rotation:
    """``y = R x`` with an orthogonal ``R [D, D]``, fixed by kind, head dimension and seed.

    "hadamard" is ``R = H diag(s)`` with random signs ``s`` and a Hadamard matrix ``H`` (arXiv 2404.00456); a head
    dimension for which none is known (odd ones, mostly) takes a direct sum of smaller Hadamard matrices.
    "orthogonal" is the Q factor of a Gaussian matrix. Only the signs, or Q, are state.

    Args:
        head_dim: channels ``D``.
        kind: "hadamard" or "orthogonal".
        seed: of the signs or the matrix; the same on every device.
    """

    def __init__(self, head_dim: int, kind: RotationKind = "hadamard", seed: int = 0) -> None:
        if head_dim <= 0:
            raise ConfigError(f"head_dim={head_dim} must be positive")
        if kind not in ("hadamard", "orthogonal"):
            raise ConfigError(f"rotation={kind!r} is not known; choose 'hadamard' or 'orthogonal'")
        self.head_dim, self.kind = head_dim, kind
        self._matrix: Tensor | None = None
        generator = torch.Generator().manual_seed(seed)
        if kind == "hadamard":
            self.state = torch.randint(0, 2, (head_dim,), generator=generator).mul_(2).sub_(1).to(torch.int8)
        else:
            gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gaussian)
            # with the signs of R's diagonal, Q is uniform over the orthogonal group
            self.state = (q * r.diagonal().sign()).float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """``R x`` for every vector of float ``[..., D]``; computed and returned in ``x``'s dtype."""
        state = self._on(x)
        if self.kind == "orthogonal":
            return x @ state.T
        return (x * state) @ hadamard(self.head_dim, x.dtype, x.device).T

    def matrix(self, device: torch.device) -> Tensor:
        """float32 ``[D, D]`` that row vectors are multiplied by, ``x @ matrix``: made once, and again for another state."""
        if self._matrix is None or self._matrix.device != device:
            self._matrix = self.forward(torch.eye(self.head_dim, device=device)).contiguous()
        return self._matrix

    def inverse(self, y: Tensor) -> Tensor:
        """``R^T y`` for every vector of float ``[..., D]``."""
        state = self._on(y)
        if self.kind == "orthogonal":
            return y @ state
        return (y @ hadamard(self.head_dim, y.dtype, y.device)) * state

    def state_dict(self) -> dict[str, Tensor]:
        """``{"signs": int8 [D]}`` or ``{"rotation": float32 [D, D]}``."""
        return {self._name: self.state}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over ``state_dict``'s answer. Raises ``CheckpointError`` if it is another kind or size."""
        found = state.get(self._name)
        if found is None or found.shape != self.state.shape:
            what = {name: tuple(t.shape) for name, t in state.items()}
            raise CheckpointError(
                f"a {self.kind} rotation of {self.head_dim} channels needs {self._name!r} of shape "
                f"{tuple(self.state.shape)}; the saved state has {what}. Build the cache with the configuration it was "
                f"saved with"
            )
        self.state, self._matrix = found.to(self.state.dtype).to(self.state.device), None

    @property
    def _name(self) -> str:
        return "signs" if self.kind == "hadamard" else "rotation"

    def _on(self, x: Tensor) -> Tensor:
        if self.state.device != x.device:
            self.state = self.state.to(x.device)
        return self.state.to(x.dtype)


@lru_cache(maxsize=64)
def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Orthonormal Hadamard matrix ``[n, n]``, or a direct sum of them where none is known; shared, never written to."""
    matrix = _hadamard_signs(n)
    if matrix is not None:
        result: Tensor = (matrix.double() / n**0.5).to(dtype).to(device)
        return result
    blocks, rest = [], n
    while rest:
        size = max(m for m in range(1, rest + 1) if _hadamard_signs(m) is not None)
        blocks.append(hadamard(size, torch.float64))
        rest -= size
    joined: Tensor = torch.block_diag(*blocks).to(dtype).to(device)
    return joined


@cache
def _hadamard_signs(n: int) -> Tensor | None:
    """A matrix of +-1 with orthogonal rows by Sylvester's and Paley's constructions, or ``None``."""
    if n in (1, 2):
        return torch.tensor([[1]]) if n == 1 else torch.tensor([[1, 1], [1, -1]])
    if n % 4:
        return None
    half = _hadamard_signs(n // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1, 1], [1, -1]]), half)
    if _is_prime(n - 1):  # Paley I: n - 1 = 3 mod 4
        q = n - 1
        matrix = torch.ones(n, n, dtype=torch.long)
        matrix[1:, 1:] = _jacobsthal(q) + torch.eye(q, dtype=torch.long)
        matrix[1:, 0] = -1
        return matrix
    q = n // 2 - 1
    if _is_prime(q) and q % 4 == 1:  # Paley II
        conference = torch.ones(q + 1, q + 1, dtype=torch.long)
        conference[0, 0] = 0
        conference[1:, 1:] = _jacobsthal(q)
        plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=torch.long), minus)
    return None


def _jacobsthal(q: int) -> Tensor:
    squares = {(i * i) % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)])
    index = torch.arange(q)
    return character[(index[:, None] - index[None]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))
