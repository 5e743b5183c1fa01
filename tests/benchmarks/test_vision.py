"""The images and networks of the benchmark of vision, and its table."""

import pytest
import torch

from tests.benchmarks import vision, vision_models


@pytest.mark.parametrize("name", vision_models.DATA)
def test_images_are_made_from_a_seed_and_parted(name: str) -> None:
    make, side, _ = vision_models.DATA[name]
    first, again, other = make(0), make(0), make(1)
    assert torch.equal(first.train[0][0], again.train[0][0]) and not torch.equal(first.train[0][0], other.train[0][0])
    assert first.held_out[0][0].shape == (450, 1, side, side)
    labels = torch.cat([labels for _, labels in first.reference])
    assert torch.equal(labels.bincount(minlength=10), torch.full((10,), 10))
    train, held_out = (torch.cat([images.flatten(1) for images, _ in part]) for part in (first.train, first.held_out))
    assert not (torch.cdist(held_out, train) == 0).any()
    for network in vision_models.NETWORKS.values():
        assert network(side)(first.held_out[0][0][:2]).shape == (2, 10)


def test_the_table_has_means_and_intervals_over_seeds() -> None:
    def entry(epsilon: float) -> dict[str, object]:
        tuned = {method: {"pruned": 0.4, "after an epoch": 0.8} for method in ("epsilon", "magnitude", "random")}
        area = {"epsilon": epsilon, "random": 0.5}
        return {"dense": 0.8, "area": area, "top": area, "tuned": tuned}

    table = vision.report({"ViT, digits,0": entry(0.6), "ViT, digits,1": entry(0.7)})
    assert "| epsilon | 0.650 ± 0.635 |" in table  # 12.71 * 0.0707 / 2 ** 0.5
    assert "| random | 0.150 ± 0.635 |" in table and "| epsilon, after an epoch | 1.000 ± 0.000 |" in table
