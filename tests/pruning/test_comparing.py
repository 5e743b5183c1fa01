"""Methods side by side: the numbers are those of pruning by hand, and the model comes out as it went in."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import LRP, Random, Scope, Wanda
from lrp_prune.attribution import RelevanceAccumulator
from lrp_prune.pruning.comparison import Comparison
from tests.support.sharding import sharded, together, whole
from tests.support.small_models import build


class Network(nn.Module):
    """Dropout, so that random numbers are drawn, and running statistics, so that there are buffers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(8, 24),
            nn.BatchNorm1d(24),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )
        self.net[0].weight.data[0, 0] = -0.0

    def forward(self, inputs):
        return self.net(inputs)


def data(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(48, 8, generator=generator)
    return inputs, inputs[:, :3].argmax(1)


BATCHES = [data(1), data(2)]


class Drawing:
    """Draws random numbers when it is gone through, as a loader does."""

    def __iter__(self):
        torch.rand(3)
        return iter(BATCHES)


def loss(model):
    inputs, labels = data(3)
    with torch.no_grad():
        return nn.functional.cross_entropy(model(inputs), labels)


def everything(model):
    """Weights and buffers as bytes (so that -0.0 is not 0.0), gradients, modes, random numbers."""
    tensors = {name: value.detach().clone().view(-1).view(torch.uint8) for name, value in model.state_dict().items()}
    tensors |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return tensors | {"rng": torch.get_rng_state()}, [module.training for module in model.modules()]


def assert_same(before, after):
    assert before[0].keys() == after[0].keys() and before[1] == after[1]
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


def by_hand(rate, **options):
    model = Network()
    masks = lrp_prune.prune(model, BATCHES, rate, **options)
    return float(loss(model.eval())), masks.sparsity


CHOSEN = (
    "lrp",
    Wanda(),
    {"one ranking": {"method": LRP(), "scope": Scope(floor=0.0)}, "in rounds": {"method": "lrp", "rounds": 3}},
    {"random": Random(seed=3)},
    {"neurons": {"method": "magnitude", "granularity": "neuron"}},
)


@pytest.mark.slow
def test_the_numbers_are_those_of_pruning_by_hand_and_the_model_comes_out_as_it_went_in():
    model = Network().train()
    model.net[4].eval()
    model(BATCHES[0][0])
    state = Network().state_dict()
    model.load_state_dict(state)
    model.net[0].weight.grad = torch.ones(24, 8)
    before, seen, buffer = everything(model), [], model.net[1].running_var

    def evaluate(given):
        assert given is model and not any(module.training for module in given.modules())
        seen.append(torch.rand(1))
        value = loss(given)
        given.train()
        given(BATCHES[1][0])  # changes running statistics, and draws random numbers
        given.net[1].running_var = given.net[1].running_var + 1
        return value

    found = lrp_prune.compare(model, Drawing(), evaluate, CHOSEN, (0.5, 0.8), higher_is_better=False, progress=False)
    assert_same(before, everything(model))
    assert model.net[1].running_var is buffer
    assert len(seen) == 13 and len(set(map(float, seen))) == 1
    assert found.dense == float(loss(Network().eval()))
    named = {"lrp": {"method": "lrp"}, "wanda": {"method": "wanda"}, "random": {"method": Random(seed=3)}}
    named |= CHOSEN[2] | CHOSEN[4]
    assert list(found.scores) == ["lrp", "wanda", "one ranking", "in rounds", "random", "neurons"]
    for label, options in named.items():
        for rate in (0.5, 0.8):
            value, reached = by_hand(rate, **options)
            reached = rate if label == "neurons" else reached  # a share of the units, as it was asked for
            assert (found.scores[label][rate], found.reached[label][rate]) == (value, reached), label
    assert len({found.scores[label][0.8] for label in named}) >= 5


@pytest.mark.slow
def test_relevance_is_collected_once_for_all_sparsities(monkeypatch):
    collected = []
    real = RelevanceAccumulator.compute
    monkeypatch.setattr(RelevanceAccumulator, "compute", lambda self: collected.append(self) or real(self))
    drawn = (batch for batch in BATCHES)
    methods = ("lrp", "wanda", "magnitude")
    lrp_prune.compare(Network(), drawn, loss, methods, (0.3, 0.5, 0.7), progress=False, rounds=1)
    assert len(collected) == 2


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1, 4])
def test_a_failing_evaluation_leaves_the_model_as_it_was(failing):
    model, calls = Network().train(), []
    before = everything(model)

    def evaluate(model):
        calls.append(1)
        if len(calls) > failing:
            raise KeyboardInterrupt
        return loss(model)

    with pytest.raises(KeyboardInterrupt):
        lrp_prune.compare(model, BATCHES, evaluate, progress=False)
    assert len(calls) == failing + 1
    assert_same(before, everything(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ("lrp", "snip")}, "method 'snip': method must be one of"),
        ({"methods": "lrp"}, r"methods must be several, got 'lrp': pass \['lrp'\]"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("lrp", {"lrp": {"method": "lrp", "scope": Scope(floor=0)}})}, "methods has 'lrp' twice"),
        ({"methods": {"mine": {"scope": "row"}}}, r"methods\['mine'\] must be a method, or a mapping with a 'method'"),
        (
            {"methods": {"mine": {"method": "wanda", "scope": Scope(floor=0.5)}}},
            "method 'mine': floor=0.5 is for scope 'global'",
        ),
        (
            {"methods": {"mine": {"method": "lrp", "sparsity": 0.5}}},
            "'sparsity' is no option of 'mine': give sparsities=",
        ),
        ({"methods": {"mine": {"method": "lrp", "composit": "epsilon"}}}, "method 'mine': .*composit"),
        ({"methods": {"mine": {"method": "lrp", "rounds": 0}}}, "method 'mine': .*rounds"),
        ({"recalibrate": "no"}, "method 'lrp': recalibrate must be True, False, or None"),
        (
            {"batches": [], "methods": ("random",), "recalibrate": True},
            "method 'random': recalibrate=True needs batches",
        ),
        ({"scope": "2:4"}, "method 'lrp': sparsity 0.7 is unreachable with scope '2:4'"),
        ({"granularity": "neuron", "scope": "row"}, "method 'lrp': scope 'row' compares single weights"),
        ({"sparsities": 0.5}, "sparsities must be several numbers"),
        ({"sparsities": ()}, "sparsities must be different numbers"),
        ({"sparsities": (0.5, 0.5)}, "sparsities must be different numbers"),
        ({"sparsities": (0.5, 1.0)}, r"each of sparsities must be a number in \[0, 1\), got 1.0"),
        ({"batches": BATCHES[0][0]}, r"batches must be an iterable of batches"),
        ({"batches": []}, "method 'lrp' needs reference samples"),
    ],
)
def test_what_is_wrong_for_one_method_is_refused_before_anything_is_run(arguments, message):
    model = Network()
    arguments = {"batches": BATCHES, **arguments}
    with pytest.raises(ValueError, match=message):
        lrp_prune.compare(model, evaluate=lambda model: pytest.fail("evaluated"), progress=False, **arguments)


def test_an_evaluation_without_a_number_is_refused_at_the_dense_model():
    with pytest.raises(ValueError, match="evaluate must give a number, got a dict"):
        lrp_prune.compare(Network(), BATCHES, lambda model: {"accuracy": 0.5}, progress=False)


def test_relevance_of_other_things_is_refused():
    relevance = lrp_prune.attribute(Network(), BATCHES)
    with pytest.raises(ValueError, match="the relevance is about weights: pass granularity='weight'"):
        lrp_prune.prune(Network(), BATCHES, granularity="neuron", relevance=relevance)


def test_the_bar_tells_what_is_done(capsys):
    lrp_prune.compare(Network(), BATCHES, loss, ("lrp",), (0.5,))
    shown = capsys.readouterr().err
    assert all(what in shown for what in ("dense", "lrp: scoring", "lrp at 50 %", "/2"))
    lrp_prune.compare(Network(), BATCHES, loss, ("lrp",), (0.5,), progress=False)
    assert not capsys.readouterr().err


SCORES = {"lrp": {0.5: 0.91, 0.7: math.nan}, "wanda": {0.5: 0.91, 0.7: 0.8}, "random": {0.5: 0.5, 0.7: 0.25}}


def test_the_table_marks_the_best_and_says_what_was_not_reached():
    found = Comparison(SCORES, 0.95, {"wanda": {0.5: 0.4712, 0.7: 0.7001}})
    assert [line.split() for line in str(found).splitlines()[2:5]] == [
        ["dense", "0.95", "0.95"],
        ["lrp", "*", "0.91", "nan"],
        ["wanda", "*", "0.91", "*", "0.8"],
    ]
    assert str(found).splitlines()[6:] == ["* best of its column", "wanda prunes 47.12 % where 50 % was asked for"]
    assert Comparison(SCORES, 0.95, higher_is_better=False).best(0.7) == ["random"]
    assert json.loads(json.dumps(found.to_dict()))["scores"]["random"] == [0.5, 0.25]
    assert found.to_dict()["sparsities"] == [0.5, 0.7]


@pytest.mark.slow
def test_the_figure_has_a_line_for_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    figure = Comparison(SCORES, 0.95).plot(tmp_path / "comparison.pdf")
    assert (tmp_path / "comparison.pdf").read_bytes()[:4] == b"%PDF"
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert list(lines) == ["lrp", "wanda", "random", "dense"] and list(lines["random"]) == [0.95, 0.5, 0.25]
    assert figure.axes[0].get_yscale() == "linear"
    assert Comparison({"lrp": {0.5: 24.0, 0.8: 9e3}}, 20.0).plot().axes[0].get_yscale() == "log"


def test_it_is_imported_when_it_is_asked_for():
    assert lrp_prune.Comparison is Comparison and "compare" in dir(lrp_prune)


@pytest.mark.processes
def test_processes_that_share_a_model_compare_together(tmp_path: Path) -> None:
    ids = torch.randint(2, 50, (4, 2, 7), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": entry, "labels": entry} for entry in ids]

    def evaluate(model):
        with torch.no_grad():
            return sum(float(model(**batch).loss) for batch in batches)

    options = {"methods": ("lrp", "magnitude"), "sparsities": (0.5, 0.8), "progress": False, "recalibrate": False}
    methods = ({"lrp": {"method": "lrp", "matmul_dtype": None}}, "magnitude")
    expected = lrp_prune.compare(build("llama"), batches, evaluate, **{**options, "methods": methods})

    def check(mesh):
        model = sharded(build("llama"), mesh)
        before = [whole(parameter) for parameter in model.parameters()]
        found = lrp_prune.compare(
            model, batches[mesh.get_local_rank() :: 2], evaluate, **{**options, "methods": methods}
        )
        for method, row in found.scores.items():
            assert row == pytest.approx(expected.scores[method], rel=1e-5), method
        assert all(torch.equal(whole(p), value) for p, value in zip(model.parameters(), before, strict=True))
        relevance = lrp_prune.attribute(model, batches[mesh.get_local_rank() :: 2], matmul_dtype=None)
        curve = lrp_prune.pruning_curve(
            model, relevance, evaluate, (0.5, 0.8), lrp_prune.Scope(floor=0.5), progress=False
        )
        assert curve.scores["relevance"] == pytest.approx(expected.scores["lrp"], rel=1e-5)
        assert all(torch.equal(whole(p), value) for p, value in zip(model.parameters(), before, strict=True))

    together(check, 2, tmp_path)


@pytest.mark.processes
def test_of_copies_in_several_processes_each_is_pruned_by_itself_which_is_told(tmp_path: Path) -> None:
    def check(mesh):
        rank = mesh.get_local_rank()
        copied = nn.parallel.DistributedDataParallel(Network())
        with pytest.warns(UserWarning, match="each of the 2 processes of DistributedDataParallel prunes its own copy"):
            masks = lrp_prune.prune(copied, BATCHES[rank:], 0.5, progress=False)
        assert masks == lrp_prune.prune(Network(), BATCHES[rank:], 0.5, progress=False)
        if rank == 0:  # the others need not take part
            with pytest.warns(UserWarning, match="DistributedDataParallel"):
                lrp_prune.prune(copied, BATCHES, 0.7, progress=False)
        with pytest.warns(UserWarning, match="DistributedDataParallel"):
            found = lrp_prune.compare(
                nn.parallel.DistributedDataParallel(Network()), BATCHES[rank:], loss, ("lrp",), (0.7,), progress=False
            )
        alone = lrp_prune.compare(Network(), BATCHES[rank:], loss, ("lrp",), (0.7,), progress=False)
        assert found.scores == alone.scores

    together(check, 2, tmp_path)
