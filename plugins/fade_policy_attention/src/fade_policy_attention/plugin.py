"""What FADE finds on the entry-point group ``fade``."""

from __future__ import annotations

from fade_core import PolicyConfig, hookimpl


@hookimpl
def fade_policies() -> list[type[PolicyConfig]]:
    from fade_policy_attention.adakv import AdaKVConfig
    from fade_policy_attention.expected_attention import ExpectedAttentionConfig
    from fade_policy_attention.key_norm import KeyNormConfig
    from fade_policy_attention.keydiff import KeyDiffConfig
    from fade_policy_attention.kvzip import KVzipConfig
    from fade_policy_attention.normalised_h2o import NormalisedH2OConfig
    from fade_policy_attention.snapkv import SnapKVConfig
    from fade_policy_attention.tova import TovaConfig

    return [
        NormalisedH2OConfig,
        SnapKVConfig,
        TovaConfig,
        ExpectedAttentionConfig,
        KeyNormConfig,
        KeyDiffConfig,
        KVzipConfig,
        AdaKVConfig,
    ]
