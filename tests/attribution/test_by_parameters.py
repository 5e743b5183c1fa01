"""Models of bare parameters, indexed and multiplied by einsum, as TransformerLens wrote them: the same as of modules."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune
from lrp_prune.attribution.candidates import candidates
from tests.support.of_parameters import (
    BATCHES,
    CLASSES,
    DIM,
    HEADS,
    IDS,
    LOOKING_UP,
    READING,
    SAME,
    VOCABULARY,
    WIDTH,
    WRITING,
    OfParameters,
    as_of_modules,
    both,
)

WAYS = [
    *({"read": read} for read in READING),
    *({"write": write} for write in WRITING),
    *({"look_up": look_up} for look_up in LOOKING_UP),
]


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: ", ".join(ways.values()))
def test_weights_have_the_relevance_of_the_layers_that_they_are(ways: dict[str, str]) -> None:
    ours, other = both(**ways)
    found, wanted = (lrp_prune.attribute(model, BATCHES) for model in (ours, other))
    assert set(found) == {"W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "head.weight"} and not found.unscored
    for name in found:
        torch.testing.assert_close(as_of_modules(name, found[name]), wanted[SAME[name]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("look_up", LOOKING_UP)
def test_rows_of_a_table_are_embeddings(look_up: str) -> None:
    ours, other = both(look_up=look_up)
    pairs = [
        [
            lrp_prune.attribute(model, BATCHES, include=[name], **options)
            for model, name in ((ours, "embed.*"), (other, "embed"))
        ]
        for options in ({"statistic": "abs_token"}, {"statistic": "abs_token", "granularity": "embedding"})
    ]
    for found, wanted in pairs:
        (values,), (expected,) = found.values(), wanted.values()
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-6)
        assert bool(values.any())
    if look_up != "index_select":  # which ids in a row are told to be those of the batch by nothing
        explained = [lrp_prune.explain(model, BATCHES[0], target=1).inputs["ids"].relevance for model in (ours, other)]
        torch.testing.assert_close(*explained, rtol=1e-4, atol=1e-6)


class Entities(nn.Module):
    """A table whose name says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.entity, self.layer, self.head = nn.Parameter(torch.randn(20, 10)), nn.Linear(10, 8), nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.entity[ids]).relu().mean(1))


@pytest.mark.parametrize("method", ["lrp", "wanda", "gradient"])
def test_a_table_is_left_alone_as_other_embeddings_are(method: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model, batches = Entities(), [{**BATCHES[0], "ids": IDS % 7}]  # the other rows would be the first to go
    with caplog.at_level(logging.INFO, logger="lrp_prune"):
        masks = lrp_prune.prune(model, batches, 0.5, method, recalibrate=False, progress=False)
    assert set(masks) == {"layer.weight", "head.weight"} and masks.num_pruned == 60 and not masks.unscored
    assert bool((model.entity != 0).all())
    assert "entity: rows are looked up by ids" in caplog.text
    masks = lrp_prune.prune(model, batches, 0.5, "lrp", include=["entity", "head"], recalibrate=False, progress=False)
    assert set(masks) == {"entity", "head.weight"} and masks.pruned_in("entity") > 0


class Decayed(nn.Module):
    """A layer whose weight is a table as well, and whose output a rule holds constant; entries of a table besides."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.other, self.head = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 5)
        self.gains = nn.Parameter(torch.randn(20, 4))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.tied.weight)
        entries = self.gains[ids[:, :1], np.arange(4)]  # no rows, so that it is no embedding
        return self.head((torch.exp(-F.softplus(self.tied(x))) * self.other(x)).mean(1)) * entries.mean(1, keepdim=True)


def test_a_layer_that_is_a_table_is_one_though_a_rule_holds_what_it_makes() -> None:
    torch.manual_seed(0)
    relevance = lrp_prune.attribute(Decayed(), BATCHES, composite="attnlrp")
    assert set(relevance) == {"other.weight", "head.weight"} and set(relevance.unscored) == {"gains"}


def test_names_of_biases_and_tables_are_told_by_what_stands_beside_them() -> None:
    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_E, self.kernel = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3, 2))

    class PatchEmbed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.b_proj = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("W_Q", "b_Q", "_W_K", "_b_K", "a", "b", "W_b", "bias1", "expert_biases"):
                setattr(self, name, nn.Parameter(torch.ones(4, 3)))

    model = nn.ModuleDict({"table": Embed(), "patches": PatchEmbed(), "layer": Layer()})
    assert set(candidates(model)) == {
        "table.kernel", "patches.proj", "patches.b_proj", "layer.W_Q", "layer._W_K", "layer.a", "layer.b", "layer.W_b",
    }  # fmt: skip


@pytest.mark.parametrize("granularity", ["head", "neuron", "block"])
@pytest.mark.parametrize("write", WRITING)
def test_units_are_those_of_the_layers_that_they_are(write: str, granularity: str) -> None:
    if (write, granularity) == ("einsum, each head by itself", "block"):
        return  # what is written is not what is added, but a part of it for each head
    ours, other = both(write=write)
    with pytest.warns(UserWarning) if granularity == "neuron" else torch.no_grad():
        found = lrp_prune.attribute(ours, BATCHES, granularity=granularity)
    wanted = lrp_prune.attribute(other, BATCHES, granularity=granularity)
    names = {"W_O": "o", "W_out": "down", "head": "head"}
    assert set(found) <= set(names) and len(found) == {"head": 1, "neuron": 1, "block": 2}[granularity]
    for name in found:
        torch.testing.assert_close(found[name], wanted[names[name]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("write", WRITING)
def test_heads_count_the_tokens_that_layers_count(write: str) -> None:
    padded = [{**BATCHES[0], "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [5], [7], [2], [6]])).long()}]
    ours, other = (lrp_prune.attribute(model, padded, granularity="head") for model in both(write=write))
    torch.testing.assert_close(ours["W_O"], other["o"], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        ours["W_O"], lrp_prune.attribute(both(write=write)[0], BATCHES, granularity="head")["W_O"]
    )


class Tied(nn.Module):
    """Hidden units that are read by a table of embeddings, which is looked up by an index or by a module."""

    def __init__(self, module: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self._module = module

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) if self._module else self.embed.weight[ids]
        return (self.hidden(x.mean(1)).relu() @ self.embed.weight.T)[:, :CLASSES]


def test_units_do_not_own_entries_of_a_table_that_is_looked_up() -> None:
    for module in (True, False):
        with pytest.raises(ValueError, match="hidden: its channels go into embed, which has other uses"):
            lrp_prune.attribute(Tied(module), BATCHES, granularity="neuron", include=["hidden"])


class Rotated(nn.Module):
    """Positions turn queries and keys, written into a copy; and rows of a table that no id of the batch looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.W_pos = OfParameters(), nn.Parameter(torch.randn(9, DIM))

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embed(ids)
        angles = self.W_pos[torch.arange(ids.shape[1])][:, None]
        q, k = (self._turned(torch.einsum("bpm,hmd->bphd", x, each), angles) for each in (inner.W_Q, inner.W_K))
        v = torch.einsum("bpm,hmd->bphd", x, inner.W_V)
        pattern = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        return inner.head((x + torch.einsum("bqhd,hdm->bqm", z, inner.W_O)).mean(1))

    def _turned(self, x: Tensor, angles: Tensor) -> Tensor:
        turned = x.clone()
        turned[..., : DIM // 2], turned[..., DIM // 2 :] = -x[..., DIM // 2 :], x[..., : DIM // 2]
        return x * angles.cos() + turned * angles.sin()


def test_what_a_rotation_makes_of_queries_is_no_block() -> None:
    torch.manual_seed(0)
    model = Rotated()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert set(lrp_prune.attribute(model, BATCHES, granularity="block")) == {"inner.W_O"}


def test_rows_that_are_not_looked_up_by_ids_are_data() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W_pos, self.embed, self.head = (
                nn.Parameter(torch.randn(9, WIDTH)),
                nn.Embedding(20, WIDTH),
                nn.Linear(WIDTH, 5),
            )

        def forward(self, ids: Tensor) -> Tensor:
            return self.head((self.embed(ids) + self.W_pos[torch.arange(ids.shape[1])]).relu().mean(1))

    with pytest.raises(ValueError, match=r"W_pos \(enters as data"):
        lrp_prune.attribute(Positions(), BATCHES, include=["W_pos"])


@pytest.mark.parametrize("write", [name for name in WRITING if "by itself" not in name])
def test_relevance_goes_through_heads_that_are_read_by_several_axes(write: str) -> None:
    models = both(write=write)
    ours, other = (
        lrp_prune.explain(model, BATCHES[0], target=1, through={name: [1]}, granularity="head").inputs["ids"].relevance
        for model, name in zip(models, ("W_O", "o"), strict=True)
    )
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    assert bool(ours.any())


@pytest.mark.parametrize("write", WRITING)
def test_a_head_without_its_weights_writes_nothing(write: str) -> None:
    ours, other = both(write=write)
    masks = lrp_prune.prune(ours, BATCHES, 0.34, "lrp", granularity="head", recalibrate=False, progress=False)
    gone = [head for head in range(HEADS) if not bool(masks["W_O"][head].any())]
    assert len(gone) == 1 and bool(masks["W_O"].sum() == 2 * DIM * WIDTH)
    with torch.no_grad():
        other.o.weight.view(WIDTH, HEADS, DIM)[:, gone] = 0
    torch.testing.assert_close(ours(IDS), other(IDS))


@pytest.mark.parametrize(("kind", "name"), [("head", "W_O"), ("mlp_neuron", "W_out"), ("attention_block", "W_O")])
def test_circuits_tell_that_they_need_layers(kind: str, name: str) -> None:
    ours, other = both()

    def target(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["ids"])[:, 0].sum()

    with pytest.raises(ValueError, match=rf"{name} is a parameter and no module of its own.*exclude=\['{name}'\]"):
        lrp_prune.circuits.find_sites(ours, BATCHES[0], kind, target)
    assert {site.kind for site in lrp_prune.circuits.find_sites(other, BATCHES[0], kind, target)} == {kind}
