"""Full precision behind the quantizer interface: nothing is lost, and tokens move."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_seed

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 15, 16, 45])
def test_tokens_come_back_bit_by_bit(dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(fresh_seed())
    quantizer = FullQuantizer(8, tile=16)
    x = torch.randn(2, 3, length, 8).to(dtype)
    packed = quantizer.encode(x)
    decoded = quantizer.decode(packed)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, x)
    assert packed.fields["raw"].shape == (2, 3, -(-length // 16), 16, 8)
    assert quantizer.field_shapes() == {"raw": ((16, 8), dtype)}
    assert quantizer.bits_per_element == 8 * dtype.itemsize
    index = torch.randint(0, length, (2, 3, 16))
    chosen = quantizer.decode(quantizer.select(packed, index))
    assert torch.equal(chosen, x.gather(2, index[..., None].expand(-1, -1, -1, 8)))


def test_scores_and_combine_are_plain_products() -> None:
    torch.manual_seed(fresh_seed())
    quantizer = FullQuantizer(8, tile=16)
    x, query, weights = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 3, 8), torch.rand(1, 2, 3, 20)
    packed = quantizer.encode(x)
    assert torch.equal(quantizer.scores(query, packed), query @ x.transpose(-1, -2))
    assert torch.equal(quantizer.combine(weights, packed), weights @ x)


@pytest.mark.parametrize("shape", [(2, 3, 8), (1, 1, 4, 9), (1, 1, 0, 8)])
def test_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="D=8"):
        FullQuantizer(8, tile=16).encode(torch.zeros(shape))


def test_a_selection_that_fills_no_tile_is_refused() -> None:
    quantizer = FullQuantizer(8, tile=16)
    packed = quantizer.encode(torch.zeros(1, 1, 16, 8))
    with pytest.raises(InputError, match="multiple of the tile"):
        quantizer.select(packed, torch.zeros(1, 1, 3, dtype=torch.long))
