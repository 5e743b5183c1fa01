"""Tables that a forward makes once and keeps, in the inference mode of ``trainer.validate``: nothing is differentiated in it."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrp_prune
from lrp_prune.callbacks import RelevanceCollector
from lrp_prune.pruning import scorer


class Keeping(LightningModule):
    """Scales by a table that it makes in its first forward."""

    def __init__(self, where: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.where = nn.Linear(4, 4), nn.Linear(4, 3), where
        self.table: Tensor | None = None
        self.by_width: dict[int, Tensor] = {}
        self.several: list[Tensor] = []
        self.nested: dict[str, tuple[list[Tensor], int]] = {}
        self.register_buffer("kept", None)

    def factors(self) -> Tensor:
        made = torch.arange(1.0, 5.0)
        if self.where == "buffer":
            if self.kept is None:
                self.kept = made
            return self.kept
        if self.where == "attribute":
            if self.table is None:
                self.table = made
            return self.table
        if self.where == "dictionary":
            return self.by_width.setdefault(4, made)
        if self.where == "nested":
            return self.nested.setdefault("tables", ([made], 4))[0][0]
        if not self.several:
            self.several.append(made)
        return self.several[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * self.factors()).relu())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("where", ["attribute", "dictionary", "list", "nested", "buffer"])
def test_relevance_goes_through_them(make_trainer, where: str) -> None:
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(4, generator=generator), index % 3) for index in range(8)]
    found = []
    for inference_mode in (True, False):
        collector, module = RelevanceCollector(), Keeping(where)
        trainer = make_trainer(callbacks=[collector], inference_mode=inference_mode)
        for _ in range(2):  # the second validation finds the tables of the first
            trainer.validate(module, DataLoader(data, 4), verbose=False)
        found.append(collector.relevance)
    assert found[0].num_samples == 8
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_so_it_does_after_a_validation_without_it(make_trainer) -> None:
    data = [(torch.ones(4), 1)] * 4
    module, other = Keeping("attribute"), Keeping("attribute")
    make_trainer().validate(module, DataLoader(data, 4), verbose=False)
    assert module.table is not None and module.table.is_inference()
    batch = torch.ones(4, 4), torch.ones(4, dtype=torch.long)
    found, expected = (lrp_prune.attribute(each, [batch]) for each in (module, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_table_that_grows_between_batches_and_one_that_is_shared() -> None:
    module = Keeping("attribute")
    scores = scorer("lrp", module)
    batch = torch.ones(4, 4), torch.ones(4, dtype=torch.long)
    scores.update(batch)
    with torch.inference_mode():
        module.table = torch.arange(1.0, 5.0)
        module.by_width[4] = module.table
    scores.update(batch)
    assert not module.table.is_inference() and module.by_width[4] is module.table
    assert scores.compute().num_samples == 8
