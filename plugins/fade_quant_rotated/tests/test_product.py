from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sealing import seal, unsealed

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import QuantizerContext
from fade_core.testing import check_quantizer
from fade_quant_rotated import PQCodebook, PQConfig, PQQuantizer, load_codebooks, save_codebooks
from fade_quant_rotated.product import PQTier


def mixture(*shape: int) -> torch.Tensor:
    """Vectors around a few centres, as keys are."""
    centres = 3 * torch.randn(7, shape[-1])
    return centres[torch.randint(7, shape[:-1])] + 0.5 * torch.randn(*shape)


@pytest.mark.parametrize(("sub_dim", "num_centroids"), [(4, 64), (8, 16), (2, 4), (4, 8)])
def test_attention_by_table_equals_attention_over_decoded(sub_dim: int, num_centroids: int, seed: int) -> None:
    x = mixture(2, 3, 150, 48)
    quantizer = PQQuantizer(48, sub_dim, num_centroids, PQCodebook.train(x, sub_dim, num_centroids, seed))
    packed = quantizer.encode(x)
    assert packed.nbytes * 8 == quantizer.bits_per_element * 2 * 3 * 192 * 48
    decoded = quantizer.decode(packed).double()
    query, weights = torch.randn(2, 3, 5, 48), torch.rand(2, 3, 5, 150)
    close = {"atol": 1e-3, "rtol": 1e-4}
    wanted = query.double() @ decoded.transpose(-1, -2)
    torch.testing.assert_close(quantizer.scores(query, packed).double(), wanted, **close)
    torch.testing.assert_close(quantizer.combine(weights, packed).double(), weights.double() @ decoded, **close)


def test_many_tiles_are_read_in_chunks(seed: int) -> None:
    x = mixture(1, 2, 64 * 35 + 3, 16)
    quantizer = PQQuantizer(16, 4, 16, PQCodebook.train(x, 4, 16, seed))
    packed = quantizer.encode(x)
    decoded = quantizer.decode(packed).double()
    query, weights = torch.randn(1, 2, 3, 16), torch.rand(1, 2, 3, x.shape[2])
    wanted = query.double() @ decoded.transpose(-1, -2)
    torch.testing.assert_close(quantizer.scores(query, packed).double(), wanted, atol=1e-3, rtol=1e-4)
    wanted = weights.double() @ decoded
    torch.testing.assert_close(quantizer.combine(weights, packed).double(), wanted, atol=1e-2, rtol=1e-4)


def test_codes_are_the_nearest_centroids_and_training_lowers_the_error(seed: int) -> None:
    x = mixture(500, 32)
    book = PQCodebook.train(x, 4, 32, seed)
    codes = book.encode(x)
    for part in range(8):
        distance = torch.cdist(x[:, 4 * part : 4 * part + 4], book.centroids[part])
        nearest = distance.min(-1)[0]
        picked = distance.gather(1, codes[:, part, None]).squeeze(1)
        torch.testing.assert_close(picked, nearest, atol=1e-3, rtol=1e-4)
    trained = float((book.decode(codes) - x).square().mean())
    few = PQCodebook.train(x, 4, 4, seed)
    assert trained < float((few.decode(few.encode(x)) - x).square().mean()) < float(x.var())
    again = PQCodebook.train(x, 4, 32, seed)
    assert torch.equal(book.centroids, again.centroids)


def test_conformance(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 4000, 64, generator=generator)
    x[..., 1] *= 6
    book = PQCodebook.train(x, 4, 16, seed)
    far = {"extreme_values": "a codebook reaches as far as the vectors it was trained on"}
    results = check_quantizer(
        lambda context: PQQuantizer(64, 4, 16, book, context.tile), seed=seed, head_dims=(64,), expected_failures=far
    )
    assert all(result.passed for result in results), [r for r in results if not r.passed]


def test_files_and_configuration(tmp_path: Path, seed: int) -> None:
    book = PQCodebook.train(mixture(300, 32), 4, 16, seed)
    path = tmp_path / "books.safetensors"
    save_codebooks({"0.keys": book, "0.values": book}, path)
    assert torch.equal(load_codebooks(path)["0.keys.centroids"], book.centroids)
    config = PQConfig(file=str(path), num_centroids=16)
    x = mixture(1, 2, 64, 32)
    built = config.build(QuantizerContext(32))
    assert torch.equal(built.decode(built.encode(x)), PQQuantizer(32, 4, 16, book).decode(built.encode(x)))
    assert built.state_bytes() == book.nbytes == 8 * 16 * 4 * 4
    with pytest.raises(CheckpointError, match=r"1\.keys"):
        config.build(QuantizerContext(32, layer=1))
    with pytest.raises(CheckpointError, match="num_centroids=256"):
        PQConfig(file=str(path)).build(QuantizerContext(32))
    with pytest.raises(CheckpointError, match="train-codebook"):
        PQConfig(file=str(tmp_path / "none")).build(QuantizerContext(32))
    with pytest.raises(ConfigError, match="must divide head_dim"):
        PQConfig(sub_dim=5).build(QuantizerContext(32))
    with pytest.raises(ConfigError, match="cannot be packed"):
        PQConfig(num_centroids=100)
    with pytest.raises(ConfigError, match="fixes the width"):
        config.with_bits(2)
    tier = PQTier(file=str(path), num_centroids=16)
    assert tier.quantizers(config, config) == (config, config)


def test_codebook_files_that_cannot_be_right_are_refused(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "books.safetensors"
    save_codebooks({"0.keys": PQCodebook.train(mixture(300, 32), 4, 16, seed)}, path)
    header, tensors = unsealed(path)
    good, name = tensors["0.keys.centroids"], "0.keys.centroids"
    for changed in (
        {name: good[:, :5].contiguous()},
        {name: good[0]},
        {name: good.long()},
        {name: good * torch.nan},
        {"0.keys.other": good},
        {"-1.keys.centroids": good},
    ):
        with pytest.raises(CheckpointError, match=r"is damaged: tensor .*train-codebook"):
            load_codebooks(seal(path, header, changed))
    with pytest.raises(CheckpointError, match="has format 2"):
        load_codebooks(seal(path, header | {"format": 2}, tensors))
    with pytest.raises(CheckpointError, match="unknown field 'more'"):
        load_codebooks(seal(path, header | {"more": 1}, tensors))
    content = bytearray(seal(path, header, tensors).read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum is not that of what it holds"):
        load_codebooks(path)


def test_without_codebook_encoding_says_what_to_do_and_state_brings_one(seed: int) -> None:
    quantizer = PQConfig(num_centroids=16).build(QuantizerContext(32))
    x = mixture(1, 2, 64, 32)
    with pytest.raises(ConfigError, match="set_codebooks"):
        quantizer.encode(x)
    book = PQCodebook.train(x, 4, 16, seed)
    quantizer.load_state_dict({"centroids": book.centroids})
    assert quantizer.encode(x).length == 64


def test_training_refuses_what_cannot_work() -> None:
    with pytest.raises(InputError, match="30 vectors cannot train 64"):
        PQCodebook.train(torch.randn(30, 32), 4, 64)
    with pytest.raises(InputError, match="NaN"):
        PQCodebook.train(torch.full((300, 32), torch.nan), 4, 64)
    with pytest.raises(ConfigError, match="must divide"):
        PQCodebook.train(torch.randn(300, 32), 3, 64)
    with pytest.raises(ConfigError, match=r"\[S, C, d\]"):
        PQCodebook(torch.randn(4, 4))
