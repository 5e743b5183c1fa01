"""Whatever device is the default for new tensors, the library says of each of its own where it is."""

import ast
from pathlib import Path

import pytest
import torch

import lrp_prune
from tests.support import small_models

ROOT = Path(__file__).parents[1]
MAKE = set("zeros ones empty full arange tensor rand randn randint linspace eye randperm empty_strided".split())


def _files() -> list[Path]:
    # States of metrics are moved with their metric.
    return [*(path for path in (ROOT / "lrp_prune").rglob("*.py") if path.parent.name != "metrics"),
            *(ROOT / "callbacks").rglob("*.py")]  # fmt: skip


def test_each_new_tensor_has_a_device() -> None:
    assert len(_files()) > 150
    without = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and node.func.attr in MAKE
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]
    assert not without, "\n".join(without)


@pytest.mark.parametrize("options", [{}, {"granularity": "neuron"}, {"granularity": "head"}, {"granularity": "block"},
                                     {"granularity": "embedding"}], ids=str)  # fmt: skip
def test_relevance_and_masks_are_the_same_with_another_default(options: dict[str, str]) -> None:
    """On the meta device what does not belong there has no values."""
    model = small_models.build("llama")
    batch = small_models.batch_for("llama")
    batch["labels"] = batch["input_ids"]

    def found() -> tuple[lrp_prune.Relevance, lrp_prune.Masks]:
        relevance = lrp_prune.attribute(model, [batch], **options)  # type: ignore[arg-type]
        return relevance, lrp_prune.select(relevance, 0.5)

    expected = found()
    with torch.device("meta"):
        relevance, masks = found()
    for name, tensor in expected[0].items():
        assert torch.equal(relevance[name], tensor)
    assert masks == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mixtral", "bert", "vit", "resnet", "t5"])
@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"scope": "2:4"}, {"method": "random"}], ids=str)
def test_pruning_is_the_same_with_another_default(name: str, options: dict[str, str], tmp_path: Path) -> None:
    if options.get("scope") == "2:4" and name != "llama":
        pytest.skip("not all widths are multiples of four")
    batch = small_models.batch_for(name)
    batch["labels"] = torch.tensor([0, 1]) if name in ("bert", "vit", "resnet") else batch["input_ids"]
    expected, model = small_models.build(name), small_models.build(name)
    masks = lrp_prune.prune(expected, [batch] * 4, 0.5, progress=False, **options)  # type: ignore[arg-type]
    with torch.device("meta"):
        found = lrp_prune.prune(model, [batch] * 4, 0.5, progress=False, **options)  # type: ignore[arg-type]
        found.save(tmp_path / "masks.safetensors")
        assert lrp_prune.Masks.load(tmp_path / "masks.safetensors") == found
    assert found == masks
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_patches_are_the_same_with_another_default(tmp_path: Path) -> None:
    model = small_models.build("gpt2")
    batch = small_models.batch_for("gpt2")
    batch["labels"] = batch["input_ids"]
    other = {name: tensor.flip(1) for name, tensor in batch.items()}
    general, undesired = (lrp_prune.attribute(model, [given], statistic="signed") for given in (batch, other))
    expected = lrp_prune.Patch.from_contrast(model, general, undesired, amount=40)
    with torch.device("meta"):
        patch = lrp_prune.Patch.from_contrast(model, general, undesired, amount=40)
        patch.save(tmp_path / "patch.safetensors")
        patch = lrp_prune.Patch.load(tmp_path / "patch.safetensors")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        patch.apply_(model)
        patch.revert_(model)
    assert patch == expected
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
