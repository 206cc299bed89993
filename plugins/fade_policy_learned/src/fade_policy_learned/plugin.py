"""What FADE finds on the entry-point group ``fade``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fade_core import PolicyConfig, hookimpl

if TYPE_CHECKING:
    import typer

    from fade_policy_learned.policy import LearnedPolicy


class LearnedConfig(PolicyConfig):
    """``kind = "learned"``: least predicted worth first.

    Attributes:
        checkpoint: file that ``fade train-policy`` or ``LearnedPolicy.save`` wrote, or the name of a policy that is
            shipped ("smollm2").
        heads: "shared" lets the heads of a layer compete for its budget, "equal" gives each the same.
    """

    kind: Literal["learned"] = "learned"
    checkpoint: str = "smollm2"
    heads: Literal["shared", "equal"] = "shared"

    def build(self) -> LearnedPolicy:
        """The policy of ``checkpoint``. Raises ``CheckpointError`` for a file that is none."""
        from fade_policy_learned.policy import LearnedPolicy

        return LearnedPolicy.load(self.checkpoint, self.heads)

    def check_model(self, model: Any) -> None:
        self.build().check_model(model)


@hookimpl
def fade_policies() -> list[type[PolicyConfig]]:
    return [LearnedConfig]


@hookimpl
def fade_commands(app: typer.Typer) -> None:
    from fade_policy_learned.commands import train_policy_command

    app.command("train-policy")(train_policy_command)
