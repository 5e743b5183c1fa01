"""How a tensor is divided: one object, whether it is divided or not."""

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.distributed.fsdp import groups_of_parameters
from lrp_prune.distributed.sharding import Sharding, agree, all_gathered, all_reduced, counted, is_first, sharding_of


class OneOfThree(Sharding):
    """The second of three parts along a dimension, without the other processes."""

    along = 0
    axis = 0  # type: ignore[assignment]
    rank = 1  # type: ignore[assignment]
    parts = 3  # type: ignore[assignment]

    @property
    def dim(self) -> int:
        return self.along


class Columns(OneOfThree):
    along = 1


def test_an_ordinary_tensor_is_its_own_part():
    tensor = torch.randn(4, 3)
    whole = sharding_of(tensor)
    assert whole == Sharding((4, 3)) and not whole.is_divided and whole.dim is None
    assert whole.local_shape == whole.shape == (4, 3) and whole.local_numel == whole.numel == 12
    assert (whole.rank, whole.parts) == (0, 1)
    for same in (whole.part, whole.tensor, whole.summed, whole.gathered, whole.all_reduced):
        assert same(tensor) is tensor
    assert whole.moved(tensor, whole.divided_along(1)) is tensor
    assert whole.summed_up([3, 4]) == [3, 4]
    assert counted({"a": whole, "b": whole}, {"a": 5, "b": 7}) == {"a": 5, "b": 7}


def test_who_is_alone_agrees_with_itself():
    value = torch.ones(2)
    assert all_reduced(value, None) is value
    assert all_gathered("mine", None) == ["mine"]
    assert is_first(None)
    agree(None, None, "nothing")
    with pytest.raises(KeyError, match="mine"):
        agree(KeyError("mine"), None, "something")


@pytest.mark.parametrize("kind", [OneOfThree, Columns])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (2, 2)])
def test_entries_are_located_in_the_part_that_has_them(kind, shape):
    sharding = kind(shape)
    whole = torch.arange(sharding.numel).view(shape)
    part = sharding.part(whole)
    assert tuple(part.shape) == sharding.local_shape and part.numel() == sharding.local_numel
    positions = torch.arange(sharding.numel)
    held, coordinates = sharding.located(torch.unravel_index(positions, shape))
    assert torch.equal(part[coordinates], positions[held])
    assert set(positions[held].tolist()) == set(part.reshape(-1).tolist())


def test_entries_of_what_is_whole_are_all_here():
    coordinates: tuple[Tensor, ...] = torch.unravel_index(torch.tensor([0, 5]), (2, 3))
    held, same = Sharding((2, 3)).located(coordinates)
    assert held.all() and all(map(torch.equal, same, coordinates))


def test_a_torch_that_keeps_its_flags_elsewhere_is_named():
    with pytest.raises(RuntimeError, match=r"tested with: use that"):
        groups_of_parameters(nn.Linear(1, 1))
