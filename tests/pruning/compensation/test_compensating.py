"""Compensation of whole models: right by the closed form, the same for every kind, and nothing silent."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.pruning import LeastSquares, Masks, OptimalBrainSurgeon
from lrp_prune.pruning.compensation import Compensated, compensate_
from lrp_prune.pruning.compensation.ways import Compensation
from tests.support.compensation import AddedTwice, Twice, half, mlp
from tests.support.small_models import batch_for, build, forward

EXACT = {"steps": 500, "tolerance": 1e-12}


def closed_form(x: Tensor, target: Tensor, kept: Tensor, weight: Tensor, bias: Tensor, damping: float) -> Tensor:
    """Each row's ridge regression towards the dense weights, bias last."""
    width = x.shape[1]
    augmented = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    gram = augmented.T @ augmented
    delta = damping * gram.diagonal()[:width].mean()
    rows = []
    for row, (own, start) in enumerate(zip(kept, torch.cat([weight, bias[:, None]], dim=1), strict=True)):
        support = torch.cat([own, torch.tensor([True])])
        right = augmented.T @ target[:, row] + delta * start
        found = torch.zeros(width + 1, dtype=x.dtype)
        system = gram + delta * torch.eye(width + 1, dtype=x.dtype)
        found[support] = torch.linalg.solve(system[support][:, support], right[support])
        rows.append(found)
    return torch.stack(rows)


@pytest.mark.parametrize("dense", [0.0, 0.5, 1.0])
def test_each_layer_is_the_ridge_regression_on_what_it_gets(dense: float) -> None:
    model, batches = mlp()
    masks = half(model, ["0.weight", "2.weight", "4.weight"])
    original = copy.deepcopy(model)
    compensate_(model, masks, batches, LeastSquares(dense=dense, damping=0.05, **EXACT))
    x = torch.cat([inputs for inputs, _ in batches])
    theirs = ours = x
    for index in (0, 2, 4):
        layer, before = model[index], original[index]
        target = (1 - dense) * before(ours) + dense * before(theirs)
        expected = closed_form(ours, target, masks[f"{index}.weight"], before.weight, before.bias, 0.05).detach()
        assert torch.allclose(layer.weight, expected[:, :-1], atol=1e-8)
        assert torch.allclose(layer.bias, expected[:, -1], atol=1e-8)
        ours, theirs = layer(ours).relu().detach(), before(theirs).relu().detach()


def test_the_dense_model_has_its_own_weights_outside_of_stages_too() -> None:
    torch.manual_seed(0)
    model = Twice().double()
    original, x = copy.deepcopy(model), torch.randn(64, 8).double()
    masks = half(model, ["twice.weight", "middle.weight", "last.weight"])
    compensate_(model, masks, [x], LeastSquares(dense=1.0, damping=0.05, **EXACT))
    ours, theirs = model.before(x).detach(), original.before(x).detach()
    assert torch.equal(model.twice.weight, original.twice.weight * masks["twice.weight"])
    for name in ("middle", "last"):
        layer, before = model.get_submodule(name), original.get_submodule(name)
        expected = closed_form(ours, before(theirs), masks[f"{name}.weight"], before.weight, before.bias, 0.05).detach()
        assert torch.allclose(torch.cat([layer.weight, layer.bias[:, None]], dim=1), expected, atol=1e-8)
        ours, theirs = layer(ours).relu().detach(), before(theirs).relu().detach()


MODELS = ["llama", "gpt2", "bert", "vit", "t5", "resnet", "mixtral", "opt"]


def pruned(name: str) -> tuple[nn.Module, Masks, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    batches = [batch_for(name, 8, 12) for _ in range(3)]
    # What a router makes of scores jumps: closer is no better there.
    weights = lrp_prune.attribute(
        model,
        batches[:1],
        lambda model, batch: forward(model, batch).sum(),
        exclude=["*.mlp.gate"] if name == "mixtral" else None,
        unruled="ignore",
    )
    return model, lrp_prune.select(weights, 0.5), batches


def distance(model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        pairs = [(forward(model, batch), forward(dense, batch)) for batch in batches]
    return float(sum((ours - theirs).square().sum() for ours, theirs in pairs))


@pytest.mark.slow
@pytest.mark.parametrize("way", [LeastSquares(), OptimalBrainSurgeon()], ids=["exact", "obs"])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_comes_closer_and_keeps_its_masks(name: str, way: Compensation) -> None:
    dense, masks, batches = pruned(name)
    masked, model = copy.deepcopy(dense), copy.deepcopy(dense)
    masks.apply_(masked)
    training = [module.training for module in model.modules()]
    found = compensate_(model, masks, batches, way)
    assert distance(model, dense, batches) < distance(masked, dense, batches)
    parameters = dict(model.named_parameters())
    assert set(found.errors) | set(found.left_out) == {entry for entry in masks if masks.pruned_in(entry)}
    for entry, kept in masks.items():
        assert not parameters[entry][~kept].any() and bool(torch.isfinite(parameters[entry]).all())
    untouched = {entry for entry in parameters if entry not in masks and "bias" not in entry}
    assert all(torch.equal(parameters[entry], dense.get_parameter(entry)) for entry in untouched)
    assert [module.training for module in model.modules()] == training
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in parameters.values())


def convolutional() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(4 * 25, 3),
    )  # fmt: skip


def test_convolutions_in_groups_come_closer_and_what_is_not_known_is_named() -> None:
    torch.manual_seed(0)
    model = convolutional().eval()
    batches = [torch.randn(32, 2, 8, 8) for _ in range(2)]
    names = ["0.weight", "3.weight", "5.weight", "7.weight", "9.weight"]
    masks, dense, masked = half(model, names), copy.deepcopy(model), copy.deepcopy(model)
    masks.apply_(masked)
    found = compensate_(model, masks, batches, LeastSquares())
    assert list(found.left_out) == ["7.weight"] and "laid out as rows" in found.left_out["7.weight"]
    assert set(found.errors) == set(names) - {"7.weight"}
    errors = [float((entry(batches[0]) - dense(batches[0])).square().mean()) for entry in (model, masked)]
    assert errors[0] < 0.6 * errors[1]
    assert torch.equal(model[1].running_mean, dense[1].running_mean)


def test_recurrent_tied_repeated_and_rarely_reached_layers_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rare, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.recurrent, self.tied, self.last = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8), nn.Linear(8, 3)
            self.other = nn.Linear(8, 8)
            self.other.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = torch.cat([x[:2] + self.rare(x[:2, :1]), x[2:]])
            x = self.twice(self.twice(x).relu())
            x = self.other(self.tied(self.recurrent(x)[0]).relu())
            return self.last(x[:, -1])

    torch.manual_seed(0)
    model = Model()
    names = [name for name, value in model.named_parameters() if value.dim() > 1]
    masks = half(model, names)
    found = compensate_(model, masks, [torch.randn(32, 4, 8)], LeastSquares())
    assert set(found.errors) == {"first.weight", "recurrent.weight_ih_l0", "last.weight"}
    assert "fewer than 16" in found.left_out["rare.weight"]
    assert "several times" in found.left_out["twice.weight"]
    assert "something else" in found.left_out["tied.weight"]
    assert "no product" in found.left_out["recurrent.weight_hh_l0"]
    assert "only masked: " in str(found)
    assert all(not model.get_parameter(name)[~masks[name]].any() for name in names)


def test_dead_inputs_and_half_precision_are_safe() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(torch.bfloat16)
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    x[:, 3] = 0
    masks = half(model, ["0.weight", "2.weight"])
    dead = model[0].weight[:, 3].clone()
    found = compensate_(model, masks, [x], LeastSquares())
    kept = masks["0.weight"][:, 3]
    assert torch.equal(model[0].weight[kept, 3], dead[kept])  # nothing is known of it: it stays
    assert model[0].weight.dtype is torch.bfloat16 and not found.left_out
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.zeros(64, 8)
    before = model[0].weight.detach().clone()
    compensate_(model, half(model, ["0.weight"]), [x], LeastSquares())
    assert torch.equal(model[0].weight, before * half(model, ["0.weight"])["0.weight"])


class Precise(nn.Sequential):
    """Its own forward is in full precision."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


@pytest.mark.parametrize("way", [LeastSquares(), OptimalBrainSurgeon()], ids=["exact", "obs"])
def test_what_is_solved_knows_no_autocast(way: Compensation) -> None:
    torch.manual_seed(0)
    model = Precise(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    other, batches = copy.deepcopy(model), [torch.randn(64, 8) for _ in range(2)]
    masks = half(model, ["0.weight", "2.weight"])
    compensate_(other, masks, batches, way)
    with torch.autocast("cpu", torch.bfloat16):
        compensate_(model, masks, batches, way)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("dense", [0.0, 0.5])
def test_autocast_keeps_no_weights_as_they_were(dense: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)), torch.randn(64, 8)
    other, masks = copy.deepcopy(model), half(model, ["0.weight", "2.weight"])
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        compensate_(model, masks, [x], LeastSquares(dense=dense))
        found = model(x)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        compensate_(other, masks, [x], LeastSquares(dense=dense))
        assert torch.equal(found, other(x))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_pruned_biases_stay_pruned() -> None:
    model, batches = mlp()
    masks = half(model, ["0.weight", "0.bias", "2.weight"])
    compensate_(model, masks, batches, LeastSquares())
    assert not model[0].bias[~masks["0.bias"]].any() and bool(model[0].bias[masks["0.bias"]].all())


class Late(nn.Module):
    """Each block also gets what was made of the first one's output, in a way that no gradient takes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made = {
            "comparison": lambda: x[:, :1] > 0,
            "detached": lambda: x.detach().tanh(),
            "number": lambda: torch.full((1,), abs(x[0, 0].item())),
        }[self.way]()
        for block in self.blocks:
            x = block(x * made.to(x.dtype))
        return self.last(x)


@pytest.mark.parametrize("way", ["comparison", "detached", "number"])
def test_forgetting_outputs_changes_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Late(way)
    other, batches = copy.deepcopy(model), [torch.randn(64, 8) for _ in range(2)]
    masks = half(model, [name for name, value in model.named_parameters() if value.dim() > 1])
    compensate_(model, masks, batches, LeastSquares())
    monkeypatch.setattr("lrp_prune.pruning.compensation.stages.Kept.blank", lambda kept: kept)
    compensate_(other, masks, batches, LeastSquares())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_what_follows_a_layer_is_not_run_for_its_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(AddedTwice(False), AddedTwice(False))
    runs = [0, 0]
    for place, layer in enumerate((model[0].a, model[0].b)):
        layer.register_forward_pre_hook(lambda *_, place=place: runs.__setitem__(place, runs[place] + 1))
    compensate_(
        model, half(model, ["0.a.weight", "0.b.weight", "1.a.weight"]), [torch.randn(64, 8)], LeastSquares(dense=0.0)
    )
    # What there is, whether others may stand in (twice), what the stage does, each layer's inputs, and what it gives in the end.
    assert runs == [7, 6]


class Written(nn.Module):
    """Adds to what it has, in place or not."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList([AddedTwice(inplace) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.first(x), inplace=self.inplace)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_models_that_write_into_what_they_have_are_compensated_as_others() -> None:
    torch.manual_seed(0)
    model, other = Written(True), Written(False)
    other.load_state_dict(model.state_dict())
    blocks = [
        f"blocks.{number}.{layer}.weight" for number in range(2) for layer in ("a", "b")
    ]  # b reads what a got and more
    x, names = torch.randn(64, 8), ["first.weight", *blocks, "last.weight"]
    found = [compensate_(entry, half(entry, names), [x], LeastSquares()) for entry in (model, other)]
    assert found[0].errors == found[1].errors and set(found[0].errors) == set(names)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"dense": 1.5}, {"damping": 0.0}, {"steps": 0}, {"tolerance": 0.0}])
def test_ways_that_make_no_sense_are_refused_where_they_are_written(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        LeastSquares(**options)  # type: ignore[arg-type]


def test_what_was_done_is_told_in_a_line() -> None:
    found = Compensated({"a.weight": (4.0, 1.0), "b.weight": (2.0, 1.0), "c.weight": (1.0, 0.1)}, {"d.weight": "why"})
    told = "3 weights compensated: in the median 25% of the error that masks make in a layer are left"
    assert str(found) == f"{told}; only masked: d.weight (why)"
    found.left_out |= {"e.0.weight": "other", "e.1.weight": "other"}
    assert str(found) == f"{told}; only masked: d.weight (why); e.*.weight (other)"


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    yield
    assert not torch.is_autocast_enabled("cpu")
