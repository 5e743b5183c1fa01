"""The benchmark of faithfulness measures every method on models of every kind, and LRP under noise is LRP where there is none."""

from typing import Any

import pytest
import torch

from lrp_prune.attribution.inputs import input_relevance
from lrp_prune.targets import Logit
from tests.benchmarks import faithfulness
from tests.benchmarks.explainers import Reached, of_decoder, of_last_token
from tests.support.small_models import batch_for, build

REACHED = {
    "llama": Reached("input_ids", lambda model: model.get_input_embeddings(), of_last_token),
    "t5": Reached("input_ids", lambda model: model.encoder.embed_tokens, of_decoder),
}
LRP = {"attnlrp", "cp_lrp", "epsilon"}
OTHERS = {"gradient x input", "integrated gradients", "SmoothGrad x input", "attention rollout", "random"}


def batch_of(name: str) -> dict[str, Any]:
    batch = {"input_ids": batch_for(name)["input_ids"]}
    return batch if name == "llama" else {**batch, "decoder_input_ids": torch.zeros(len(batch["input_ids"]), 1).long()}


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_every_method_is_measured_on_tokens(name: str) -> None:
    case = faithfulness.Case(build(name), [batch_of(name)], REACHED[name], {}, {"shares": [0, 0.5, 1]}, "")
    found = dict(faithfulness.curves_of(case, "zero"))
    assert set(found) == LRP | OTHERS | {"attnlrp, under noise"}
    assert len({round(curve.area, 9) for curve in found.values()}) > 4
    assert list(dict(faithfulness.curves_of(case, "zero", ["random"]))) == ["random"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_relevance_under_noise_is_the_mean_and_without_noise_plain(name: str) -> None:
    model, batch, target = build(name), batch_of(name), Logit(3)
    plain = input_relevance(model, batch, target).inputs["input_ids"]
    calm = faithfulness.under_noise("attnlrp", REACHED[name], draws=2, noise=0.0)(model, batch, target)["input_ids"]
    torch.testing.assert_close(calm, plain)
    noisy = faithfulness.under_noise("attnlrp", REACHED[name], draws=2, noise=0.1)(model, batch, target)["input_ids"]
    assert not torch.allclose(noisy, plain, rtol=1e-2)
