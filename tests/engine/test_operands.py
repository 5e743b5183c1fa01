"""What is made once for an activation is made again as soon as it is another one."""

import torch

from lrp_prune.engine.operands import Latest, energy_of
from lrp_prune.relevance.statistics import power_of


class _Counted:
    def __init__(self):
        self.calls = 0

    def __call__(self, tensor):
        self.calls += 1
        return tensor * 2


def test_views_of_the_same_entries_share():
    latest, make, tensor = Latest(), _Counted(), torch.randn(4, 3)
    first = latest.made("twice", tensor, make)
    assert latest.made("twice", tensor.view(4, 3), make) is first
    assert make.calls == 1
    latest.made("other", tensor, make)
    assert make.calls == 2


def test_changed_in_place_or_seen_otherwise_is_another_tensor():
    latest, make, tensor = Latest(), _Counted(), torch.randn(4, 4)
    latest.made("twice", tensor, make)
    tensor.add_(1)
    assert torch.equal(latest.made("twice", tensor, make), tensor * 2)
    assert torch.equal(latest.made("twice", tensor.T, make), tensor.T * 2)
    assert torch.equal(latest.made("twice", tensor[:2], make), tensor[:2] * 2)
    assert make.calls == 4


def test_memory_that_is_used_again_is_no_confusion():
    latest, make = Latest(), _Counted()
    for value in range(20):  # freed memory of one would come back as the next
        tensor = torch.full((64,), float(value))
        assert torch.equal(latest.made("twice", tensor, make), tensor * 2)
        del tensor


def test_powers_and_energy_leave_the_operand():
    tensor = torch.tensor([[-2.0, 3.0], [1.0, -1.0]])
    before = tensor.clone()
    assert torch.equal(power_of(tensor, 0, torch.float32), tensor)
    assert torch.equal(power_of(tensor, 1, torch.float32), tensor.abs())
    assert torch.equal(power_of(tensor, 2, torch.bfloat16), tensor.square().bfloat16())
    assert torch.equal(power_of(tensor, 2, torch.float32), tensor.square())
    assert torch.equal(power_of(tensor, 3, torch.float32), tensor.abs() ** 3)
    assert torch.equal(energy_of(tensor), torch.tensor([5.0, 10.0]))
    assert torch.equal(tensor, before)
