"""Composites as text: what is read is exactly what was written, and what is wrong is named with its file and entry."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lrp_prune
from lrp_prune import Composite
from lrp_prune.attribution import (
    COMPOSITES,
    RULES,
    Flat,
    Gamma,
    Group,
    Rule,
    Term,
    Terms,
    Where,
    epsilon_gamma_box,
)
from lrp_prune.engine import rules
from lrp_prune.engine.composites import composite_of
from lrp_prune.engine.operations import KINDS
from lrp_prune.engine.rule_text import CLASSES, known_names, rule_of, text_of
from lrp_prune.engine.rules import PLAIN, Own
from lrp_prune.pruning import LRP
from lrp_prune.relevance import Relevance

# Settings that are valid, and not the usual ones, of each class that has any.
OTHER = {
    "alpha_beta": [(1.5, 0.5), (2.0, 1.0, 0.1)],
    "attention": [(0.3, 0.1, 0.6, 0.0)],
    "epsilon": [(0.1,), (0,)],
    "shares": [(False,)],
    "z_box": [(-1, 2), ((-2.1, -2.0, -1.8), (2.2, 2.4, 2.6), 1e-9), ((-1.0,), (1.0,))],
}


def examples(name: str) -> list[Rule]:
    made = [CLASSES[name](*settings) for settings in OTHER.get(name, [])]
    parameters = inspect.signature(CLASSES[name]).parameters.values()
    if all(parameter.default is not parameter.empty for parameter in parameters):
        made.append(CLASSES[name]())
        numbers = [parameter.name for parameter in parameters if isinstance(parameter.default, float)]
        made += [CLASSES[name](**{number: 1 / 3}) for number in numbers if name not in OTHER]
    return made


def test_every_rule_there_is_can_be_written() -> None:
    known = {entry for entry in vars(rules).values() if isinstance(entry, type) and issubclass(entry, Rule)}
    assert known - {Rule, Own, Terms} <= set(CLASSES.values())
    assert {type(rule) for rule in (*RULES.values(), *PLAIN.values())} <= {Rule, *CLASSES.values()}
    assert all(examples(name) for name in CLASSES)


@pytest.mark.parametrize("name", known_names())
@pytest.mark.parametrize("whole", [False, True])
def test_a_rule_comes_back_exactly(name: str, whole: bool) -> None:
    for rule in [*([RULES[name]] if name in RULES else []), *(examples(name) if name in CLASSES else [])]:
        again = rule_of(text_of(rule, whole=whole))
        assert type(again) is type(rule) and vars(again) == vars(rule)
        kinds = [kind for kind in KINDS if rule.kinds is None or kind in rule.kinds]
        composite = Composite("mine", {kinds[0]: rule, Where(name="a.*"): rule}, base="attnlrp")
        assert Composite.from_yaml(composite.to_yaml()) == composite == Composite.from_yaml(composite.description)


def test_the_settings_of_a_usual_rule_are_written_where_results_must_stay_true() -> None:
    assert text_of(Gamma(0.25)) == "gamma" and text_of(Gamma(stabilizer=0.5)) == "gamma(stabilizer=0.5)"
    assert text_of(Gamma(0.25), whole=True) == "gamma(gamma=0.25, stabilizer=0.0)"
    assert text_of(rules.stop_gate, whole=True) == "stop_gate"


PLACES = [
    Where("layer", depth=range(1)),
    Where("convolution", depth=range(3)),
    Where("linear", depth=range(2, 9, 3)),
    Where(layer=nn.TransformerEncoderLayer),
    Where(layer=nn.Conv2d, name="features.*"),
    Where(layer=torch.ao.nn.qat.Conv2d),
    Where("linear", nn.Linear, "*.mlp.[0-3]", range(4, 5)),
]


@pytest.mark.parametrize("composite", [*COMPOSITES.values(), epsilon_gamma_box((-1, -2), (1, 3))], ids=lambda c: c.name)
def test_presets_and_all_places_come_back_exactly(composite: Composite, tmp_path) -> None:
    own = Composite("own", {where: Flat() if where.kind else "gradient" for where in PLACES}, base=composite)
    over = Composite("over", {"linear": "z_plus"}, base=own)
    for each in (composite, own, over):
        each.to_yaml(tmp_path / "mine.yaml")
        assert Composite.from_yaml(tmp_path / "mine.yaml") == each == composite_of(str(tmp_path / "mine.yaml"))
        assert Composite.from_yaml(each.description) == each
    assert f"base: {composite.name}" in own.to_yaml() and "base" not in over.to_yaml()


def test_composites_with_their_entries_in_another_order_are_others() -> None:
    first, second = Where("layer", depth=range(2)), Where("linear")
    one = Composite("mine", {first: "flat", second: "z_plus"})
    assert one != Composite("mine", {second: "z_plus", first: "flat"})
    assert one == Composite("mine", {first: Flat()}, base=Composite("base", {"linear": "z_plus"}))
    assert len({one, Composite("mine", {first: "flat", second: "z_plus"})}) == 1


def test_short_forms_say_the_same() -> None:
    mine = Composite("custom", {"convolution": Gamma(0.5), "linear": "z_plus"})
    rules_of_kinds = {"convolution": "gamma(0.5)", "linear": "z_plus"}
    assert composite_of("{convolution: gamma(0.5), linear: z_plus}") == mine
    assert composite_of({"rules": rules_of_kinds}) == composite_of(rules_of_kinds) == mine
    assert composite_of({"rules": [{"kind": kind, "rule": rule} for kind, rule in rules_of_kinds.items()]}) == mine
    assert LRP(composite=rules_of_kinds).collects(("weight",)).composite == mine
    assert (
        Composite("one", {"convolution": "gamma(0.5)"}).entries == Composite("one", {"convolution": Gamma(0.5)}).entries
    )
    assert composite_of("name: only\nbase: epsilon").entries == COMPOSITES["epsilon"].entries


WRONG = {
    "": "expected a mapping with",
    "rules: 3": "rules must be a list of entries",
    "{name: 3}": "name must be a text, got 3",
    "{base: nothing}": "composite must be one of .*'epsilon'",
    "{name: epsilon, rules: []}": "'epsilon' is the name of a preset",
    "{base: epsilon, linear: z_plus}": "unknown 'linear', expected .*; kinds of operation belong under 'rules'",
    "linear: z_plus\nlinear: flat": "line 1: 'linear' is there twice",
    "linear: [z_plus": "is no YAML",
    "rules: [flat]": "entry 1 .*expected a mapping with 'rule'",
    "rules: [{kind: linear, rule: flat}, {kind: conv, rule: flat}]": r"entry 2 \(.*\): unknown kind of operation 'conv'",
    "rules: [{rule: flat}]": "say what the rule is for",
    "rules: [{kind: linear, rule: flat, depht: 1}]": "unknown 'depht', expected 'rule' and what it is for, .*'depth'",
    "rules: [{kind: linear, rule: [flat]}]": "rule must be a text such as",
    "rules: [{kind: linear, rule: flat, depth: 0-3}]": r"depth must be a place counted from 0, or .*range\(3\).*'0-3'",
    "rules: [{kind: linear, rule: flat, depth: true}]": "depth must be a place",
    "rules: [{kind: linear, rule: flat, depth: range(0)}]": "depth must be a range of places",
    "rules: [{layer: Conv9d, rule: flat}]": "layer must be the name of a class of torch.nn",
    "rules: [{layer: no.such.Thing, rule: flat}]": "layer must be the name",
    "rules: [{layer: ..no.such.Thing, rule: flat}]": "layer must be the name",
    "rules: [{layer: torch.nn.Conv9d, rule: flat}]": "layer must be the name",
    "rules: [{layer: os.system, rule: flat}]": "layer must be the name",
    "rules: [{name: 3, rule: flat}]": "name must be a pattern",
    "rules: [{kind: linear, rule: flat}, {kind: linear, rule: z_plus}]": "entry 2 .*one before it is for the same",
    "{linear: nothing}": "entry 1 .*unknown rule 'nothing', expected one of .*'gamma'.*register_rule",
    "{linear: 'gamma(0.1, 0.2, 0.3)'}": r"rule 'gamma' takes the settings \(gamma=0.25, stabilizer=0.0\)",
    "{linear: gamma(size=1)}": r"rule 'gamma' takes the settings \(gamma=0.25, stabilizer=0.0\)",
    "{linear: z_box}": r"rule 'z_box' takes the settings \(low, high, stabilizer=0.0\)",
    "{linear: gamma(-1)}": r"gamma must be a number in \[0, inf\), got -1",
    "{linear: uniform(3)}": "rule 'uniform' has no settings",
    "{linear: 'gamma(open(1))'}": "unknown rule 'open'",
    "{linear: 'gamma(1 + x)'}": "is no setting of a rule",
    "{linear: 'gamma(**{})'}": "is no rule: write its name",
    "{linear: __import__}": "unknown rule",
    "{linear: '0.5'}": "is no rule: expected one of",
    "{softmax: z_plus}": "z_plus is a rule for .*'linear'.*, not for 'softmax'",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_file_entry_and_what_is_allowed(text: str, tmp_path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"wrong.yaml.*{WRONG[text]}"):
        lrp_prune.attribute(nn.Linear(2, 2), [torch.ones(1, 2)], composite=str(path))


MODULES = {
    "without_dependency": ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all'"),
    "unfinished": ("class Block(", "SyntaxError"),
    "raising": ("raise RuntimeError('no device')", "RuntimeError: no device"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_layers_that_cannot_be_imported_is_told_from_one_that_there_is_not(
    name: str, tmp_path, monkeypatch
) -> None:
    source, message = MODULES[name]
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"entry 1 .*the module {name} cannot be imported: {message}"):
        composite_of(f"rules: [{{layer: {name}.Block, rule: flat}}]\n")


def test_rules_for_the_same_modules_are_asked_in_the_order_in_which_they_are_written() -> None:
    written = ("flat", "identity", "uniform", "stop")
    text = "rules:\n" + "".join(f"- {{name: 'a.*', rule: {rule}}}\n" for rule in written)
    assert [rule for _, rule in composite_of(text).entries] == [RULES[rule] for rule in written]


def test_entries_may_share_what_yaml_merges() -> None:
    text = "rules:\n- &first {kind: linear, depth: 0, rule: flat}\n- {<<: *first, depth: 1, rule: z_plus}\n"
    first, second = (Where("linear", depth=range(place, place + 1)) for place in (0, 1))
    assert composite_of(text) == Composite("custom", {first: "flat", second: "z_plus"})


def test_a_file_that_is_no_text_is_named(tmp_path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.yaml is no text in UTF-8"):
        composite_of(str(path))


def test_a_file_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no composite at missing.yaml .*{tmp_path}"):
        LRP(composite="missing.yaml")
    with pytest.raises(ValueError, match=r"a file that ends in \.yaml"):
        LRP(composite="missing.json")
    with pytest.raises(ValueError, match=r"files that end in .*\.yaml.*got 'a.txt'"):
        COMPOSITES["epsilon"].to_yaml("a.txt")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class ByPower(Terms):
    power: int = 1
    inner: Rule | None = None

    @property
    def groups(self):
        return (Group((Term(1.0, power=self.power),)),)


def test_a_rule_of_ones_own_is_written_by_the_name_it_was_given() -> None:
    composite = Composite("mine", {"linear": ByPower(3, Gamma(0.5))}, base="epsilon")
    with pytest.raises(ValueError, match=r"'mine': <.*ByPower\(power=3.*> has no name.*register_rule"):
        composite.to_yaml()
    with lrp_prune.register_rule("by_power", ByPower), lrp_prune.register_rule("double", ByPower(2)):
        assert "by_power(3, gamma(0.5))" in composite.to_yaml()
        assert Composite.from_yaml(composite.to_yaml()) == composite
        assert Composite("mine", {"linear": "double"}).entries[0][1] == ByPower(2)
        with pytest.raises(ValueError, match="one word, and none of"):
            lrp_prune.register_rule("double", ByPower)
    assert "by_power" not in CLASSES and "double" not in RULES
    with pytest.raises(ValueError, match="unknown rule 'by_power'"):
        Composite("mine", {"linear": "by_power(3)"})
    for wrong in (3, nn.Linear):
        with pytest.raises(ValueError, match="must be a Rule, a class of rules, or a function"):
            lrp_prune.register_rule("name", wrong)


def test_a_function_is_named_and_what_no_text_can_say_is_refused() -> None:
    def mine(call):
        return call.run()

    composite = Composite("mine", {"softmax": mine})
    assert "test_composite_text" in composite.description and "<locals>.mine>" in composite.description
    with lrp_prune.register_rule("mine", mine):
        assert Composite.from_yaml(composite.to_yaml()) == composite

    class Undeclared(Terms):
        def __init__(self, power: int = 1) -> None:
            object.__setattr__(self, "power", power)

    with (
        lrp_prune.register_rule("undeclared", Undeclared),
        pytest.raises(ValueError, match="must be fields of a dataclass"),
    ):
        Composite("mine", {"linear": Undeclared(3)}).to_yaml()

    class Local(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Local cannot be found by its name"):
        Composite("mine", {Local: "gradient"}).to_yaml()
    assert "Local>" in Composite("mine", {Local: "gradient"}).description


@pytest.fixture
def collected():
    model, batches = (
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        [(torch.randn(8, 4), torch.zeros(8).long())],
    )

    def collect(composite, **options) -> Relevance:
        return lrp_prune.attribute(model, batches, composite=composite, target="class", **options)

    return collect


def test_relevance_says_its_rules_exactly_also_from_a_file(collected, tmp_path) -> None:
    composite = Composite("mine", {Where("linear", depth=range(1)): Gamma(0.5)}, base="epsilon")
    composite.to_yaml(tmp_path / "mine.yaml")
    relevance = collected(str(tmp_path / "mine.yaml"))
    relevance.save(tmp_path / "relevance.safetensors")
    loaded = Relevance.load(tmp_path / "relevance.safetensors")
    assert loaded.composite == "mine" and Composite.from_yaml(loaded.rules) == composite
    assert (loaded + collected(composite)).num_samples == 16
    assert all(torch.equal(loaded[name], collected(composite)[name]) for name in loaded)
    assert (loaded - loaded).rules == loaded.normalized().rules == loaded.rules != ""
    assert Composite.from_yaml(collected(None, granularity="neuron").rules) == COMPOSITES["attnlrp"]


def test_relevance_by_other_rules_of_the_same_name_is_not_added(collected) -> None:
    one, two = (collected(Composite("mine", {"linear": Gamma(gamma)})) for gamma in (0.25, 0.5))
    with pytest.raises(ValueError, match=r"both named 'mine', and differ in .*gamma=0.25.* and .*gamma=0.5"):
        one + two
    unknown = Relevance(dict(one.sums), composite="mine")
    assert unknown.rules == ""
    known = collected(Composite("mine", {"linear": Gamma()}), statistic="abs_token")
    older = Relevance(dict(known.sums), **{**known.description(), "rules": ""})  # of a version that did not keep them
    assert (known + older).rules == (older + known).rules == "" and (known + known).rules == known.rules
    with pytest.raises(ValueError, match="cannot contrast relevance by two composites"):
        lrp_prune.Patch.from_contrast(nn.Linear(1, 1), one, two)
    other = one.with_values({name: torch.ones_like(one[name]) for name in one}, "mine", composite="another")
    assert other.rules == ""
