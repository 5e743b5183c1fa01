"""Units of convolutions are the channels they claim: removing each of them is ablating its activation."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.channel_nets import NETS, units
from tests.support.units import channels_of, randomized, silenced, without


@pytest.mark.filterwarnings("ignore:.*no units that could be removed")
@pytest.mark.parametrize("name", NETS)
def test_removing_a_unit_is_ablating_its_channel(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    model, x = randomized(build()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    relevance, dense, changed = units(model, x), model(x), 0
    assert {group: len(values) for group, values in relevance.items()} == {
        group: channels_of(model, lambda: model(x), modules[0].partition("+")[0]) for group, modules in expected.items()
    }
    for group, modules in expected.items():
        for unit in range(len(relevance[group])):
            with ExitStack() as stack:
                for module, _, shift in (module.partition("+") for module in modules):
                    stack.enter_context(silenced(model, [module], unit))
                    if shift:  # what the model itself adds to the channel
                        stack.enter_context(Zeroed(model.get_parameter(shift), unit))
                wanted = model(x)
            with without(relevance, group, unit, model):
                torch.testing.assert_close(model(x), wanted, rtol=1e-9, atol=1e-9)
            changed += not torch.allclose(wanted, dense)
    assert changed > sum(len(values) for values in relevance.values()) / 2  # dead channels apart, each unit matters


def test_what_is_added_to_channels_is_theirs_also_in_a_vector_of_several_dimensions() -> None:
    torch.manual_seed(0)
    build, _ = NETS["scaled by its share of all responses"]
    members = units(randomized(build()), torch.randn(3, 4, 6, 6, dtype=torch.float64)).members["b"]
    owners = {member.parameter: member.owners for member in members if not member.reads}
    assert torch.equal(owners["shift"], torch.arange(5, dtype=torch.int32).view(1, 1, 1, 5))


class Zeroed:
    """One entry of a parameter is zero."""

    def __init__(self, parameter: nn.Parameter, index: int) -> None:
        self.entry = parameter.detach().view(-1)[index]

    def __enter__(self) -> None:
        self.before = self.entry.clone()
        self.entry.zero_()

    def __exit__(self, *_: object) -> None:
        self.entry.copy_(self.before)


@pytest.mark.parametrize("name", ["grouped", "depthwise with batch norm", "residual", "flattened"])
def test_the_relevance_of_a_unit_is_that_of_its_channels_where_layers_read_them(name: str) -> None:
    build, expected = NETS[name]
    torch.manual_seed(0)
    model, x = randomized(build()), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    relevance = units(model, x, composite="gradient", statistic="signed")
    for group in expected:
        wanted = torch.zeros(len(relevance[group]), dtype=torch.float64)
        readers = {member.parameter.rpartition(".")[0] for member in relevance.members[group] if member.reads}
        for reader in readers:
            kept: list[Tensor] = []

            def keep(module: nn.Module, args: tuple[Tensor, ...], kept: list[Tensor] = kept) -> tuple[Tensor]:
                kept.append(args[0].clone())  # what goes by another way does not count
                return (kept[0],)

            handle = model.get_submodule(reader).register_forward_pre_hook(keep)
            with torch.enable_grad():
                value = model(x.requires_grad_())[:, 0].sum()
                (gradient,) = torch.autograd.grad(value, kept)
            handle.remove()
            wanted += (kept[0] * gradient).reshape(3, len(wanted), -1).sum((0, 2)) / 3
        torch.testing.assert_close(relevance[group].double(), wanted, rtol=1e-5, atol=1e-7)


def test_what_is_alive_stays_where_its_neighbour_is_dead() -> None:
    """Two units of a convolution in groups, of which only one does anything."""
    model = NETS["grouped"][0]().eval()
    with torch.no_grad():
        model.a.weight[[0, 3, 5, 6]] = 0
        model.a.bias[[0, 3, 5, 6]] = 0
    masks = lrp_prune.prune(
        model, [(torch.randn(8, 4, 6, 6), torch.zeros(8, dtype=torch.int64))], 0.25, granularity="neuron"
    )
    assert [bool(row.any()) for row in masks["a.weight"]] == [False, True, True, False, True, False, False, True]


def test_pruned_filters_put_out_nothing() -> None:
    """Filter, bias, scale and shift: a channel that is gone can be taken out of the network."""
    torch.manual_seed(0)
    model, x = randomized(NETS["depthwise with batch norm"][0]()).float(), torch.randn(4, 4, 6, 6)
    masks = lrp_prune.prune(model, [(x, torch.zeros(4, dtype=torch.int64))], 0.5, granularity="neuron", scope="layer")
    for layer in ("a", "b", "c"):
        gone = ~masks[f"{layer}.0.weight"].flatten(1).any(1)
        assert int(gone.sum()) == len(gone) // 2
        written: list[Tensor] = []
        handle = model.get_submodule(layer).register_forward_hook(
            lambda *args, written=written: written.append(args[2])
        )
        model(x)
        handle.remove()
        assert not written[0][:, gone].any() and written[0][:, ~gone].any()
