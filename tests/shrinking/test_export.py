"""Masked and shrunk models leave torch: as exported programs, and as ONNX files that another runtime reads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lrp_prune
from tests.support.channel_nets import Net, conv_bn, pooled
from tests.support.shrinking import CLASSES, keeping, masks_of
from tests.support.small_models import batch_for, build


class Logits(nn.Module):
    """A Hugging Face model that takes and gives tensors."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**{self.name: inputs}).logits
        return logits


def masked_and_shrunk(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model under masks, the same without what they prune, and inputs."""
    torch.manual_seed(0)
    if kind == "cnn":
        model: nn.Module = Net(
            lambda n, x: pooled(
                n.c(
                    (
                        n.b(
                            (s := n.a(x).relu()),
                        )
                        + s
                    ).relu()
                ).relu()
            ),
            a=conv_bn(4, 6, 3),
            b=conv_bn(6, 6, 3, padding=1, groups=6),
            c=nn.Conv2d(6, 4, 1),
        ).eval()
        batch: Any = (torch.randn(3, 4, 6, 6), CLASSES)
        inputs, masks = batch[0], masks_of(model, batch, "neuron")
    else:
        model, batch = build(kind), batch_for(kind)
        (name, inputs), masks = next(iter(batch.items())), masks_of(model, batch, "neuron")
    pruned = copy.deepcopy(model)
    masks.apply_(pruned)
    if kind == "llama":
        heads = keeping(pruned, batch, "head", {"0.self_attn.o_proj": [0, 1], "1.self_attn.o_proj": [1, 3]})
        heads.apply_(pruned)
        model, masks = copy.deepcopy(pruned), None
    lrp_prune.shrink(model, masks, [batch])
    return (pruned, model, inputs) if kind == "cnn" else (Logits(pruned, name), Logits(model, name), inputs)


KINDS = ["cnn", "llama", "gpt2", "vit"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_exported_programs_compute_the_same(kind: str) -> None:
    pruned, shrunk, inputs = masked_and_shrunk(kind)
    sizes = []
    for model in (pruned, shrunk):
        program = torch.export.export(model.eval(), (inputs,))
        torch.testing.assert_close(program.module()(inputs), model(inputs))
        sizes.append(sum(value.numel() for value in program.state_dict.values()))
    torch.testing.assert_close(pruned(inputs), shrunk(inputs), rtol=1e-4, atol=1e-5)
    assert sizes[1] < sizes[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_files_compute_the_same_and_have_the_zeros_or_less(kind: str, tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruned, shrunk, inputs = masked_and_shrunk(kind)
    found = []
    for number, model in enumerate((pruned, shrunk)):
        path = tmp_path / f"{number}.onnx"
        program = torch.onnx.export(model.eval(), (inputs,), dynamo=True, verbose=False)
        program.save(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(inputs), rtol=1e-4, atol=1e-5)
        weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
        found.append((sum(each.size for each in weights), sum(int((each == 0).sum()) for each in weights)))
    (entries, zeros), (left, left_zeros) = found
    assert left < entries and left_zeros < zeros
