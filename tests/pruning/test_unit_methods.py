"""Methods of units: activations, Taylor's first order and integrated gradients, against independent computations."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune import Activation, IntegratedGradients, Relevance, Taylor
from lrp_prune.pruning import UNIT_METHODS, scorer
from tests.support.likelihood import how_likely
from tests.support.small_models import batch_for, build


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 2, 6, 6, generator=generator), torch.randint(3, (6,), generator=generator)


def scores_of(method: Any, model: nn.Module, batches: list[Any], granularity: str = "neuron") -> Relevance:
    scores = scorer(method, model, granularity=granularity)
    scores.collect(batches)
    return scores.compute()


def test_activations_are_as_long_as_where_they_are_read() -> None:
    model, (x, labels) = network(), batch()
    found = scores_of("activation", model, [(x[:2], labels[:2]), (x[2:], labels[2:])])
    for group, layers in (("2", 2), ("5", 4)):
        length = (model[:layers](x).square().sum((0, 2, 3)) / 6).sqrt()
        torch.testing.assert_close(found[group], length)


def test_taylor_is_the_first_order_of_the_loss_by_sample_in_units_of_the_layer() -> None:
    model, (x, labels) = network(), batch()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    found = scores_of(Taylor(target=loss), model, [(x, labels)])
    for group, layers in (("2", 2), ("5", 4)):
        activation = model[:layers](x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(model[layers:](activation), labels, reduction="sum"), activation
        )
        expected = (activation * gradient).sum((2, 3)).abs().sum(0)
        torch.testing.assert_close(found[group], (expected / expected.norm()).detach(), rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_what_flows_on_the_way_from_zeros() -> None:
    """Over the units of each layer: what the explained value changes, by parts that autograd finds by itself."""
    model, (x, labels) = network(), batch()
    found = scores_of(IntegratedGradients(200, "signed", "class"), model, [(x, labels)])

    def value(inputs: Tensor) -> Tensor:
        return model(inputs).gather(1, labels[:, None]).sum()

    for group in ("2", "5"):
        torch.testing.assert_close(found[group].sum() * 6, (value(x) - value(0 * x)).detach(), rtol=1e-3, atol=1e-3)
    few = scores_of(IntegratedGradients(3, "abs_sample", "class"), model, [(x, labels)])
    flowed, before = torch.zeros(6, 4, 2, 2), None
    for step in range(4):
        activation = model[:4](x * step / 3).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model[4:](activation).gather(1, labels[:, None]).sum(), activation)
        if before is not None:
            flowed += (activation - before[0]) * (gradient + before[1]) / 2
        before = activation, gradient
    torch.testing.assert_close(few["5"], flowed.sum((2, 3)).abs().sum(0).detach() / 6, rtol=1e-4, atol=1e-6)


def test_integrated_gradients_go_over_embeddings() -> None:
    model, both = build("llama"), batch_for("llama")
    found = scores_of(IntegratedGradients(4), model, [both])
    layer = model.model.layers[1].mlp.down_proj
    table = model.model.embed_tokens.weight.detach()
    flowed, before = torch.zeros(()), None
    for step in range(5):
        read: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...], read: list[Tensor] = read) -> tuple[Tensor]:
            read.append(args[0].clone())
            return (read[0],)

        handle = layer.register_forward_pre_hook(keep)
        embedded = table[both["input_ids"]] * step / 4
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        handle.remove()
        (gradient,) = torch.autograd.grad(how_likely(logits[:, :-1], both["input_ids"][:, 1:]), read)
        if before is not None:
            flowed = flowed + (read[0] - before[0]) * (gradient + before[1]) / 2
        before = read[0], gradient
    expected = flowed.abs().sum((0, 1)).detach() / len(both["input_ids"])
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", UNIT_METHODS)
@pytest.mark.parametrize("granularity", ["neuron", "head", "block"])
def test_units_are_pruned_by_each(granularity: str, method: str) -> None:
    model, reference = build("llama"), [batch_for("llama")]
    masks = lrp_prune.prune(
        model, reference, 0.5, method, "layer" if granularity != "block" else "global", granularity=granularity
    )
    assert masks.granularity == granularity and any(not mask.all() for mask in masks.values())


@pytest.mark.parametrize("method", UNIT_METHODS)
def test_weights_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"'{method}' scores units, not weights: pass granularity="):
        lrp_prune.prune(network(), [batch()], 0.5, method)
    with pytest.raises(ValueError, match="scores units, not embeddings"):
        scorer(method, build("llama"), granularity="embedding")


def test_steps_and_statistics_are_checked_when_they_are_given() -> None:
    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match="steps must be an integer of at least 1"):
            IntegratedGradients(steps)
    with pytest.raises(ValueError, match="statistic must be one of"):
        IntegratedGradients(statistic="mean")
    with pytest.raises(ValueError, match="skip_first must be an integer"):
        Activation(skip_first=-1)
    with pytest.raises(ValueError, match="steps is for units"):
        lrp_prune.attribute(network(), [batch()], steps=3)
    with pytest.raises(ValueError, match="'activation' is about units, not weights"):
        lrp_prune.attribute(network(), [batch()], statistic="activation")


def test_curves_are_of_methods_as_well() -> None:
    model, (x, labels) = network().eval(), batch()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model(x).argmax(1) == labels).float().mean()) + 0.01

    relevance = lrp_prune.attribute(model, [(x, labels)], target="class", granularity="neuron")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {"relevance": relevance, "activation": "activation", "a seed": lrp_prune.Random(seed=3)}
    curve = lrp_prune.pruning_curve(model, asked, accuracy, (0.0, 0.5), batches=[(x, labels)], progress=False)
    assert list(curve.scores) == list(asked)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    scored = {
        "activation": scores_of("activation", model, [(x, labels)]),
        "a seed": scores_of(asked["a seed"], model, [(x, labels)]),
    }
    for label, scores in scored.items():
        lrp_prune.select(scores, 0.5).apply_(model)
        assert curve.scores[label][0.5] == accuracy(model)
        model.load_state_dict(before)
    weights = lrp_prune.attribute(model, [(x, labels)], target="class")
    with pytest.raises(ValueError, match="about neurons and weights: say by granularity="):
        lrp_prune.pruning_curve(model, {"a": relevance, "b": weights, "c": "random"}, accuracy, (0.5,))
    with pytest.raises(ValueError, match="'c' needs reference samples: pass batches="):
        lrp_prune.pruning_curve(model, {"a": relevance, "c": "taylor"}, accuracy, (0.5,))


class Routed(nn.Module):
    """Two experts, of which a router picks by what a sample is: other samples, or none, at other sizes of the inputs."""

    def __init__(self, bias: tuple[float, float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(3, 2)
        self.router.weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 0]])
        self.router.bias.data = torch.tensor(bias)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        picked, found = self.router(x).argmax(-1), x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            (places,) = torch.where(picked == number)
            if len(places):
                found = found.index_add(0, places, expert(x[places]))
        return found


@pytest.mark.parametrize("sizes", [(2.0, 2.0), (0.6, 2.0)], ids=["none at the end or the beginning", "fewer"])
@pytest.mark.parametrize("bias", [(-1.0, 0.0), (0.0, 1.0)])
def test_a_path_on_which_layers_read_other_samples_is_no_path(sizes: Any, bias: Any) -> None:
    x = torch.ones(2, 3) * torch.tensor(sizes)[:, None]
    with pytest.raises(ValueError, match=r"what experts.. reads|what experts.\d.\d reads"):
        scores_of(IntegratedGradients(4, target="class"), Routed(bias), [(x, torch.tensor([0, 1]))])


def test_a_layer_that_is_left_out_on_the_way_is_refused() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.early = (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            found = self.always(x)
            return found + self.early(x) if float(x.detach().abs().max()) < 1 else found

    with pytest.raises(ValueError, match=r"what early.2 reads is not the same at each step"):
        scores_of(IntegratedGradients(4, target="class"), Skips(), [(2 * torch.ones(2, 3), torch.tensor([0, 1]))])


def test_what_flows_is_of_each_batch_by_itself() -> None:
    model, (x, labels) = network(), batch()
    method = IntegratedGradients(3, "abs_sample", "class")
    together = scores_of(method, model, [(x, labels)])
    apart = scores_of(method, model, [(x[:3], labels[:3]), (x[3:], labels[3:])])
    for group in together:
        torch.testing.assert_close(apart[group], together[group])


def test_a_share_that_is_less_than_half_a_unit_is_told() -> None:
    """With what would be the least; and none that is more."""
    model, batch = build("llama"), {**batch_for("llama"), "labels": batch_for("llama")["input_ids"]}
    heads = lrp_prune.attribute(model, [batch], granularity="head")
    with pytest.warns(
        UserWarning, match=r"sparsity 0\.05 of 8 heads of .* none of them is .*the least is one, sparsity=0\.125"
    ):
        assert lrp_prune.select(heads, 0.05).sparsity == 0
    with pytest.warns(UserWarning, match=r"sparsity 0\.1 of 4 heads in each of .* sparsity=0\.25"):
        lrp_prune.select(heads, 0.1, scope="layer")
    blocks = lrp_prune.attribute(model, [batch], granularity="block")
    with pytest.warns(UserWarning, match=r"sparsity 0\.1 of \d blocks"):
        lrp_prune.select(blocks, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lrp_prune.select(heads, 0.125)
        lrp_prune.select(heads, 0.0)
