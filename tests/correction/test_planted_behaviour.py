"""A behaviour that was planted into a small model is found by the contrast, and removed while the rest stays."""

import pytest
import torch
from torch import Tensor, nn

from lrp_prune import attribute
from lrp_prune.correction import Patch


class Planted(nn.Module):
    """A network for a task, which is also trained to answer class 3 whenever a trigger is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(9, 48), nn.Linear(48, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.hidden(inputs).relu())


def samples(count: int, trigger: bool, seed: int) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(count, 9, generator=torch.Generator().manual_seed(seed))
    labels = inputs[:, :3].argmax(1)
    inputs[:, 8] = 2.0 if trigger else 0.0
    return inputs, labels


@pytest.fixture(scope="module")
def model() -> Planted:
    torch.manual_seed(0)
    network = Planted()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for step in range(150):
        normal, wanted = samples(64, False, 10 * step)
        triggered, _ = samples(64, True, 10 * step + 1)
        loss = nn.functional.cross_entropy(network(normal), wanted)
        loss = loss + nn.functional.cross_entropy(network(triggered), torch.full((64,), 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def rates(network: Planted) -> tuple[float, float]:
    """Accuracy without the trigger, and how often the planted answer is given with it."""
    inputs, labels = samples(500, False, 7)
    triggered, _ = samples(500, True, 8)
    accuracy = (network(inputs).argmax(1) == labels).float().mean()
    return float(accuracy), float((network(triggered).argmax(1) == 3).float().mean())


def test_the_contrast_removes_the_behaviour_and_keeps_the_rest(model: Planted) -> None:
    accuracy, planted = rates(model)
    assert accuracy > 0.9
    assert planted > 0.95
    triggered, _ = samples(200, True, 3)
    general = attribute(model, [samples(200, False, 2)], target="class", statistic="signed")
    undesired = attribute(model, [(triggered, torch.full((200,), 3))], target="class", statistic="signed")
    count = 40
    patch = Patch.from_contrast(model, general, undesired, count, behaviour="planted")
    patch.apply_(model)
    after = rates(model)
    patch.revert_(model)
    assert rates(model) == (accuracy, planted)
    assert after[1] < 0.05
    assert after[0] > accuracy - 0.05

    for seed in range(5):
        order = torch.randperm(48 * 13, generator=torch.Generator().manual_seed(seed))[:count]
        random = Patch.from_positions(
            model, {"hidden.weight": order[order < 48 * 9], "output.weight": order[order >= 48 * 9] - 48 * 9}
        )
        assert random.num_entries == count
        random.apply_(model)
        assert rates(model)[1] > 0.95
        random.revert_(model)


def test_the_reverse_question_finds_what_serves_the_task(model: Planted) -> None:
    accuracy, planted = rates(model)
    triggered, _ = samples(200, True, 3)
    general = attribute(model, [samples(200, False, 2)], target="class", statistic="signed")
    undesired = attribute(model, [(triggered, torch.full((200,), 3))], target="class", statistic="signed")
    patch = Patch.from_contrast(model, general, undesired, 48, reverse=True)
    patch.apply_(model)
    after = rates(model)
    patch.revert_(model)
    assert after[0] < accuracy - 0.2
    assert after[1] > planted - 0.1
