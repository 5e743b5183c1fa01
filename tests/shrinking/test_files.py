"""Shrunk models in files: for ``from_pretrained``, or with the shapes beside the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor, nn

import lrp_prune
from lrp_prune.shrinking.files import DESCRIPTION
from lrp_prune.storage import load_tensors, save_tensors
from tests.support.shrinking import keeping, masks_of, sizes
from tests.support.small_models import batch_for, build, forward

ROWS = torch.zeros(5, dtype=torch.int64)


class Convolutional(nn.Module):
    """A stem, a depthwise convolution, batch normalization with its statistics, and a tied pair of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head, self.second = nn.Linear(8, 6), nn.Linear(8, 6)
        self.second.weight = self.head.weight
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.depthwise(self.stem(x)).relu().mean((2, 3))
        return self.out(self.head(pooled).relu() + self.second(pooled))


def shrunk_convolutional() -> tuple[lrp_prune.Shrunk, Tensor]:
    torch.manual_seed(0)
    model, x = Convolutional(), torch.randn(5, 3, 9, 9)
    model.train()(x)  # so that its statistics are its own
    model.eval()
    masks = keeping(model, (x, ROWS), "neuron", {"head": [1, 2, 6], "out": [0, 2, 4, 5]})
    return lrp_prune.shrink(model, masks, [x]), x


def test_a_dense_architecture_is_built_to_the_sizes_and_loaded(tmp_path: Path) -> None:
    shrunk, x = shrunk_convolutional()
    shrunk.save(tmp_path, max_shard_size=200)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].startswith("shrunk-00001-of-")
    model = Convolutional().eval()
    assert lrp_prune.load_shrunk(tmp_path, model) is model
    assert torch.equal(model(x), shrunk.model(x))
    assert model.second.weight is model.head.weight and tuple(model.head.weight.shape) == (4, 3)
    assert (model.depthwise.groups, model.stem[1].num_features, model.out.in_features) == (3, 3, 4)
    saved = [name for file in files for name in safe_open(tmp_path / file, "pt").keys()]  # noqa: SIM118
    assert len(saved) == len(set(saved)) == len(model.state_dict()) - 1  # the tied weight once


def test_a_model_without_data_is_filled(tmp_path: Path) -> None:
    shrunk, x = shrunk_convolutional()
    shrunk.save(tmp_path)
    with torch.device("meta"):
        model = Convolutional().eval()
    assert torch.equal(lrp_prune.load_shrunk(tmp_path, model)(x), shrunk.model(x))
    with torch.device("meta"):
        model = Convolutional()
        model.register_buffer("shift", torch.ones(1), persistent=False)
    with pytest.raises(ValueError, match="shift has no data and is not saved"):
        lrp_prune.load_shrunk(tmp_path, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_layers_of_different_sizes_are_loaded_into_what_the_configuration_makes(name: str, tmp_path: Path) -> None:
    model, batch = build(name), batch_for(name)
    kept = {
        "gpt2": {"h.0.attn.c_proj": [0, 2], "h.1.attn.c_proj": [3]},
        "bert": {"layer.0.attention.output.dense": [1], "layer.1.attention.output.dense": [0, 1, 2]},
        "t5": {"encoder.block.0.layer.0.SelfAttention.o": [0, 1], "encoder.block.1.layer.0.SelfAttention.o": [0, 1]},
    }
    shrunk = lrp_prune.shrink(model, keeping(model, batch, "head", kept[name]), [batch])
    assert not shrunk.loads_plainly and "the configuration of" in str(shrunk)
    shrunk.save(tmp_path)
    again = type(model)(tf.AutoConfig.from_pretrained(tmp_path)).eval()
    lrp_prune.load_shrunk(tmp_path, again)
    assert sizes(again) == sizes(model)
    assert torch.equal(forward(again, batch), forward(model, batch))


def test_a_folder_that_is_loaded_plainly_says_so(tmp_path: Path) -> None:
    model, batch = build("llama"), batch_for("llama")
    shrunk = lrp_prune.shrink(model, masks_of(model, batch, "neuron"), [batch])
    shrunk.save(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with pytest.raises(ValueError, match=r"has no shrunk.json.*from_pretrained"):
        lrp_prune.load_shrunk(tmp_path, build("llama"))


def test_a_folder_holds_what_was_saved_last(tmp_path: Path) -> None:
    shrunk_convolutional()[0].save(tmp_path)
    model, batch = build("llama"), batch_for("llama")
    lrp_prune.shrink(model, masks_of(model, batch, "neuron"), [batch]).save(tmp_path)
    with pytest.raises(ValueError, match=r"has no shrunk.json.*from_pretrained"):
        lrp_prune.load_shrunk(tmp_path, Convolutional())


def changed(folder: Path, **changes: Any) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(tmp_path: Path) -> None:
    shrunk, x = shrunk_convolutional()
    shrunk.save(tmp_path)
    description = json.loads((tmp_path / DESCRIPTION).read_text())
    model = Convolutional().eval()
    before, expected = sizes(model), model(x)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"version": 9}, "version 9"),
        ({"format": "other"}, "does not describe a shrunk model"),
        ({"shapes": {**description["shapes"], "other": [2]}}, "other is in the file only"),
        ({"shapes": {**description["shapes"], "out.bias": [3]}}, "must not be smaller"),
        ({"numbers": {"stem.7.groups": 2}}, "has no stem.7.groups"),
        ({"numbers": {"depthwise.padding_mode": 2}}, "padding_mode is 'zeros'"),
        ({"files": {"shrunk.safetensors": ["out.bias"]}}, "does not hold what"),
    ]
    for changes, message in cases:
        changed(tmp_path, **{**description, **changes})
        with pytest.raises(ValueError, match=message):
            lrp_prune.load_shrunk(tmp_path, model)
        assert sizes(model) == before and torch.equal(model(x), expected)
    changed(tmp_path, **description)
    tensors, _ = load_tensors(tmp_path / "shrunk.safetensors", "shrunk")
    save_tensors(tmp_path / "shrunk.safetensors", "shrunk", {**tensors, "out.bias": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"has out.bias in other shapes than shrunk.json says"):
        lrp_prune.load_shrunk(tmp_path, model)  # it could be broadcast
    assert sizes(model) == before and torch.equal(model(x), expected)
    save_tensors(tmp_path / "shrunk.safetensors", "shrunk", tensors, {})
    with pytest.raises(ValueError, match=r"is in the (model|file) only: it was saved of a Convolutional"):
        lrp_prune.load_shrunk(tmp_path, nn.Linear(2, 2))
    (tmp_path / DESCRIPTION).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        lrp_prune.load_shrunk(tmp_path, model)
    with pytest.raises(ValueError, match=r"has no shrunk.json$"):
        lrp_prune.load_shrunk(tmp_path / "nowhere", model)
