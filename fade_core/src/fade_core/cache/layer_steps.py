"""How the decode steps of a layer run: the two ops, on buffers that eager and compiled steps share."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from fade_core.cache.layer_plan import NEVER, LayerPlan
from fade_core.errors import InputError, NonFiniteError
from fade_core.eviction import together
from fade_core.eviction.contents import LayerContents
from fade_core.ops.buffers import LOGICAL, NONFINITE, ODD_MASK, LayerBuffers, layer_buffers
from fade_core.ops.step import plan_step, read_all, step_name, take_in
from fade_core.support.transfer import sent

_warm: set[tuple[Hashable, ...]] = set()
"""What layers whose quantizers learn have run a step for in this process."""


class LayerSteps:
    """The steps of one layer.

    Args:
        plan: what the layer is made of.
        max_length: most tokens the layer may see, or ``None``.

    Attributes:
        counters: int64 ``[3]`` on the device (``fade_core.ops.buffers``).
        first: position of each row's first token, int64 ``[B]`` on the device.
        buffers: what a step reads and writes; ``None`` until they are wired again.
        rules: how eager steps take tokens in: as they leave a full window, and as none leaves it.
        slots: width of the masks of compiled steps.
        compiles: whether ``generate`` may compile steps.
        ready: whether the next token may come straight into the window: every row holds one.
        behind: whether steps have changed lengths that the host has not read back.
        stale: whether the logical length is among them: compiled steps tell the host nothing.
        coming: tokens that have been announced since then, at most.
        quiet: tokens that may come before there is anything to do between two passes.
        roomy: whether nothing leaves the window meanwhile.
        checks_masks: whether this layer looks at the masks of compiled steps, for all layers.
        assume_padding_mask: whether the mask of a compiled step is taken to hide padding alone, as the prompt's did.
    """

    def __init__(self, plan: LayerPlan, max_length: int | None) -> None:
        self.plan, self.max_length = plan, max_length
        self.compiles = self.checks_masks = False
        self.counters = self.first = torch.zeros(0, dtype=torch.long)
        self.forget()

    def forget(self) -> None:
        """The layer holds nothing; numbers of fixed size stay where they are."""
        self.ready = self.behind = self.stale = self.assume_padding_mask = self.roomy = False
        self.coming = self.quiet = 0
        self.slots = bucket(self.max_length or 1)
        if self.max_length is None:
            self.counters = self.first = torch.zeros(0, dtype=torch.long)
        self.counters.zero_()
        self.rewire()

    # --- getting ready ---
    def replan(self, fresh: bool) -> None:
        """Take the plan of the quantizers as they are now; ``fresh``: under a name that no other has."""
        for quantizer in (q for tier in self.plan.ladder.tiers for q in (tier.keys, tier.values)):
            quantizer.planes()  # made once: not in the memory pool of a CUDA graph, where nothing may stay behind
        self.step_plan = plan_step(self.plan.step(), self.plan.compatibility, fresh)
        checked = replace(self.step_plan.rule, on_nonfinite="checked")
        self.rules = checked, replace(checked, threshold=NEVER)
        self.rewire()

    def rewire(self) -> None:
        """Buffers are others now, or may be."""
        self.buffers: LayerBuffers | None = None
        self._appended: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._attended: tuple[list[Tensor], list[Tensor]] = ([], [])

    def start_from(self, held: LayerContents) -> None:
        """The host has moved tokens: steps go on from what is there now."""
        self.counters[LOGICAL].fill_(held.logical)  # an assignment would wait for the GPU
        padding = sent(held.padding, held.device)
        if len(self.first) == len(padding):
            self.first.copy_(padding)
        else:
            self.first = padding.clone()
        self.ready = bool((held.window.numbers.host > 0).all())
        self.coming = self.quiet = 0
        self.rewire()

    def look_ahead(self, held: LayerContents) -> None:
        """Work out ``quiet`` and ``roomy``, as far as the host knows, for the passes after the tokens that are announced."""
        ladder, window = self.plan.ladder, held.window
        logical, tokens = held.logical + self.coming, window.longest + self.coming
        quiet, self.roomy = self.slots - logical, not held.stores or tokens < ladder.threshold
        if self.roomy:
            quiet = min(quiet, window.capacity - tokens, ladder.threshold - 1 - tokens if held.stores else quiet)
        else:  # steps send tokens out of the window themselves, a tile at a time, as long as tiles are reserved for them
            quiet = min(quiet, ladder.threshold - 1 + held.stores[0].ahead() * ladder.tile - tokens)
        if ladder.bounded:
            quiet = min(quiet, self.plan.every - 1 - (logical - int(held.ranked_at.min())))
        on_host = held.device.type == "cpu"  # where the host packs as soon as it can
        self.quiet = max(0, quiet) if self.ready and (self.roomy or not on_host) else 0

    def before_move(self, held: LayerContents) -> int:
        """Tokens that may come, all of them known to come, before any token of the layer moves."""
        if not held.stores:
            return self.quiet
        threshold, tile = self.plan.ladder.threshold, self.plan.ladder.tile
        came = held.window.lengths + self.coming  # [B], as if none had left
        inside = torch.where(came < threshold, came, threshold - tile + (came - threshold) % tile)
        return min(self.quiet, threshold - 1 - int(inside.max()))

    def wire(self, held: LayerContents) -> LayerBuffers:
        """What a step reads and writes; the compiler is promised that it stays where it is."""
        if self.buffers is not None:
            return self.buffers
        # a graph is not told that tiles lie in runs, and then that they do not
        moves = self.compiles and self.plan.ladder.bounded
        self.buffers = layer_buffers(held.window, held.stores, self.counters, held.queries, moves)
        if self.compiles:
            self._appended, self._attended = self.buffers.operands("append"), self.buffers.operands("attend")
            self.name = step_name(self.step_plan, self.buffers)
            for tensor in (*(t for part in self.operands for t in part), self.first):
                # unguarded: another cache of the same shapes runs the same graph, and CUDA graphs are recorded anew
                torch._dynamo.mark_static_address(tensor, guard=False)
        return self.buffers

    @torch.no_grad()
    def warm_up(self, held: LayerContents) -> None:
        """Run a step on empty buffers and undo it.

        What ops and quantizers make once and keep (compiled kernels, rotations on the device) is made here, outside the
        memory pool of a CUDA graph, where nothing may stay behind. Quantizers that learn are others after each prompt: what
        they keep that is not the process's is made then, and a step of theirs is run once in a process.
        """
        if not self.plan.learners or self._is_new(held):
            held.window.reserve(1)
            keys, values = (torch.zeros_like(t[:, :, :1]) for t in (held.window.keys, held.window.values))
            take_in(self.step_plan, keys, values, self.wire(held))
            query = keys.new_zeros((held.rows, max(self.plan.query_heads, held.heads), 1, keys.shape[3]))
            read_all(self.step_plan, query, self.wire(held), None, None, 1.0, None)
            self.tell_refused()
            self.counters.zero_()
            held.window.clear()
        for store in held.stores if len(held.stores) > 1 else ():  # tokens will be demoted
            store.warm_up()
        if held.stores and self.plan.ladder.bounded and self.checks_masks:  # once is enough for all layers
            together.warm_up(held)

    def _is_new(self, held: LayerContents) -> bool:
        """Whether no layer in this process that is like this one, and holds as much, was asked before."""
        like = (
            self.plan.compatibility,
            held.window.keys.shape,
            held.window.values.shape,
            held.window.keys.dtype,
            held.device,
        )
        if like in _warm:
            return False
        _warm.add(like)
        return True

    @property
    def operands(self) -> tuple[list[Tensor], ...]:
        """Every tensor that the ops of a compiled step are given, in an order that stays; empty where none is wired."""
        return *self._appended, *self._attended

    # --- the two ops, inside a graph ---
    def append_compiled(self, keys: Tensor, values: Tensor) -> None:
        """Take in new tokens ``[B, H_kv, 1, D]``."""
        self.behind = self.stale = True
        torch.ops.fade.append(keys, values, *self._appended, self.name)

    def attend_compiled(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention ``[B, H_q, 1, D]`` of the token that has just been taken in; arguments as ``read_all``'s.

        On a CPU every mask is honoured. Elsewhere nothing may be read back: while the prompt's mask hid nothing but
        padding, a step's is taken to do the same, and the first layer counts the steps for which that was wrong.
        """
        first = None
        if self.assume_padding_mask:
            mask, first = (mask, self.first) if self.checks_masks else (None, None)
        output: Tensor = torch.ops.fade.attend(query, *self._attended, mask, sinks, scaling, softcap, self.name, first)
        return output

    # --- what went wrong ---
    def unread(self, held: LayerContents) -> list[Tensor]:
        """The device's numbers that ``read_back`` reads: counters, and int32 ones."""
        return [self.counters, held.window.numbers.device, *(store.table.used.device for store in held.stores[:1])]

    def read_back(self, held: LayerContents, numbers: Sequence[Tensor] = ()) -> None:
        """Read back the lengths that steps have changed.

        Args:
            held: the layer's tokens.
            numbers: what ``unread`` names, if it has been read already.

        Raises:
            InputError: if compiled steps went past ``max_cache_len``, were given a mask that hid stored tokens, or more of
                them came than tiles were reserved for.
            NonFiniteError: if compiled steps were given NaN or infinity.
        """
        counters = (numbers[0] if numbers else self.counters.cpu()).tolist()
        held.logical, self.coming = counters[LOGICAL], 0
        mirrors = [held.window.numbers, *(store.table.used for store in held.stores[:1])]
        for mirror, read in zip_longest(mirrors, numbers[1:]):
            mirror.pull(read)
        what, error = "", InputError
        if self.max_length is not None and held.logical > self.max_length:
            what = f"{held.logical} tokens were fed to a cache of max_cache_len={self.max_length}"
        elif held.window.longest > held.window.capacity:
            what = (
                f"{held.window.longest} tokens were fed to a window of {held.window.capacity}: compiled steps went by and "
                "nothing made room; ask the cache for get_mask_sizes(1, 0) before each step, as generate does"
            )
        if counters[ODD_MASK]:
            what = f"{counters[ODD_MASK]} steps came with a mask that hides stored tokens, while the prompt's hid padding alone"
        if counters[NONFINITE]:
            error, what = NonFiniteError, "steps brought NaN or infinity"
        if what:  # again and again, until reset
            raise error(f"layer {self.plan.index}: {what}; compiled steps cannot refuse. Call reset() and start again")
        self.behind = self.stale = False

    def tell_refused(self) -> None:
        """Say, once a reason, which calls the reference computed in place of a kernel."""
        for op, kernel, reason in sorted(self.step_plan.refused):
            self.plan.emit_once({"op": op, "kernel": kernel, "reason": reason})
        self.step_plan.refused.clear()


def bucket(tokens: int) -> int:
    """The size of buffers for ``tokens``: 256 or one of four an octave, so that few sizes are ever compiled for."""
    if tokens <= 256:
        return 256
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step
