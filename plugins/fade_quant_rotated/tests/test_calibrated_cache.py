"""The calibrated quantizer inside a real cache: with eviction, saving, and a codebook tier below it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.cache.manual import assign_layer
from fade_core.errors import CheckpointError, InputError
from fade_quant_rotated import load_codebooks, save_codebooks
from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.training import train_codebooks

transformers = pytest.importorskip("transformers")

HEADS, DIM, VOCAB = 2, 16, 97


@pytest.fixture
def model(seed: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def file(model: torch.nn.Module, tmp_path: Path) -> str:
    path = tmp_path / "calibration.safetensors"
    calibrate(model, [torch.randint(VOCAB, (300,)) for _ in range(2)], bits=5.0).save(path)
    return str(path)


def fields(file: str, **more: object) -> dict[str, object]:
    side = {"kind": "calibrated", "file": file, "side_bits": 6.0}
    return {"n_sink": 4, "recent_window": 32, "keys": side, "values": side, **more}


@torch.no_grad()
def run(model: torch.nn.Module, cache: object, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits of the steps after the prompt."""
    model(ids[:, :prompt], past_key_values=cache)
    return torch.cat(
        [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(prompt, ids.shape[1])], 1
    )


@pytest.mark.parametrize(
    "more",
    [{}, {"policy": {"kind": "h2o", "budget": 0.6, "every": 16}}, {"policy": {"kind": "position", "budget": 150}}],
    ids=["all", "h2o", "position"],
)
def test_every_stored_token_is_the_one_its_position_says(model: torch.nn.Module, file: str, more: dict) -> None:
    ids = torch.randint(VOCAB, (2, 300))
    exact = transformers.DynamicCache(config=model.config)
    run(model, exact, ids, 250)
    config = FadeConfig(**fields(file, **more))
    with create_tiered_cache(model, config) as cache:
        run(model, cache, ids, 250)
        for layer, held in zip(cache.tiered, exact.layers, strict=True):
            (store,) = layer.held.stores
            positions = store.live_positions()
            for found, wanted in zip((store.decode(0), store.decode(1)), (held.keys, held.values), strict=True):
                live = positions >= 0
                index = positions.clamp_min(0)[..., None].expand(-1, -1, -1, DIM)
                true = wanted.gather(2, index)[live]
                assert float((found[live] - true).norm() / (true - true.mean(0)).norm()) < 0.25


def test_heads_may_lose_different_tokens(model: torch.nn.Module, file: str) -> None:
    """The heads of a layer share its bits: none may be lost with a sibling's tokens."""
    ids = torch.randint(VOCAB, (1, 320))
    exact = transformers.DynamicCache(config=model.config)
    run(model, exact, ids, 320 - 1)
    with create_tiered_cache(model, FadeConfig(**fields(file))) as cache:
        run(model, cache, ids, 320 - 1)
        for layer, held in zip(cache.tiered, exact.layers, strict=True):
            tiers = layer.held.tier_map()
            tiers[0, 0, 68:132] = -1
            tiers[0, 1, 10:200] = -1
            assign_layer(layer, tiers)
            (store,) = layer.held.stores
            live = store.live_positions() >= 0
            index = store.live_positions().clamp_min(0)[..., None].expand(-1, -1, -1, DIM)
            for found, wanted in zip((store.decode(0), store.decode(1)), (held.keys, held.values), strict=True):
                true = wanted.gather(2, index)[live]
                assert float((found[live] - true).norm() / (true - true.mean(0)).norm()) < 0.25


def test_logits_are_close_and_survive_saving(model: torch.nn.Module, file: str, tmp_path: Path) -> None:
    ids = torch.randint(VOCAB, (1, 260))
    wanted = run(model, transformers.DynamicCache(config=model.config), ids, 200)
    with create_tiered_cache(model, FadeConfig(**fields(file))) as cache:
        found = run(model, cache, ids[:, :240], 200)
        error = (found.softmax(-1) - wanted[:, :40].softmax(-1)).abs().sum(-1).mean()
        assert float(error) < 0.02
        cache.save(tmp_path / "cache.safetensors")
        with TieredKVCache.load(tmp_path / "cache.safetensors", model) as loaded, torch.no_grad():
            for at in range(240, 260):
                step = ids[:, at : at + 1]
                again = model(step, past_key_values=loaded).logits
                assert torch.equal(again, model(step, past_key_values=cache).logits)


def test_another_models_file_is_refused_before_a_token_is_seen(model: torch.nn.Module, file: str) -> None:
    """The same geometry, so that nothing but the weights tells the models apart."""
    other = type(model)(model.config).eval()
    for ladder in ({}, {"layers": {"1": {"keys": {"kind": "uniform"}, "values": {"kind": "uniform"}}}}):
        with pytest.raises(
            CheckpointError, match=r"another model \(LlamaForCausalLM; likeness -?0\.\d\d\).*fade calibrate"
        ):
            create_tiered_cache(other, FadeConfig(**fields(file, **ladder)))
    assert other.config._attn_implementation != "fade"
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
        for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs + 0.02 * theirs.std() * torch.randn_like(theirs))  # a fine-tune
    create_tiered_cache(other, FadeConfig(**fields(file))).detach()
    with torch.device("meta"):
        skeleton = type(model)(model.config).eval()
    create_tiered_cache(skeleton, FadeConfig(**fields(file))).detach()  # nothing to compare with yet
    deeper = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**model.config.to_dict(), "head_dim": 2 * DIM}))
    with pytest.raises(CheckpointError, match=f"head_dim {DIM}; this model has .* head_dim {2 * DIM}.*fade calibrate"):
        create_tiered_cache(deeper.eval(), FadeConfig(**fields(file)))


def test_codebooks_form_a_tier_and_are_counted(model: torch.nn.Module, file: str, tmp_path: Path, seed: int) -> None:
    books = train_codebooks(model, [torch.randint(VOCAB, (300,))], sub_dim=4, num_centroids=16, seed=seed)
    save_codebooks(books, tmp_path / "books.safetensors")
    tensors = load_codebooks(tmp_path / "books.safetensors")
    ladder = [
        {"tier": "packed", "capacity": 64},
        {"tier": "pq", "num_centroids": 16},
    ]
    config = FadeConfig(**fields(file, ladder=ladder, policy={"kind": "h2o", "every": 16}))
    ids = torch.randint(VOCAB, (1, 300))
    with create_tiered_cache(model, config) as cache:
        with pytest.raises(InputError, match="no quantizer takes"):
            cache.set_codebooks({"7.keys.centroids": tensors["0.keys.centroids"]})
        cache.set_codebooks(tensors)
        run(model, cache, ids, 250)
        packed, product = cache.tiered[0].held.stores
        assert int(product.lengths.min()) > int(packed.lengths.max()) > 0
        held = sum(book.nbytes for book in books.values())
        counted = sum(row.nbytes for row in cache.memory_report().rows if "centroids" in row.kind)
        assert counted == held
