"""Published eviction policies for FADE, one a file."""

from __future__ import annotations

from fade_policy_attention.adakv import AdaKVPolicy
from fade_policy_attention.expected_attention import ExpectedAttentionPolicy
from fade_policy_attention.key_norm import KeyNormPolicy
from fade_policy_attention.keydiff import KeyDiffPolicy
from fade_policy_attention.kvzip import KVzipPolicy
from fade_policy_attention.normalised_h2o import NormalisedH2OPolicy
from fade_policy_attention.snapkv import SnapKVPolicy
from fade_policy_attention.tova import TovaPolicy

__all__ = [
    "AdaKVPolicy",
    "ExpectedAttentionPolicy",
    "KVzipPolicy",
    "KeyDiffPolicy",
    "KeyNormPolicy",
    "NormalisedH2OPolicy",
    "SnapKVPolicy",
    "TovaPolicy",
]
