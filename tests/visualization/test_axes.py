"""Which axis of an input is of steps and which of channels or samples, by what the model does with it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lrp_prune


class Series(nn.Module):
    """A convolution over time (or space and time), of inputs that are as it reads them, or turned, or scaled before."""

    def __init__(self, layout: str, dims: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        kind: Any = nn.Conv1d if dims == 1 else nn.Conv3d
        self.layout, self.conv, self.head = layout, kind(2, 8, 3, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "turned":
            x = x.movedim(-1, 1)
        if self.layout == "scaled":
            x = x * 2
        return self.head(F.relu(self.conv(x)).flatten(2).mean(-1))


@pytest.mark.parametrize("layout", ["as it is", "turned", "scaled"])
def test_steps_are_what_a_convolution_goes_over(layout: str) -> None:
    x = torch.zeros(3, 2, 20)
    for sample, step in enumerate((5, 13, 13)):
        x[sample, :, step] = 1 + sample
    given = x.movedim(1, -1).contiguous() if layout == "turned" else x
    names = [f"t{step}" for step in range(20)]
    model = Series(layout).eval()
    (found,) = lrp_prune.explain(model, given, features=names, composite="gradient").inputs.values()
    assert found.kind == "steps" and found.relevance.shape == (3, 20)
    for sample, step in enumerate((5, 13, 13)):
        assert max(found.of(sample), key=lambda entry: abs(entry[1]))[0] == f"t{step}"
    leaf = x.clone().requires_grad_()
    output = model(leaf.movedim(1, -1) if layout == "turned" else leaf)
    output.amax(1).sum().backward()
    torch.testing.assert_close(found.relevance, (leaf * leaf.grad).detach().sum(1))
    with pytest.raises(ValueError, match=r"features has 2 names, and .* has 20 steps"):
        lrp_prune.explain(model, given, features=["ecg", "resp"])


def test_frames_of_videos_are_steps() -> None:
    x = torch.zeros(1, 2, 9, 5, 5)
    x[:, :, 4, 2, 2] = 1.0
    (found,) = lrp_prune.explain(Series("as it is", 3).eval(), x).inputs.values()
    assert found.relevance.shape == (1, 9) and int(found.relevance.abs().argmax()) == 4


def test_images_with_their_channels_last_are_images() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x.permute(0, 3, 1, 2))).mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(2, 8, 7, 3)
    (found,) = lrp_prune.explain(Last().eval(), x).inputs.values()
    assert found.relevance.shape == (2, 3, 8, 7)


class Scored(nn.Module):
    """A score for each pair of ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Embedding(30, 8), nn.Embedding(30, 8)
        self.hidden, self.score = nn.Linear(16, 8, bias=False), nn.Linear(8, 1, bias=False)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        both = torch.cat([self.user(user), self.item(item)], -1)
        return self.score(F.relu(self.hidden(both)))[:, 0]


def test_an_id_for_each_sample_is_of_that_sample() -> None:
    model, batch = Scored().eval(), {"user": torch.arange(5), "item": torch.arange(5) + 7}
    explanation = lrp_prune.explain(model, batch, composite="epsilon")
    for name in batch:
        assert explanation.inputs[name].relevance.shape == (5, 1)
    assert [label for label, _ in explanation.inputs["item"].of(3)] == ["10"]
    total = sum(part.relevance.sum(1) for part in explanation.inputs.values())
    torch.testing.assert_close(total, model(**batch).detach(), rtol=1e-3, atol=1e-5)
