"""Filters go with all that is theirs."""

import copy

import pytest
import torch
from torch import nn

import lrp_prune
from tests.support.channel_nets import NETS, Net, conv_bn, pooled
from tests.support.shrinking import CLASSES, keeping, masked, masks_of, sizes
from tests.support.units import randomized


@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.filterwarnings("ignore::lrp_prune.pruning.emptied.EmptiedWeightsWarning")
@pytest.mark.parametrize("name", [name for name in NETS if name != "shuffled"])  # by a number of channels that it needs
def test_filters_go_with_all_that_is_theirs(name: str) -> None:
    torch.manual_seed(0)
    model, x = randomized(NETS[name][0]()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    masks = masks_of(model, (x, CLASSES), "neuron")
    expected, before = masked(model, masks)(x), sizes(model)
    shrunk = lrp_prune.shrink(model, masks, [(x, CLASSES)])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    changed = {name: (size, before[name]) for name, size in sizes(model).items() if size != before[name]}
    assert changed and all(all(new <= old for new, old in zip(*pair, strict=True)) for pair in changed.values())
    assert (
        shrunk.after.parameters == sum(parameter.numel() for parameter in model.parameters()) < shrunk.before.parameters
    )
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.Conv2d)):
        assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2])
    for layer in (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)):
        assert {layer.num_features} == {len(value) for value in (layer.weight, layer.bias, layer.running_mean)}


def test_groups_of_a_convolution_go_whole_or_evenly() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: pooled(n.c(n.b(n.a(x).relu()).relu())),
        a=nn.Conv2d(4, 8, 1),
        b=nn.Conv2d(8, 6, 1, groups=2),
        c=nn.Conv2d(6, 4, 1),
    )
    model, x = randomized(model), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    for kept, inputs, outputs, groups in (
        ({"b": [0, 1, 2, 3], "c": [0, 1, 2]}, 4, 3, 1),
        ({"b": [0, 1, 2, 4], "c": [0, 5]}, 6, 2, 2),  # of four inputs two and three are dead, and one of one stays
    ):
        net = copy.deepcopy(model)
        masks = keeping(net, (x, CLASSES), "neuron", kept)
        expected = masked(net, masks)(x)
        shrunk = lrp_prune.shrink(net, masks, [x])
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
        assert (net.b.in_channels, net.b.out_channels, net.b.groups) == (inputs, outputs, groups)
        assert ("is in groups" in shrunk.left.get("b", "")) == (groups == 2)


def test_the_shortcut_of_a_residual_keeps_what_one_summand_has() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: pooled(n.c((n.a(x) + n.b(x)).relu())), a=conv_bn(4, 6), b=conv_bn(4, 6), c=nn.Conv2d(6, 4, 1)
    )
    model, x = randomized(model), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():  # three filters of the one, and of these two of the other
        for branch, dead in ((model.a, [0, 1, 2]), (model.b, [1, 2])):
            branch[0].weight[dead] = 0
            for vector in (branch[0].bias, branch[1].weight, branch[1].bias):
                if vector is not None:
                    vector[dead] = 0
        model.c.weight[:, [1, 2]] = 0
    expected = model(x)
    lrp_prune.shrink(model, None, [x])
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    assert model.a[0].out_channels == model.b[0].out_channels == model.c.in_channels == 4
