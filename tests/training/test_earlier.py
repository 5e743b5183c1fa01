"""Values that a model had stand in it for a while, and are gone bit for bit afterwards."""

import copy

import torch
from torch import nn

from lrp_prune.training.earlier import EarlierValues


def test_what_is_kept_of_frozen_weights_is_what_was_pruned() -> None:
    """Round after round the values are those from right before the first that pruned them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = copy.deepcopy(model.state_dict())
    earlier = EarlierValues(model, whole=["1.bias"])
    order = torch.rand(64, 64)
    for share in (0.2, 0.5):
        masks = {"0.weight": order > share}
        earlier.remember(model, masks)
        model[0].weight.data[order <= share] = 0.0
        model[1].bias.data.add_(1.0)
        again = EarlierValues.from_state_dict(earlier.state_dict())
        own = copy.deepcopy(model.state_dict())
        with again.standing_in(model):
            assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert earlier.nbytes < 4 * 64 * 64  # of both matrices it would be twice that


def test_a_graph_that_was_made_before_the_teaching_is_not_disturbed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = torch.autograd.grad(model(x).square().sum(), model.parameters())
    for whole in ([], ["0.weight", "2.weight"]):
        earlier = EarlierValues(model, whole)
        masks = {"0.weight": torch.ones(4, 4) > 0, "2.weight": torch.ones(2, 4) > 0}
        masks["2.weight"][0, 0] = False
        earlier.remember(model, masks)
        kept = model[2].weight.detach().clone()
        model[2].weight.data[0, 0] = 0.0
        loss = model(x).square().sum()
        reference = torch.autograd.grad(model(x).square().sum(), model.parameters())
        with earlier.standing_in(model), torch.no_grad():
            torch.testing.assert_close(model[2].weight, kept)
            model(x)
        found = torch.autograd.grad(loss, model.parameters())
        assert all(torch.equal(one, other) for one, other in zip(found, reference, strict=True))
        model[2].weight.data.copy_(kept)
    assert len(expected) == 4
