"""What tokens looked like when they could have been evicted, and what they then turned out to be worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from fade_core import AttentionTracker, LayerView
from fade_core.errors import InputError, UnsupportedModelError
from fade_policy_learned.features import DECAY, STATISTICS, token_features
from fade_policy_learned.network import Geometry
from fade_policy_learned.watching import Attention, watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Target = Literal["movement", "mass"]
"""What a token is worth to the queries after the cut. ``mass``: the attention that they give it, averaged over the query heads
of its KV head, summed over queries. ``movement``: the sum over queries and query heads of ``a^2 |W_o (v - o)|^2``, which is how
far the layer's output moves when the token goes (``a``: attention, ``o``: the head's output)."""

PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")
"""Names of the linear layer after attention."""


@dataclass(frozen=True)
class Traces:
    """Tokens that could have been evicted, those of all texts, cuts, layers and heads together.

    Attributes:
        features: float32 ``[N, len(FEATURES)]``, as a policy sees them at the cut.
        targets: float32 ``[N]``, not negative: the worth over the mean worth of the layer's tokens at that cut.
        texts: int64 ``[N]``, the number of the text.
        lists: int64 ``[N]``, numbers the lists that are ranked: tokens of one text, cut, layer and head share one.
        geometry: the model's shape.
    """

    features: Tensor
    targets: Tensor
    texts: Tensor
    lists: Tensor
    geometry: Geometry


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    *,
    cuts: int = 3,
    future: int = 128,
    target: Target = "movement",
    n_sink: int = 4,
    recent_window: int = 64,
    samples: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Traces:
    """Watch ``model`` read ``texts``: one forward pass each, a block of queries and a layer at a time.

    At ``cuts`` places of each text, evenly spaced up to ``future`` tokens before its end, the features of all tokens before
    the place are taken as a policy would see them there, whether at the end of a prompt or in decoding; their worth is
    what the next ``future`` queries make of them. Sinks and the recent window, which are never evicted, are left out.

    Args:
        model: a decoder-only transformers model in evaluation mode.
        texts: token ids, int64 ``[T]`` each.
        cuts: places a text.
        future: queries after each place.
        target: what worth is.
        n_sink: leading tokens that the cache will keep whatever they score.
        recent_window: newest tokens that it will keep.
        samples: tokens of a list that are taken at most, drawn at random.
        seed: of that draw.
        progress: called with the texts done and the texts in all.

    Raises:
        InputError: no text, one that is too short, or an option out of range.
        NonFiniteError: a layer's queries, keys or values are not finite.
        UnsupportedModelError: a model whose attention, or for ``movement`` whose output projection, cannot be watched.
    """
    _check(texts, cuts, future, target, n_sink, recent_window, samples)
    generator = torch.Generator().manual_seed(seed)
    body = getattr(model, "base_model", model)
    config = model.config.get_text_config(decoder=True)
    projections = output_projections(model) if target == "movement" else {}
    found: list[tuple[Tensor, Tensor, int]] = []
    dims: set[tuple[int, int]] = set()
    for number, text in enumerate(texts):
        last = len(text) - future
        places = [last * (i + 1) // cuts for i in range(cuts)]
        shortest = n_sink + recent_window + 2
        places = sorted({max(place, shortest) for place in places})
        reader = _Reader(config.num_hidden_layers, places, future, projections if target == "movement" else None)
        with watching(model, reader.watch):
            body(text.view(1, -1).to(model.device), use_cache=False)
        for features, worth in reader.cuts():
            part = slice(n_sink, features.shape[1] - recent_window)
            dims.add((features.shape[0], reader.head_dim))
            wanted = worth[:, part] / worth[:, part].mean().clamp(min=torch.finfo(torch.float32).tiny)
            drawn = torch.randperm(wanted.shape[1], generator=generator)[:samples].sort().values
            found.append((features[:, part][:, drawn].cpu(), wanted[:, drawn].cpu(), number))
        if progress is not None:
            progress(number + 1, len(texts))
    if len(dims) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has {'no layer of full attention' if not dims else 'layers of different heads'}; "
            f"a policy is trained for one shape of head. Take a policy that needs no training, such as h2o"
        )
    heads, head_dim = next(iter(dims))
    sizes = torch.tensor([worth.shape[1] for _, worth, _ in found for _ in range(heads)])
    return Traces(
        features=torch.cat([features.flatten(0, 1) for features, _, _ in found]),
        targets=torch.cat([worth.flatten() for _, worth, _ in found]),
        texts=torch.cat([torch.full((worth.numel(),), number) for _, worth, number in found]),
        lists=torch.arange(len(sizes)).repeat_interleave(sizes),
        geometry=Geometry(config.num_hidden_layers, heads, head_dim),
    )


@dataclass
class _Layer:
    """What is being gathered of one layer's attention over one text."""

    held: dict[str, Tensor]
    metric: Tensor | None
    features: dict[int, Tensor] = field(default_factory=dict)
    worth: dict[int, Tensor] = field(default_factory=dict)


class _Reader:
    """Statistics of every layer as the cache's tracker keeps them, features at the cuts, worth after them.

    Args:
        num_layers: layers of the model.
        places: lengths at which to take features, ascending.
        future: queries that decide on the worth.
        projections: a layer's output projection, for the worth ``movement``; ``None`` for ``mass``.
    """

    def __init__(
        self, num_layers: int, places: Sequence[int], future: int, projections: dict[int, nn.Module] | None
    ) -> None:
        self.num_layers, self.places, self.future, self.projections = num_layers, tuple(places), future, projections
        self.tracker = AttentionTracker(STATISTICS, DECAY, "all")
        self.layers: dict[int, _Layer] = {}
        self.head_dim = 0

    def cuts(self) -> list[tuple[Tensor, Tensor]]:
        """Features ``[H_kv, c, F]`` and worth ``[H_kv, c]`` of each layer and cut."""
        return [(layer.features[c], layer.worth[c]) for layer in self.layers.values() for c in self.places]

    def watch(self, attention: Attention, part: slice, probabilities: Tensor) -> None:
        """Take in the probabilities ``[H_kv, G, q, T]`` of some queries."""
        heads, tokens, self.head_dim = attention.keys.shape
        if not part.start:
            metric = None if self.projections is None else _metric(attention, self.projections[attention.layer])
            empty = {name: attention.keys.new_zeros(1, heads, tokens) for name in STATISTICS}
            self.layers[attention.layer] = _Layer(empty, metric)
        layer = self.layers[attention.layer]
        bounds = sorted({part.start, part.stop, *self.places, *(c + self.future for c in self.places)})
        for start, stop in pairwise(bounds):
            if start < part.start or stop > part.stop:
                continue
            given = probabilities[:, :, start - part.start : stop - part.start]
            at = torch.arange(tokens, device=given.device)
            self.tracker.observe(layer.held, given.mean(1)[None], (at <= at[start:stop, None])[None, None])
            if stop in self.places:
                layer.features[stop] = token_features(self._view(attention, layer, stop))[0]
                layer.worth[stop] = attention.keys.new_zeros(heads, stop)
            for place in self.places:
                if place <= start < place + self.future:
                    layer.worth[place] += _worth(given, attention, layer.metric, place)

    def _view(self, attention: Attention, layer: _Layer, length: int) -> LayerView:
        keys, values = attention.keys[None, :, :length], attention.values[None, :, :length]
        return LayerView(
            torch.arange(length, device=keys.device).expand(1, keys.shape[1], -1),
            length,
            attention.layer,
            self.num_layers,
            {name: held[..., :length] for name, held in layer.held.items()},
            lambda: keys,
            lambda: values,
        )


def _worth(given: Tensor, attention: Attention, metric: Tensor | None, tokens: int) -> Tensor:
    """What queries with probabilities ``[H_kv, G, q, T]`` make of the first ``tokens`` tokens, ``[H_kv, tokens]``."""
    share = given[..., :tokens]
    if metric is None:
        return share.mean(1).sum(1)
    values = attention.values[:, None]
    output = given @ values
    own = values[:, :, :tokens]
    measured = own @ metric
    squares = (measured * own).sum(-1)[:, :, None] + ((output @ metric) * output).sum(-1)[..., None]
    worth: Tensor = (share.square() * (squares - 2 * output @ measured.mT).clamp(min=0)).sum((1, 2))
    return worth


def _metric(attention: Attention, projection: nn.Module) -> Tensor:
    """``W_o^T W_o`` of each query head, ``[H_kv, G, E, E]``; the projection is asked, so that packed weights will do."""
    heads, groups, _, _ = attention.queries.shape
    width = attention.values.shape[-1]
    parameter = next(projection.parameters(), None)
    dtype = parameter.dtype if parameter is not None and parameter.is_floating_point() else torch.float32
    one = torch.eye(heads * groups * width, dtype=dtype, device=attention.values.device)
    weight = (projection(one) - projection(torch.zeros_like(one[:1]))).float()
    weight = weight.view(heads, groups, width, -1)
    metric: Tensor = weight @ weight.mT
    return metric


def output_projections(model: nn.Module) -> dict[int, nn.Module]:
    """The linear layer after each layer's attention. Raises ``UnsupportedModelError`` if there is none."""
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        named = [getattr(module, name, None) for name in PROJECTIONS]
        projection = next((p for p in named if isinstance(p, nn.Module)), None)
        if isinstance(index, int) and projection is not None:
            found.setdefault(index, projection)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no output projection after its attention ({', '.join(PROJECTIONS)}) to measure "
            f"worth by; take the target 'mass'"
        )
    return found


def _check(
    texts: Sequence[Tensor], cuts: int, future: int, target: str, n_sink: int, recent_window: int, samples: int
) -> None:
    for name, count in (("cuts", cuts), ("future", future), ("samples", samples)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, found {count}")
    if n_sink < 0 or recent_window < 0:
        raise InputError(f"n_sink and recent_window must not be negative, found {n_sink} and {recent_window}")
    if target not in get_args(Target):
        raise InputError(f"no target is called {target!r}; there are {', '.join(get_args(Target))}")
    needed = 2 * (n_sink + recent_window) + future
    short = [len(text) for text in texts if len(text) < needed]
    if short or not texts:
        raise InputError(
            f"texts must have {needed} tokens or more: twice the sinks and the window, and {future} in whose light the "
            f"others are judged; found {short[:3] if short else 'no text'}"
        )
