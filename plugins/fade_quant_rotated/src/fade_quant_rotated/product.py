"""``kind = "pq"``: product quantization, read by table look-up."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import Quantizer, QuantizerConfig, QuantizerContext, Side, TierConfig
from fade_core.packed import WORD_BITS, Packed, pack_codes, planes_of, unpack_codes
from fade_quant_rotated.codebook import PQCodebook, check_size, check_split, load_codebooks
from fade_quant_rotated.levels import check_tokens, to_tiles

CHUNK = 16
"""Tiles encoded or read at once."""

_SIDES: dict[Side, str] = {"key": "keys", "value": "values"}


class PQQuantizer(Quantizer):
    """Each sub-vector of a token is the number of its nearest centroid.

    Keys are never reconstructed: a query's inner products with all centroids make a table, and a score is the sum of
    ``S`` entries of it. Values are summed by centroid first: the weights of all tokens that share a centroid add up,
    and the sums meet the centroids once.

    Args:
        head_dim: channels ``D``.
        sub_dim: channels of a sub-vector.
        num_centroids: centroids of a sub-vector.
        codebook: its centroids, or ``None`` to be given them later (``load_state_dict``, ``cache.set_codebooks``).
        tile: tokens a tile.
        device: where tokens will be.
    """

    kind: ClassVar[str] = "pq"
    moves_tokens = True

    def __init__(
        self,
        head_dim: int,
        sub_dim: int = 4,
        num_centroids: int = 256,
        codebook: PQCodebook | None = None,
        tile: int = 64,
        device: torch.device | None = None,
    ) -> None:
        check_split(head_dim, sub_dim)
        self.width = check_size(num_centroids)
        self.head_dim, self.sub_dim, self.num_centroids, self.tile = head_dim, sub_dim, num_centroids, tile
        self.parts = head_dim // sub_dim
        self.centroids = torch.full((self.parts, num_centroids, sub_dim), torch.nan, device=device)
        self.trained = False
        if codebook is not None:
            self.load_state_dict({"centroids": codebook.centroids})

    @property
    def bits_per_element(self) -> float:
        return self.width / self.sub_dim

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            f"codes{plane}": ((self.tile * plane // WORD_BITS, self.parts), torch.int16)
            for plane in planes_of(self.width)
        }

    # --- codes ---
    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        book = self._book()
        parts = [self._pack(book.encode(part)) for part in to_tiles(x, self.tile).split(CHUNK, dim=2)]
        return Packed({n: torch.cat([part[n] for part in parts], dim=2) for n in parts[0]}, x.shape[2], x.dtype)

    def decode(self, packed: Packed) -> Tensor:
        x = self._book().decode(self._codes(packed, slice(None))).flatten(2, 3)
        return x[:, :, : packed.length].to(packed.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        if index.shape[-1] % self.tile:
            raise InputError(f"{index.shape[-1]} tokens selected; a multiple of the tile ({self.tile}) is needed")
        codes = self._codes(packed, slice(None)).flatten(2, 3)
        codes = codes.gather(2, index[..., None].expand(-1, -1, -1, self.parts)).unflatten(2, (-1, self.tile))
        return Packed(self._pack(codes), index.shape[-1], packed.dtype)

    # --- attention by table ---
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        split = query.unflatten(-1, (self.parts, 1, self.sub_dim))  # [B, H, N, S, 1, d]
        centroids = self._book().centroids.to(query.dtype)
        table = (split @ centroids.transpose(-1, -2)).flatten(3)  # [B, H, N, S * C]
        found = [query.new_zeros(*query.shape[:3], 0)]
        for entries in self._entries(packed):  # [B, H, t, S]
            picked = entries.flatten(2)[:, :, None].expand(-1, -1, query.shape[2], -1)
            found.append(table.gather(3, picked).unflatten(3, (-1, self.parts)).sum(-1))
        return torch.cat(found, dim=-1)[..., : packed.length]

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        short = -weights.shape[-1] % self.tile
        weights = torch.nn.functional.pad(weights, (0, short))
        sums = weights.new_zeros(*weights.shape[:3], self.parts * self.num_centroids)
        step = CHUNK * self.tile
        for part, entries in zip(weights.split(step, dim=-1), self._entries(packed), strict=True):
            where = entries.flatten(2)[:, :, None].expand(-1, -1, weights.shape[2], -1)
            sums.scatter_add_(3, where, part.repeat_interleave(self.parts, dim=-1))
        centroids = self._book().centroids.to(weights.dtype)
        grouped = sums.unflatten(-1, (self.parts, 1, self.num_centroids))  # [B, H, N, S, 1, C]
        result: Tensor = (grouped @ centroids).flatten(3)
        return result

    # --- state ---
    def state_dict(self) -> dict[str, Tensor]:
        """``{"centroids": float32 [S, C, d]}``; NaN while there are none."""
        return {"centroids": self.centroids}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        found = state.get("centroids")
        if found is None or found.shape != self.centroids.shape:
            shape = None if found is None else tuple(found.shape)
            raise CheckpointError(
                f"centroids of shape {tuple(self.centroids.shape)} are needed (sub_dim={self.sub_dim}, "
                f"num_centroids={self.num_centroids}, head_dim={self.head_dim}); found {shape}"
            )
        self.centroids = found.to(self.centroids)
        self.trained = bool(found.isfinite().all())

    # --- inside ---
    def _book(self) -> PQCodebook:
        if not self.trained:
            raise ConfigError(
                "this quantizer has no codebook yet: name a file that 'fade train-codebook' wrote, or call "
                "cache.set_codebooks(load_codebooks(file)) before the first token"
            )
        return PQCodebook(self.centroids)

    def _pack(self, codes: Tensor) -> dict[str, Tensor]:
        fields, below = {}, self.width
        for plane in planes_of(self.width):
            below -= plane
            fields[f"codes{plane}"] = pack_codes((codes >> below) & ((1 << plane) - 1), plane, "token")
        return fields

    def _codes(self, packed: Packed, tiles: slice) -> Tensor:
        """Centroid numbers ``[B, H, n, tile, S]`` (int64) of some tiles."""
        codes: Tensor | int = 0
        for plane in planes_of(self.width):
            words = packed.fields[f"codes{plane}"][:, :, tiles]
            codes = (codes << plane) | unpack_codes(words, plane, "token", torch.int64)
        return torch.as_tensor(codes)

    def _entries(self, packed: Packed) -> list[Tensor]:
        """Rows of the table ``[S * C]`` that each token reads: ``[B, H, t, S]`` for every chunk of tiles."""
        tiles = next(iter(packed.fields.values())).shape[2]
        first = torch.arange(self.parts, device=self.centroids.device) * self.num_centroids
        return [self._codes(packed, slice(at, at + CHUNK)).flatten(2, 3) + first for at in range(0, tiles, CHUNK)]


class PQConfig(QuantizerConfig):
    """``kind = "pq"``: product quantization with trained codebooks.

    Attributes:
        file: codebooks that ``fade train-codebook`` wrote; without it, ``cache.set_codebooks`` must bring them.
        sub_dim: channels of a sub-vector.
        num_centroids: centroids of a sub-vector; ``log2(num_centroids) / sub_dim`` bits an element.
        bits: not a choice here; see ``num_centroids``.
    """

    kind: Literal["pq"] = "pq"
    bits: None = None  # type: ignore[assignment]
    file: str | None = None
    sub_dim: int = Field(default=4, ge=1)
    num_centroids: int = 256

    @field_validator("num_centroids")
    @classmethod
    def _packable(cls, num_centroids: int) -> int:
        check_size(num_centroids)
        return num_centroids

    def with_bits(self, bits: int) -> PQConfig:
        """Refused with ``ConfigError``: the codebook fixes the width."""
        raise ConfigError(
            f"a pq quantizer cannot be asked for {bits} bits: its codebook fixes the width. Use tier = 'packed' or 'pq'"
        )

    def build(self, context: QuantizerContext) -> Quantizer:
        name = f"{context.layer}.{_SIDES[context.side]}.centroids"
        book = None
        try:
            check_split(context.head_dim, self.sub_dim)
            if self.file is not None:
                books = _loaded(self.file)
                if name not in books:
                    raise CheckpointError(f"{self.file!r} has no codebook {name!r}; train one on this model")
                book = PQCodebook(books[name])
            return PQQuantizer(context.head_dim, self.sub_dim, self.num_centroids, book, context.tile, context.device)
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"{context.side} quantizer of layer {context.layer}: {error}") from error


class PQTier(TierConfig):
    """``tier = "pq"``: keys and values by product quantization, whatever the other rungs use.

    Attributes:
        file: as in ``PQConfig``.
        sub_dim: as in ``PQConfig``.
        num_centroids: as in ``PQConfig``.
    """

    tier: Literal["pq"] = "pq"
    file: str | None = None
    sub_dim: int = Field(default=4, ge=1)
    num_centroids: int = 256

    @field_validator("num_centroids")
    @classmethod
    def _packable(cls, num_centroids: int) -> int:
        check_size(num_centroids)
        return num_centroids

    def quantizers(self, keys: QuantizerConfig, values: QuantizerConfig) -> tuple[QuantizerConfig, QuantizerConfig]:
        own = PQConfig(file=self.file, sub_dim=self.sub_dim, num_centroids=self.num_centroids)
        return own, own


def _loaded(path: str) -> dict[str, Tensor]:
    found = Path(path)
    stamp = found.stat().st_mtime_ns if found.is_file() else 0
    return _remembered(path, stamp)


@lru_cache(maxsize=8)
def _remembered(path: str, stamp: int) -> dict[str, Tensor]:
    return load_codebooks(path)
