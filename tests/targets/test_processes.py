"""Several processes explain the same: what each infers from its own first batch is compared, and a difference refused by all."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lrp_prune
from lrp_prune.callbacks import RelevanceCollector
from tests.support.processes import run
from tests.support.sharding import sharded, together
from tests.support.small_models import build

pytestmark = pytest.mark.processes

IDS = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(0))
FOLLOWING = torch.cat([IDS[:, 1:], IDS[:, :1]], 1)
TAGS = IDS.flip(1).remainder(3) + 20


class Running(nn.Module):
    """Each token is told from the sum of those up to it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layers = nn.Embedding(24, 8), nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.layers[0](self.embedding(x).cumsum(1)).relu())
        return scores


def outcome(model: nn.Module, batch: Any, mesh: Any) -> str:
    """What is explained, or why nothing is."""
    try:
        return lrp_prune.attribute(sharded(model, mesh, model.layers), [batch]).target
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (IDS, IDS, "next_token"),
        (IDS, FOLLOWING, "one target"),  # the first needs one more forward than the second, which takes part in it
        (FOLLOWING, TAGS, "token"),
        (TAGS, TAGS.float(), "labels of one kind"),
        (IDS, torch.ones(4, 5, dtype=torch.long), "another process"),
    ],
)
def test_processes_of_a_sharded_model_decide_alike_or_are_refused(
    tmp_path: Path, first: Tensor, second: Tensor, expected: str
) -> None:
    def check(mesh: Any) -> str:
        return outcome(Running(), (IDS, first if mesh.get_local_rank() == 0 else second), mesh)

    one, other = together(check, 2, tmp_path)
    if expected in ("next_token", "token"):
        assert one == other == expected
    elif expected == "another process":
        assert one.startswith("RuntimeError") and expected in one
        assert other.startswith("ValueError") and "fit no target" in other
    else:
        assert expected in one and expected in other and "pass target=" in one


def test_a_sharded_hugging_face_model_is_asked_for_its_loss(tmp_path: Path) -> None:
    batch = {"input_ids": IDS, "labels": IDS}
    plain = lrp_prune.attribute(build("llama"), [batch, batch], matmul_dtype=None)

    def check(mesh: Any) -> Any:
        model = build("llama")
        model.tie_weights()
        relevance = lrp_prune.attribute(sharded(model, mesh), [batch], matmul_dtype=None)
        return relevance.target, relevance.num_samples

    assert together(check, 2, tmp_path) == [(plain.target, plain.num_samples)] * 2


class Continuing(LightningModule):
    """A model whose batches may have labels that are shifted already."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Running()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


@pytest.mark.parametrize("differ", [False, True])
def test_processes_that_explained_different_things_are_refused_by_all(tmp_path: Path, differ: bool) -> None:
    def validate() -> str:
        labels = FOLLOWING if differ and int(os.environ["RANK"]) == 1 else IDS
        collector = RelevanceCollector()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(
            callbacks=[collector],
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            **quiet,
        )
        trainer.validate(Continuing(), DataLoader([(IDS, labels)], batch_size=None), verbose=False)
        return collector.relevance.target

    outcomes = run(validate, 2, tmp_path)
    if not differ:
        assert outcomes == ["next_token"] * 2
        return
    for refusal in outcomes:
        assert isinstance(refusal, MisconfigurationException), refusal
        assert "rank 0 explained how likely tokens are given those before" in str(refusal)
        assert "rank 1 how likely labels are" in str(refusal) and "pass target=" in str(refusal)
