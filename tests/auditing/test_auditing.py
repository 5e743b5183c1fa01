"""Audits: that sound models pass, and that what was broken on purpose is named, with its place and the way out."""

import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.auditing import AuditReport
from tests.support.small_models import batch_for, build


def about(report: AuditReport, what: str) -> str:
    return "\n".join(f"{remark.what} -> {remark.advice}" for remark in report.remarks if remark.about == what)


def network(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.ReLU(), nn.Linear(8, 2, bias=bias))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 8, batch_first=True, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 49, 3, bias=False),
    )
    return nn.Sequential(*layers)


MODELS: dict[str, Any] = {
    "mlp": lambda: (network(), torch.randn(64, 4)),
    "cnn": lambda: (convolutional(), torch.randn(8, 3, 16, 16)),
    "lstm": lambda: (Recurrent(), torch.randn(4, 6, 3)),
    **{
        name: (lambda name=name: (build(name, biases=False), batch_for(name)))
        for name in ("llama", "mixtral", "t5", "vit")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_sound_models_without_biases_conserve_under_cp_lrp_in_every_module(name: str) -> None:
    model, batch = MODELS[name]()
    report = lrp_prune.audit(model, batch, target=1, composite="cp_lrp")
    assert report.lost is not None and report.lost < 1e-4 and not report.causes
    whole = abs(report.passages[0].arrived)
    assert len(report.passages) > 2
    assert all(abs(passage.own) < 1e-3 * whole for passage in report.passages)
    assert "each has a rule" in about(report, "operations")
    assert not [remark for remark in report.problems if remark.about in ("operations", "conservation", "batch")]


def test_what_biases_absorb_is_told_by_module_and_no_problem() -> None:
    model, x = network(bias=True), torch.randn(64, 4)
    report = lrp_prune.audit(model, x, target=1)
    hidden = torch.relu(model[0](x)).detach()
    last = 64 * model[2].bias[1].item()
    first = float((hidden > 0).float().sum(0) @ (model[2].weight[1] * model[0].bias).detach())
    own = {passage.name: passage.own for passage in report.passages}
    assert own["2"] == pytest.approx(last, rel=1e-3) and own["0"] == pytest.approx(first, rel=1e-3)
    assert report.causes == {"0": "bias", "2": "bias"}
    whole = report.passages[0]
    assert whole.lost == pytest.approx(last + first, rel=1e-3)
    assert not report.problems and "biases" in about(report, "conservation")


@pytest.mark.slow
def test_rules_that_do_not_conserve_are_named_as_such() -> None:
    report = lrp_prune.audit(build("llama", biases=False), batch_for("llama"), target=1, composite="attnlrp")
    assert set(report.causes) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert set(report.causes.values()) == {"rule"} and not report.problems
    assert "composite='cp_lrp' conserves" in about(report, "conservation")


def test_an_operation_without_a_rule_is_named_with_its_module() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.entr(x.abs() + 0.1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), Odd(), nn.Linear(8, 2, bias=False))
    x = torch.randn(8, 4)
    report = lrp_prune.audit(model, x, target=1)
    problems = [remark for remark in report.problems if remark.about == "operations"]
    assert len(problems) == 1 and "entr in 1 (Odd)" in problems[0].what and "register_rule" in problems[0].advice
    assert report.causes == {"1": "unruled"}
    with lrp_prune.register_rule(torch.special.entr, "activation"), lrp_prune.register_rule(Odd, "identity"):
        assert not lrp_prune.audit(model, x, target=1).causes


def test_what_comes_in_past_the_arguments_is_seen() -> None:
    """A module that reads an activation that it was not given: what is gained there has no known reason."""

    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), Reads(self)
            self.kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.first(x)
            return self.second(x)

    class Reads(nn.Module):
        def __init__(self, owner: nn.Module) -> None:
            super().__init__()
            self.owner = [owner]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.owner[0].kept

    torch.manual_seed(0)
    report = lrp_prune.audit(Past(), torch.rand(8, 4), target=1)
    assert report.causes.get("second") == "unknown"
    assert any("past its arguments" in remark.advice for remark in report.problems)
    assert report.lost is not None and report.lost < 1e-4  # in all nothing is lost


def test_dead_units_are_counted_and_many_of_them_a_problem() -> None:
    model, x = network(bias=True), torch.randn(64, 4)
    model[0].bias.data[:6] = -100
    report = lrp_prune.audit(model, x)
    (counts,) = report.dead.values()
    assert counts == (6, 8)
    assert any(remark.about == "units" and "6 of 8" in remark.what for remark in report.problems)
    model[0].bias.data[:6] = 0
    model[0].bias.data[0] = -100
    few = lrp_prune.audit(model, x)
    assert list(few.dead.values()) == [(1, 8)] and not few.problems


@pytest.mark.parametrize("broken", ["nan", "cut", "batch"])
def test_a_model_or_batch_that_cannot_be_explained_is_reported_and_nothing_raised(broken: str) -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    model, x = network(), torch.randn(8, 4)
    if broken == "nan":
        model[2].weight.data[:] = float("nan")
    elif broken == "cut":
        model = nn.Sequential(model, Cut(), nn.Linear(2, 2))
    else:
        x = torch.randn(8, 5)
    report = lrp_prune.audit(model, x)
    said = {"nan": "not finite", "cut": "detach", "batch": "8x5"}
    assert len(report.problems) == 1 and report.problems[0].about == "batch"
    assert said[broken] in report.problems[0].what
    assert str(report).startswith("1 problem")


@pytest.mark.slow
def test_the_first_token_is_looked_at_where_text_is_read_from_left_to_right() -> None:
    model, batch = build("llama", biases=False), batch_for("llama")
    usual = lrp_prune.audit(model, batch, target=1)
    found = lrp_prune.explain(model, batch, target=1).inputs["input_ids"].relevance.abs()
    assert usual.first_token == pytest.approx(float((found[:, 0] / found.sum(1)).mean()), rel=1e-3)
    assert not usual.problems
    # The first token is explained at the first position: it has everything.
    sink = lrp_prune.audit(model, batch, target=lambda model, batch: model(**batch).logits[:, 0, 1].sum())
    assert sink.first_token == pytest.approx(1.0)
    assert any(remark.about == "first token" and "skip_first=1" in remark.advice for remark in sink.problems)
    assert lrp_prune.audit(build("bert"), batch_for("bert"), target=1).first_token is None


def test_weights_without_relevance_are_listed_with_the_reason() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = lrp_prune.audit(Spare(), torch.randn(8, 4), target=1)
    assert list(report.unscored) == ["unused.weight"]
    problem = next(remark for remark in report.problems if remark.about == "weights")
    assert (
        "unused.weight" in problem.what and "8 of 16 weights" in problem.what and "reference samples" in problem.advice
    )


def test_nothing_of_the_model_changes() -> None:
    model, x = network(bias=True).train(), torch.randn(64, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    lrp_prune.audit(model, x)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inplace_operations_do_not_disturb_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(inplace=True), nn.Linear(8, 2, bias=False))
    report = lrp_prune.audit(model, torch.randn(16, 4), target=1)
    assert report.lost is not None and report.lost < 1e-5 and not report.causes


@pytest.mark.slow
def test_it_is_drawn_and_written_as_plain_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = network(bias=True)
    model[0].bias.data[:6] = -100
    report = lrp_prune.audit(model, torch.randn(64, 4), target=1)
    figure = report.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 1000
    left, right = figure.axes
    own = {passage.name: passage.own for passage in report.passages}
    whole = abs(report.passages[0].arrived)
    names = [text.get_text() for text in left.get_yticklabels()]
    widths = [bar.get_width() for bar in left.patches[: len(names)]]
    assert names == list(report.causes) and widths == pytest.approx([100 * own[name] / whole for name in names])
    assert [bar.get_width() for bar in right.patches] == [75.0]
    assert json.loads(json.dumps(report.to_dict()))["dead"] == {"2": [6, 8]}


def test_where_the_conserving_rules_let_nothing_through_it_says_so_and_the_rest_is_there() -> None:
    """Probabilities instead of logits: the usual mistake."""
    torch.manual_seed(0)
    report = lrp_prune.audit(nn.Sequential(network(), nn.Softmax(-1)), torch.randn(8, 4))
    assert report.lost is not None and report.lost > 0.02
    (told,) = (remark for remark in report.problems if "nothing can be followed" in remark.what)
    assert "logits, not probabilities" in told.what
    assert about(report, "weights") and about(report, "units")


def test_of_a_lightning_module_it_is_about_the_model_that_it_holds() -> None:
    class Holds(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"used": nn.Linear(4, 2, bias=False), "unused": nn.Linear(4, 2, bias=False)})
            self.model.forward = self.model["used"].forward

    report = lrp_prune.audit(Holds(), torch.randn(8, 4), target=1)
    assert list(report.unscored) == ["unused.weight"] and "8 of 16 weights" in about(report, "weights")


def test_what_looks_like_data_and_is_no_weight_is_told() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale_table, self.last = nn.Parameter(torch.rand(3, 4)), nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x[:, None] * self.scale_table).sum(1))

    report = lrp_prune.audit(Scaled(), torch.randn(8, 4))
    assert "left alone, as no weights: scale_table (is used, but in no product" in about(report, "weights")
    assert not report.problems


def test_a_batch_without_samples_is_reported() -> None:
    report = lrp_prune.audit(network(), torch.randn(0, 4))
    assert [remark.about for remark in report.remarks] == ["batch"] and "no samples" in str(report)


@pytest.mark.parametrize("fails", range(1, 6))
def test_nothing_has_changed_after_an_error_wherever_it_is_raised(fails: int) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.drop, self.runs = network(bias=True), nn.Dropout(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            x = self.drop(self.layers(x))
            if self.runs == fails:
                raise RuntimeError("out of order")
            return x

    model, state = Fails().train(), torch.get_rng_state()
    report = lrp_prune.audit(model, torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))
    assert "out of order" in str(report) or model.runs < fails
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_a_module_adds_in_place_is_told_of_it() -> None:
    class Shift(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8, bias=False), Shift(), nn.Linear(8, 2, bias=False)), torch.randn(16, 4)
    own = {passage.name: passage.own for passage in lrp_prune.audit(model, x, target=1, composite="epsilon").passages}
    assert own["1"] == pytest.approx(16 * model[2].weight[1].sum().item(), rel=1e-3)
    assert own["0"] == pytest.approx(0, abs=1e-3) == own["2"]


@pytest.mark.slow
def test_the_first_token_is_the_first_that_is_no_padding() -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"]
    alone = lrp_prune.audit(model, {"input_ids": ids}, target=1).first_token
    padded = {"input_ids": torch.cat([ids[:, :3], ids], 1), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    padded["attention_mask"][:, :3] = 0
    assert lrp_prune.audit(model, padded, target=1).first_token == pytest.approx(alone, rel=1e-3)
