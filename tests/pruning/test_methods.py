"""Methods as objects: what they carry, what strings stand for, and one of one's own wherever a method is taken."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lrp_prune
from lrp_prune import LRP, Gradient, Magnitude, Method, Random, Wanda
from lrp_prune.callbacks import RelevanceCollector, RelevancePruning
from lrp_prune.pruning import METHODS, Collects, Scorable, scorer
from lrp_prune.pruning.methods import method_of
from lrp_prune.pruning.scope import settled
from tests.support.small_models import batch_for, build


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(number: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(number)
    ]


class Balanced(Method):
    """The relevance of a weight, times its size: what is collected adds over batches, the score does not."""

    scope = "layer"

    def collects(self, kinds: tuple[str, ...]) -> Collects:
        return Collects("abs_token", "epsilon")

    def score(self, scorable: Scorable) -> Tensor:
        assert scorable.collected is not None
        return scorable.collected.sqrt() * scorable.weight.abs()


@dataclass(frozen=True)
class Distance(Method):
    """How far a weight is from a value; no data are needed."""

    value: float = 0.0
    name: ClassVar[str] = "distance"
    floor: ClassVar[float] = 0.25

    def score(self, scorable: Scorable) -> Tensor:
        return (scorable.weight - self.value).abs()


class Doubled(nn.Module):
    """A weight that is used twice as large as its parameter."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.slow
def test_a_name_stands_for_an_object_with_defaults() -> None:
    for name, kind in METHODS.items():
        assert isinstance(method_of(name), kind) and str(method_of(name)) == name
        by_name, by_object = network(), network()
        first = lrp_prune.prune(by_name, batches(), 0.5, name)
        assert lrp_prune.prune(by_object, batches(), 0.5, kind()) == first
        pairs = zip(by_name.parameters(), by_object.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_what_an_object_carries_reaches_the_scores() -> None:
    reference = [batch_for("llama", 2, 9)]
    for composite, statistic, skip_first in (("attnlrp", "signed", 0), ("cp_lrp", "abs_token", 1)):
        scores = scorer(LRP(composite, statistic, "next_token", skip_first), build("llama"))
        scores.collect(reference)
        found = scores.compute()
        expected = lrp_prune.attribute(
            build("llama"), reference, "next_token", composite, statistic, skip_first=skip_first
        )
        assert (found.composite, found.statistic, found.target) == (composite, statistic, "next_token")
        assert all(torch.equal(found[name], expected[name]) for name in expected) and list(found) == list(expected)
    norms = []
    for skip_first in (0, 1):
        scores = scorer(Wanda(skip_first), build("llama"))
        scores.collect(reference)
        norms.append(scores.compute())
    name = next(iter(norms[0]))
    assert float(norms[1][name].sum()) < float(norms[0][name].sum())
    assert str(LRP(composite="cp_lrp", skip_first=1)) == "lrp (composite='cp_lrp', skip_first=1)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LRP(composite="lxt"), "composite must be one of"),
        (lambda: LRP(composite={"matmul": "nothing"}), "rule"),
        (lambda: LRP(statistic="mean"), "statistic must be one of"),
        (lambda: LRP(target="tokens"), "target must be one of"),
        (lambda: LRP(target=3), "target must be a name or a function"),
        (lambda: LRP(skip_first=-1), "skip_first must be an integer of at least 0, got -1"),
        (lambda: Gradient(statistic="mean"), "statistic must be one of"),
        (lambda: Wanda(skip_first=1.5), "skip_first must be an integer"),
        (lambda: Random(seed=-1), "seed must be an integer of at least 0, got -1"),
        (lambda: method_of("snip"), r"method must be one of \('lrp', .* or an object such as LRP\(\), got 'snip'"),
        (lambda: method_of(LRP), "method must be one of"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_arguments_of_methods_are_no_longer_those_of_functions() -> None:
    for name in ("composite", "statistic", "target", "seed", "skip_first"):
        for take in (RelevancePruning, RelevanceCollector, lrp_prune.prune):
            with pytest.raises(TypeError, match=name):
                take(**{name: None})


def test_a_method_of_ones_own_prunes_by_its_scores() -> None:
    model = network()
    relevance = lrp_prune.attribute(model, batches(), composite="epsilon", statistic="abs_token")
    shares = {name: relevance[name].sqrt() * model.get_parameter(name).detach().abs() for name in relevance}
    masks = lrp_prune.prune(model, batches(), 0.5, Balanced(), recalibrate=False)
    for name, values in shares.items():
        smallest = values.flatten().argsort(stable=True)[: round(values.numel() / 2)]
        assert not masks[name].flatten()[smallest].any() and masks.sparsity_of(name) == 0.5
        assert not model.get_parameter(name)[~masks[name]].any()


def test_a_method_without_data_scores_weights_as_they_are_used() -> None:
    model = network()
    torch.nn.utils.parametrize.register_parametrization(model[2], "weight", Doubled())
    (name,) = [name for name, parameter in model.named_parameters() if tuple(parameter.shape) == (8, 12)]
    scores = scorer(Distance(0.5), model).compute()
    assert torch.equal(scores[name], (model[2].weight.detach() - 0.5).abs())
    assert not torch.equal(scores[name], (model.get_parameter(name).detach() - 0.5).abs())
    torch.testing.assert_close(scores["0.weight"], (model[0].weight.detach() - 0.5).abs())
    assert settled(None, Distance(), ("weight",)) == lrp_prune.Scope("global", floor=0.25)
    assert settled(None, Distance(), ("neuron",)) == lrp_prune.Scope("global", floor=0.0)


def test_units_are_scored_by_all_that_they_own() -> None:
    model = network()
    scores = scorer(Distance(0.5), model, granularity="neuron")
    scores.collect(batches())
    found, plain = scores.compute(), scorer(Magnitude(), model, granularity="neuron")
    plain.collect(batches())
    sizes = plain.compute()
    assert list(found) == list(sizes) and len(found)
    assert all(torch.equal(found[name], (sizes[name] - 0.5).abs()) for name in found)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("method", [Balanced(), Distance(0.1)], ids=str)
def test_a_method_of_ones_own_in_a_training(method: Method, tmp_path: Path) -> None:
    data = batches(4)
    inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    pruning, collector = RelevancePruning(0.5, rounds=2, method=method), RelevanceCollector(method)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module = Module()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[collector, pruning], default_root_dir=tmp_path, **quiet
    )
    trainer.fit(module, loader, loader)
    assert pruning.masks is not None and pruning.masks.sparsity == 0.5
    assert collector.relevance.statistic == method.name
    # The weights that are left are those of the start: pruned step by step it is the same.
    twin = network()
    masks = None
    for sparsity in (0.4375, 0.5):
        masks = lrp_prune.prune(twin, data, sparsity, method, recalibrate=False, existing=masks)
    assert {f"net.{name}": values.tolist() for name, values in masks.items()} == {
        name: values.tolist() for name, values in pruning.masks.items()
    }


def test_what_is_planned_for_depends_on_the_method() -> None:
    model, batch = network(), batches()[0][0]
    plans = {name: lrp_prune.estimate(model, batch=batch, method=name) for name in METHODS}
    assert plans["magnitude"].activations == 0 < plans["lrp"].activations
    assert lrp_prune.estimate(model, batch=batches()[0]) == plans["lrp"]  # inputs and labels
    assert plans["magnitude"].relevance < plans["lrp"].relevance
    assert lrp_prune.estimate(model, batch=batch, method=LRP(composite="attnlrp")).weights == plans["lrp"].weights


def test_the_example_for_contributors_runs() -> None:
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text[text.index("## A pruning method") :]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    names = {"model": network(), "batches": batches()}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    assert names["masks"].sparsity == 0.5 and not (names["model"][0].weight[~names["masks"]["0.weight"]]).any()
    assert names["masks"] == lrp_prune.prune(network(), batches(), 0.5, Balanced())


def _scoring(give: Any) -> Method:
    class Own(Method):
        def score(self, scorable: Scorable) -> Any:
            return give(scorable.weight)

    return Own()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            _scoring(lambda weight: None),
            r"method 'own' gives \S*0\.weight a NoneType as scores: .* must return a tensor",
        ),
        (_scoring(lambda weight: {"0.weight": weight}), "gives .* a dict as scores"),
        (_scoring(lambda weight: weight.sum(-1)), r"gives \S*0\.weight scores of shape \(12,\), where \(12, 6\)"),
        (_scoring(lambda weight: weight.long()), r"gives \S*0\.weight scores of torch.int64: return floating-point"),
        (_scoring(lambda weight: weight / 0 * 0), r"gives \S*0\.weight 72 scores of 72 that are no numbers \(nan\)"),
    ],
)
def test_what_is_no_score_is_refused_by_name_and_before_the_first_step(
    method: Method, message: str, tmp_path: Path
) -> None:
    model = network()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        lrp_prune.prune(model, batches(), 0.5, method)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    loader = DataLoader(TensorDataset(*(torch.cat(parts) for parts in zip(*batches(), strict=True))), 8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, callbacks=[RelevancePruning(method=method)], default_root_dir=tmp_path, **quiet)
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(Module(), loader, loader)
    assert trainer.global_step == 0


class Empty(Method):
    pass


class Listing(Method):
    def collects(self, kinds: tuple[str, ...]) -> Any:
        return "abs_token"


class UnitsOnly(Method):
    def collects(self, kinds: tuple[str, ...]) -> Collects | None:
        return None if kinds == ("weight",) else Collects("abs_token")


class Rowwise(Method):
    scope = "rows"

    def score(self, scorable: Scorable) -> Tensor:
        return scorable.weight


class Floored(Rowwise):
    scope, floor = "global", 2


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Empty(), r"method 'empty' collects nothing for weights, and has no score\(scorable\): define one of the two"),
        (Listing(), r"method 'listing': collects\(kinds\) must return a Collects or None, got 'abs_token'"),
        (UnitsOnly(), "method 'unitsonly' collects nothing for weights"),
        (Rowwise(), "method 'rowwise': scope must be .* got 'rows'"),
        (Floored(), "method 'floored': floor must be .* got 2"),
        (lrp_prune.circuits.RelP(), "method 'relp' ranks units of circuits"),
    ],
)
def test_a_method_that_says_too_little_or_otherwise_is_told_so_at_once(method: Method, message: str) -> None:
    reference: list[Any] = []
    for take in (
        lambda: lrp_prune.prune(network(), reference, 0.5, method),
        lambda: lrp_prune.compare(network(), batches(), lambda model: 0.0, {"own": method}, [0.5]),
    ):
        with pytest.raises(ValueError, match=message):
            take()
    with pytest.raises(MisconfigurationException, match=message):
        RelevancePruning(method=method)
    if method.scope == "global" and method.floor is None:
        with pytest.raises(MisconfigurationException, match=message):
            RelevanceCollector(method)
        with pytest.raises(ValueError, match=message):
            lrp_prune.estimate(network(), method=method)
