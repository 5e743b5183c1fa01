"""What products gave is given again as long as nothing before them changes, and comes to the same, bit for bit."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from lrp_prune.engine.batch_layout import BatchLayout
from lrp_prune.engine.uses import Product
from lrp_prune.models.padding import counted_tokens
from lrp_prune.models.subject import subject_of
from lrp_prune.pruning import LeastSquares, OptimalBrainSurgeon, scorer
from lrp_prune.pruning.choices import Choices
from lrp_prune.pruning.compensation import compensate_
from lrp_prune.pruning.compensation.grouping import Grouped
from lrp_prune.pruning.compensation.inputs import Inputs
from lrp_prune.pruning.compensation.repeating import RepeatedUses, Results, Seen, settled
from lrp_prune.pruning.compensation.stages import StageReached
from lrp_prune.pruning.masks import Masks
from lrp_prune.pruning.pairs import PlacedUses
from lrp_prune.pruning.passes import outputs_of
from lrp_prune.pruning.products import computed
from tests.support.compensation import AddedTwice, half
from tests.support.small_models import batch_for, build


class Convolved(nn.Module):
    """Writes into what its layers give, uses one of them twice, and one only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1, groups=2),
        )
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x = self.second(x).mul_(2).relu_()
        x = self.second(x).add_(x)
        return self.last(self.third(x).relu_().mean((2, 3)))


class Blocks(nn.Module):
    """Convolved blocks, each of them a stage."""

    def __init__(self, number: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Convolved() for _ in range(number))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block(x) for block in self.blocks]).sum(0)


def made(name: str) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    if name == "blocks":
        return Blocks().eval(), [torch.randn(12, 3, 6, 6) for _ in range(3)]
    if name == "added":
        return nn.Sequential(AddedTwice(True), AddedTwice(True)), [torch.randn(64, 8) for _ in range(2)]
    return build(name), [batch_for(name, 4, 12) for _ in range(2)]


def compensated(
    model: nn.Module, masks: Masks, batches: list[Any], monkeypatch: pytest.MonkeyPatch, again: bool
) -> Any:
    """The model afterwards, and how many products were given again."""
    mine, given = copy.deepcopy(model), []
    before = Results.given

    def noted(results: Results, index: int, last: bool) -> Tensor | None:
        found = before(results, index, last)
        if found is not None:
            given.append((index, last))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Results, "given", noted)
        if not again:
            patch.setattr(Results, "keep", lambda *_: None)
        compensate_(mine, masks, batches, LeastSquares())
    return mine, given


@pytest.mark.parametrize(
    "name", ["llama", "mixtral", "gpt_oss", "bert", "t5", "vit", "resnet", "blocks", "added", "qwen3_next"]
)
def test_what_is_given_again_comes_to_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = made(name)
    masks = lrp_prune.select(scorer("magnitude", model).compute(), 0.5, scope="layer")
    found, given = compensated(model, masks, batches, monkeypatch, again=True)
    expected, none = compensated(model, masks, batches, monkeypatch, again=False)
    # Only where a stage has three groups of layers is something given again before the last time.
    assert {last for _, last in given} == ({True} if name == "added" else {False, True}) and not none
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Routed(nn.Module):
    """Two experts of one stack, half of the rows to each, those with the largest values of a router to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.stack, self.last = nn.Linear(8, 1), nn.Parameter(torch.randn(2, 8, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        order = self.router(x)[:, 0].topk(len(x)).indices
        made = torch.bmm(x[order].reshape(2, -1, 8), self.stack).flatten(0, 1)
        return x + self.last(torch.zeros_like(x).index_copy(0, order, made))


def test_a_stage_that_chooses_otherwise_at_last_is_computed_again_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(Routed(), Routed()), [torch.randn(64, 8)]
    masks = half(model, ["0.router.weight", "0.stack", "0.last.weight", "1.router.weight", "1.stack", "1.last.weight"])
    found, given = compensated(model, masks, batches, monkeypatch, again=True)
    expected, _ = compensated(model, masks, batches, monkeypatch, again=False)
    assert [index for index, last in given if last] == [0, 0]  # the routers alone
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def seen_in(model: nn.Module, masks: Masks, batch: Any) -> list[Seen]:
    choices = Choices()
    uses = Grouped(masks, [], dict(model.named_parameters()), lambda *_: None, choices)
    outputs_of(subject_of(model).module, batch, uses, "", choices)
    return uses.products


def test_products_are_settled_up_to_the_first_that_changes() -> None:
    torch.manual_seed(0)
    model = Convolved().eval()
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1 and name != "first.weight"]
    products = seen_in(model, half(model, names), torch.randn(2, 3, 6, 6))
    assert [seen.name.split(".")[0] for seen in products] == ["first", "second", "second", "third", "last"]
    second, third, last = (products[index].parts[0].place for index in (1, 3, 4))
    assert settled(products, [second, third, last]) == 1 and not products[0].parts
    assert settled(products, [third, last]) == 3
    assert settled(products, [last]) == 4 and settled(products, []) == 5


def test_products_behind_a_choice_are_not_settled_where_another_is_made() -> None:
    torch.manual_seed(0)
    model = Routed()
    products = seen_in(model, half(model, ["router.weight", "stack", "last.weight"]), torch.randn(64, 8))
    assert [seen.choices for seen in products] == [0, 1, 1]
    assert settled(products, []) == 3 and settled(products, [], choosing=True) == 1


class Counting(RepeatedUses):
    """Counts the products that are computed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.computed = Counter[str]()

    def _already(self, found: Product) -> Tensor | None:
        result = super()._already(found)
        self.computed[found.origin.name] += result is None
        return result


def run(model: nn.Module, uses: PlacedUses | RepeatedUses, batch: Any) -> Tensor:
    (output,) = outputs_of(subject_of(model).module, batch, uses, "", Choices())
    return output.detach()


def test_the_model_may_write_into_what_is_given_again() -> None:
    torch.manual_seed(0)
    model, batch = Convolved().eval(), torch.randn(2, 3, 6, 6)
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    products, results = seen_in(model, half(model, names), batch), Results(lambda: 1 << 20)
    expected = model(batch).detach()
    for last in (False, False, True):
        uses = Counting(products=products, results=results, settled=3, last=last)
        assert torch.equal(run(model, uses, batch), expected)
    assert not results.nbytes
    assert [uses.computed[f"{name}.weight"] for name in ("first", "second", "third", "last")] == [0, 0, 1, 1]


def test_what_has_no_room_is_computed_again() -> None:
    torch.manual_seed(0)
    model, batch = Convolved().eval(), torch.randn(2, 3, 6, 6)
    size = 2 * 8 * 36 * 4
    products, results = seen_in(model, half(model, ["second.weight"]), batch), Results(lambda: 2 * size)
    for _ in range(2):
        uses = Counting(products=products, results=results, settled=5)
        run(model, uses, batch)
        assert results.nbytes == 2 * size
    assert uses.computed.total() == 3


def test_a_forward_of_another_size_is_computed_from_there_on() -> None:
    torch.manual_seed(0)
    model, batch = Convolved().eval(), torch.randn(2, 3, 6, 6)
    products, results = seen_in(model, half(model, ["second.weight"]), batch), Results(lambda: 1 << 20)
    run(model, Counting(products=products, results=results, settled=5), batch)
    other = torch.randn(3, 3, 6, 6)
    uses = Counting(products=products, results=results, settled=5)
    assert torch.equal(run(model, uses, other), model(other)) and uses.computed.total() == 5
    assert uses.seen is None


def test_a_forward_ends_before_the_product_whose_input_is_all_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, batch = Convolved().eval(), torch.randn(2, 3, 6, 6)
    masks = half(model, ["second.weight"])
    products = seen_in(model, masks, batch)
    place = products[1].parts[0].place

    made = list[str]()
    before = computed
    monkeypatch.setattr(
        "lrp_prune.pruning.products.computed", lambda found: made.append(found.origin.name) or before(found)
    )

    def rows(**known: Any) -> list[list[Tensor]]:
        layout = BatchLayout()
        layout.counted = counted_tokens(model, batch, 0)
        uses = Inputs(masks, place, 2, layout, **known)
        made.clear()
        with pytest.raises(StageReached):
            run(model, uses, batch)
        return uses.rows

    theirs = rows()
    assert made == ["first.weight", "second.weight", "second.weight"]
    ours = rows(products=products)
    assert made == ["first.weight", "second.weight"]
    for some, others in zip(ours, theirs, strict=True):
        assert torch.equal(torch.cat(some), torch.cat(others))


class Chain(nn.Module):
    """Three layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


@pytest.mark.parametrize("way", [LeastSquares(), OptimalBrainSurgeon()])
def test_each_product_of_a_chain_is_computed_once_after_it_is_solved_for(
    way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, made = nn.Sequential(Chain(), Chain()), Counter[str]()

    def noted(found: Product) -> Tensor:
        made[found.origin.name] += 1
        return computed(found)

    monkeypatch.setattr("lrp_prune.pruning.products.computed", noted)
    names = [name for name, weight in model.named_parameters() if weight.dim() > 1]
    compensate_(model, half(model, names), [torch.randn(64, 8)], way)
    # To see what the stages are, twice whether others may stand in for them, as part of the dense stage, and once solved for.
    assert made == dict.fromkeys(names, 5)


class Doubling:
    """Trains a stage, so to say."""

    updates = True

    def restored(self, *_: Any) -> bool:
        return False

    def refine(self, name: str, stage: nn.Module, *_: Any) -> None:
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.mul_(2)


def test_a_stage_that_was_trained_gives_what_it_gives_then(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(Chain(), Chain()), [torch.randn(64, 8)]
    masks = half(model, [name for name, weight in model.named_parameters() if weight.dim() > 1])
    found, expected = copy.deepcopy(model), copy.deepcopy(model)
    compensate_(found, masks, batches, LeastSquares(dense=0.0), refining=Doubling())
    monkeypatch.setattr(Results, "keep", lambda *_: None)
    compensate_(expected, masks, batches, LeastSquares(dense=0.0), refining=Doubling())
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
