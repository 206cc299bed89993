"""Bytes that a cache really holds beside DynamicCache, and the peak while a prompt goes in. Real model, no hub.

    python benchmarks/memory.py [--prompt 2048] [--steps 128] [--model smollm2] [--preset safe balanced aggressive]

``held`` is the sum over the tensor storages reachable from the cache. ``peak`` is the largest number of bytes alive in keys,
values, packed tiles and the encoders' temporaries while the prompt is taken in: the attention calls of the model are replayed
layer by layer on their own, so that the model's activations and logits do not hide it.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache, load_model
from fade_core.cache.attention import fade_attention
from fade_core.support.memory import PeakTracker, live_bytes
from fade_eval.texts import passages


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--prompt", type=int, default=2048)
    arguments.add_argument("--steps", type=int, default=128)
    arguments.add_argument("--preset", nargs="+", default=["safe"], choices=["safe", "balanced", "aggressive"])
    wanted = arguments.parse_args()
    model, tokenizer = load_model(wanted.model)
    text = "\n\n".join(p.text for p in passages("evaluation"))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : wanted.prompt]
    exact = DynamicCache(config=model.config)
    generate(model, ids, exact, wanted.steps)
    baseline = live_bytes(exact)
    print(f"{'DynamicCache':13}{exact.get_seq_length():>7} tokens {baseline / 1e6:9.2f} MB held ({model.dtype})")
    for preset in wanted.preset:
        config = getattr(FadeConfig, preset)()
        with create_tiered_cache(model, config) as cache:
            generate(model, ids, cache, wanted.steps)
            held, report = live_bytes(cache), cache.memory_report()
        peak, packed, layer = replay(model, ids, config)
        print(
            f"{preset:13}{cache.get_seq_length():>7} tokens {held / 1e6:9.2f} MB held = {held / baseline:.3f}x "
            f"(report {report.total / 1e6:.2f} MB); in the model's dtype at 16 bits {report.baseline16 / held:.2f}x smaller; "
            f"prefill peak {peak / 1e6:.2f} MB = packed {packed / 1e6:.2f} MB + {(peak - packed) / layer:.2f} layers' K/V"
        )


def generate(model: torch.nn.Module, ids: torch.Tensor, cache: object, steps: int) -> None:
    model.generate(
        ids, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
    )


def replay(model: torch.nn.Module, ids: torch.Tensor, config: FadeConfig) -> tuple[int, int, int]:
    """Peak bytes, packed bytes and one layer's exact K/V when each layer's K/V is made, attended to and let go."""
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_shape = (1, text.num_key_value_heads, ids.shape[1], head_dim)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), create_tiered_cache(model, config) as cache:
        query = torch.randn(1, text.num_attention_heads, ids.shape[1], head_dim, generator=generator, dtype=model.dtype)
        output_bytes = query.numel() * query.element_size()
        with PeakTracker() as tracker:
            for layer in range(text.num_hidden_layers):
                keys = torch.randn(kv_shape, generator=generator, dtype=model.dtype)
                values = torch.randn(kv_shape, generator=generator, dtype=model.dtype)
                handles = cache.update(keys, values, layer)
                del keys, values
                fade_attention(model.model.layers[layer].self_attn, query, *handles, None)
                del handles
        packed = live_bytes(cache)
    return tracker.peak - 2 * output_bytes, packed, 2 * kv_shape[1] * kv_shape[2] * kv_shape[3] * model.dtype.itemsize


if __name__ == "__main__":
    main()
