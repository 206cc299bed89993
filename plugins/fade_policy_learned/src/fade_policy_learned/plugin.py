"""What FADE finds on the entry-point group ``fade``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fade_core import PolicyConfig, hookimpl

if TYPE_CHECKING:
    from fade_policy_learned.policy import LearnedPolicy


class LearnedConfig(PolicyConfig):
    """``kind = "learned"``: least predicted worth first.

    Attributes:
        checkpoint: file that ``LearnedPolicy.save`` wrote. There is no default: no trained policy is shipped.
    """

    kind: Literal["learned"] = "learned"
    checkpoint: str

    def build(self) -> LearnedPolicy:
        """The policy of ``checkpoint``. Raises ``CheckpointError`` for a file that is none."""
        from fade_policy_learned.policy import LearnedPolicy

        return LearnedPolicy.load(self.checkpoint)


@hookimpl
def fade_policies() -> list[type[PolicyConfig]]:
    return [LearnedConfig]
