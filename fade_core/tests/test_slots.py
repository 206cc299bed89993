"""Tensors that grow, shrink and change rows together."""

from __future__ import annotations

import torch
from tiny import fresh_seed
from torch import Tensor

from fade_core.storage.slots import Slots, TokenLayout, picked, under


def slots() -> Slots:
    """Two rows of three heads and five slots, numbers that differ everywhere."""
    numbers = torch.arange(2 * 3 * 5 + 10)
    return Slots(
        {"all": numbers[10:].view(2, 3, 5), "one": numbers[:10].view(2, 1, 5), "deep": torch.randn(2, 3, 5, 4)},
        {"one": -1},
    )


def copied(held: Slots) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in held.tensors.items()}


def test_rows_are_chosen_in_place_as_long_as_their_number_stays() -> None:
    torch.manual_seed(fresh_seed())
    for index in ([1, 1], [1, 0, 0]):
        held = slots()
        before, places = copied(held), [tensor.data_ptr() for tensor in held.tensors.values()]
        held.select_rows(torch.tensor(index))
        assert all(torch.equal(held[name], tensor[index]) for name, tensor in before.items())
        assert (places == [tensor.data_ptr() for tensor in held.tensors.values()]) == (len(index) == 2)


def test_room_that_nothing_was_copied_to_holds_the_fill() -> None:
    torch.manual_seed(fresh_seed())
    held, other = slots(), slots()
    before = copied(held)
    held.resize(7, 3, (other, 2))
    for name, tensor in before.items():
        assert held[name].shape == (4, *tensor.shape[1:2], 7, *tensor.shape[3:])
        assert torch.equal(held[name][:2, :, :3], tensor[:, :, :3])
        assert torch.equal(held[name][2:, :, :2], other[name][:, :, :2])
        fill = -1 if name == "one" else 0
        assert bool((held[name][:2, :, 3:] == fill).all())
        assert bool((held[name][2:, :, 2:] == fill).all())
    held.resize(1, 1)
    assert torch.equal(held["deep"][:2], before["deep"][:, :, :1])


def test_slots_move_in_place_and_heads_may_share_an_index() -> None:
    torch.manual_seed(fresh_seed())
    held = slots()
    before, shared = copied(held), torch.tensor([[[4, 0]], [[2, 2]]])
    held.move(shared)
    for name, tensor in before.items():
        assert torch.equal(held[name][:, :, :2], picked(tensor, shared))
        assert torch.equal(held[name][:, :, 2:], tensor[:, :, 2:])
    own = torch.randint(0, 5, (2, 3, 6))
    assert torch.equal(picked(before["one"], own), before["one"].expand(-1, 3, -1).gather(2, own))
    assert torch.equal(picked(before["deep"], own)[1, 2, 3], before["deep"][1, 2, own[1, 2, 3]])


def test_statistics_are_notes_by_name() -> None:
    layout = TokenLayout(3, torch.float32, torch.device("cpu"), ("mass", "last"), shifted=True)
    notes = layout.notes((2, 3, 5))
    assert {name: note.dtype for name, note in notes.items()} == {
        "statistic.mass": torch.float32, "statistic.last": torch.float32, "shift": torch.int32,
    }  # fmt: skip
    held = Slots(notes).statistics(2)
    assert set(held) == {"mass", "last"} == set(under(notes, "statistic."))
    held["mass"].fill_(1)
    assert float(notes["statistic.mass"].sum()) == 2 * 3 * 2
