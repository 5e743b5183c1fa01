"""Perturbation curves: against forwards in which the same parts were replaced by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrp_prune.metrics import PerturbationCurve, perturbation_curve, plot_curves
from lrp_prune.metrics.perturbing import replaced
from lrp_prune.targets import Logit, LogitDifference
from tests.support.small_models import Counting, batch_for, build

SHARES = (0.0, 0.5, 1.0)


def curve(model: nn.Module, batch: Any, relevance: Any, **options: Any) -> PerturbationCurve:
    return perturbation_curve(model, [batch], relevance, progress=False, **options)


def given(relevance: Any) -> Any:
    return lambda model, batch, target: relevance


def test_of_a_linear_model_it_is_what_the_removed_terms_were() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 3, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    found = curve(model, x, "gradient", shares=[step / 6 for step in range(7)])
    answers = model(x).argmax(-1)
    for sample in range(5):
        terms = (model.weight[answers[sample]] * x[sample]).sort(descending=True).values
        bias = model.bias[answers[sample]]
        most = [terms[number:].sum() + bias for number in range(7)]
        least = [terms[: 6 - number].sum() + bias for number in range(7)]
        torch.testing.assert_close(found.most[sample], torch.stack(most).detach())
        torch.testing.assert_close(found.least[sample], torch.stack(least).detach())
    areas = [sum((a + b) / 12 for a, b in itertools.pairwise(row)) for row in (found.least - found.most).tolist()]
    assert found.areas.tolist() == pytest.approx(areas) and found.area == pytest.approx(sum(areas) / 5)
    assert found.interval.low < found.area < found.interval.high


def test_of_one_sample_no_interval_is_told() -> None:
    torch.manual_seed(0)
    found = curve(nn.Linear(6, 3), torch.randn(1, 6), "gradient", target=1)
    assert found.interval.value == found.area and found.interval.low != found.interval.low
    assert str(found).splitlines()[0].endswith("(one sample), baseline zero") and found.to_dict()["interval"] is None


def test_the_opposite_order_has_the_opposite_area() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(4, 6)
    scores = torch.rand(4, 6)
    assert curve(model, x, given(scores)).area == pytest.approx(-curve(model, x, given(-scores)).area)


def test_what_both_curves_begin_and_end_with_is_run_once() -> None:
    torch.manual_seed(0)
    model, x, runs = nn.Linear(6, 3), torch.randn(4, 6), []
    handle = model.register_forward_hook(lambda *args: runs.append(len(args)))
    curve(model, x, given(torch.rand(4, 6)), shares=SHARES, target=1)
    handle.remove()
    assert len(runs) - 1 == 2 + 2 * (len(SHARES) - 2)  # and one that looks at what there is to replace


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("baseline", ["zero", "mean", 0.5])
def test_embeddings_of_tokens_are_replaced(name: str, baseline: str | float) -> None:
    """Of an encoder-decoder those of the encoder, also where its decoder reads the same."""
    model, batch = build(name), batch_for(name)
    ids = batch["input_ids"]
    scores = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3))
    found = curve(model, batch, given({"input_ids": scores}), baseline=baseline, shares=SHARES, target=5)
    embeddings = model.get_input_embeddings()(ids)
    other = {name: value for name, value in batch.items() if name != "input_ids"}
    base = {"zero": 0.0 * embeddings, "mean": embeddings.mean(1, keepdim=True).expand_as(embeddings)}
    value = base[baseline] if isinstance(baseline, str) else torch.full_like(embeddings, baseline)
    for column, number in enumerate((0, 4, 7)):  # half of 7 is rounded to 4
        for curves, descending in ((found.most, True), (found.least, False)):
            mask = torch.zeros_like(ids, dtype=torch.bool)
            mask.scatter_(1, scores.argsort(dim=1, descending=descending)[:, :number], True)
            with torch.no_grad():
                logits = model(inputs_embeds=torch.where(mask[..., None], value, embeddings), **other).logits[:, -1, 5]
            torch.testing.assert_close(curves[:, column].float(), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_replaced_and_counts_nowhere(side: str) -> None:
    model, ids = build("llama"), batch_for("llama")["input_ids"][:1]
    alone = curve(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "attnlrp", baseline="mean", shares=SHARES
    )
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([pad, ids] if side == "left" else [ids, pad], 1),
        "attention_mask": torch.cat([pad, ids * 0 + 1] if side == "left" else [ids * 0 + 1, pad], 1),
    }
    both = curve(model, padded, "attnlrp", baseline="mean", shares=SHARES)
    torch.testing.assert_close(both.most, alone.most, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.least, alone.least, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_padding_of_an_encoder_is_not_replaced_whatever_its_decoder_reads() -> None:
    model, ids = build("t5"), batch_for("t5")["input_ids"][:1]
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = {"input_ids": torch.cat([ids, pad], 1), "attention_mask": torch.cat([ids * 0 + 1, pad], 1)}
    for started in (torch.zeros(1, 1, dtype=torch.long), torch.cat([pad, ids], 1)):
        alone = curve(model, {"input_ids": ids, "decoder_input_ids": started}, "cp_lrp", shares=SHARES, target=5)
        both = curve(model, {**padded, "decoder_input_ids": started}, "cp_lrp", shares=SHARES, target=5)
        torch.testing.assert_close(both.most, alone.most, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.least, alone.least, rtol=1e-4, atol=1e-5)


def test_the_first_tokens_can_be_left_out() -> None:
    model, batch = build("llama"), batch_for("llama")
    scores = torch.arange(7.0, 0, -1).expand(2, 7)  # the first is the most relevant
    found = curve(model, batch, given(scores), shares=(0.0, 0.2, 1.0), skip_first=2, target=5)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    changed = embeddings.clone()
    changed[:, 2] = 0
    with torch.no_grad():
        torch.testing.assert_close(found.most[:, 1].float(), model(inputs_embeds=changed).logits[:, -1, 5])


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur"])
def test_patches_of_images_are_replaced(baseline: str) -> None:
    model, batch = build("vit"), batch_for("vit")
    pixels = batch["pixel_values"]
    relevance = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(3))
    found = curve(model, batch, given(relevance), baseline=baseline, shares=(0.0, 1 / 16, 1.0), target=1)
    for sample in range(len(pixels)):
        sums = torch.stack(
            [relevance[sample, :, row : row + 4, col : col + 4].sum() for row in (0, 4, 8, 12) for col in (0, 4, 8, 12)]
        )
        row, col = divmod(int(sums.argmax()), 4)
        whole = replaced(pixels[sample : sample + 1], torch.ones(1, 1, dtype=torch.bool), baseline, patch=16)[0]
        changed, part = pixels[sample].clone(), (slice(None), slice(4 * row, 4 * row + 4), slice(4 * col, 4 * col + 4))
        changed[part] = whole[part]
        with torch.no_grad():
            logit = model(pixel_values=changed[None]).logits[0, 1]
        torch.testing.assert_close(found.most[sample, 1].float(), logit, rtol=1e-4, atol=1e-5)


def test_a_blurred_image_is_smooth_and_keeps_its_mean() -> None:
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 2
    blurred = replaced(image, torch.ones(1, 1, dtype=torch.bool), "blur", patch=32)
    assert blurred.diff(dim=3).abs().mean() < 0.1 * image.diff(dim=3).abs().mean()
    assert float(blurred.mean()) == pytest.approx(float(image.mean()), abs=0.1)


def test_patches_that_are_cut_off_are_replaced_too() -> None:
    image = torch.ones(1, 1, 5, 7)
    mask = torch.tensor([[False, False, True, False, False, True]])  # 2 rows of 3 patches of 3 pixels
    kept = replaced(image, mask, "zero", patch=3)[0, 0]
    assert kept[:, :6].all() and not kept[:, 6].any()


def test_the_prediction_that_is_followed_is_that_of_the_whole_input() -> None:
    """The largest logit would be another one after each step."""
    model, x = nn.Linear(2, 2, bias=False), torch.tensor([[1.0, 1.0]])
    model.weight.data = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])
    found = curve(model, x, given(torch.tensor([[1.0, 0.0]])), shares=(0.0, 0.5, 1.0))
    assert found.most.tolist() == [[2.0, 0.0, 0.0]]  # class 1 has 1 in the middle


@pytest.mark.slow
def test_other_targets_and_the_parts_of_several_inputs() -> None:
    model, batch = build("t5"), batch_for("t5")
    names = ["input_ids", "decoder_input_ids"]
    found = curve(model, batch, "attnlrp", inputs=names, target=LogitDifference(5, [7, 9]), shares=SHARES)
    one = curve(model, batch, "attnlrp", target=LogitDifference(5, [7, 9]), shares=SHARES)
    assert found.most.shape == one.most.shape == (2, 3)
    torch.testing.assert_close(found.most[:, 0], one.most[:, 0])
    assert not torch.allclose(found.most[:, -1], one.most[:, -1])
    whole = curve(model, batch, "attnlrp", target=lambda model, batch: Logit(5)(model, batch), shares=SHARES)
    by_sample = curve(model, batch, "attnlrp", target=5, shares=SHARES)
    torch.testing.assert_close(whole.most[0], by_sample.most.mean(0), rtol=1e-4, atol=1e-6)


def test_features_and_time_steps_are_positions() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    model, x = Last(), torch.randn(2, 5, 3)
    found = curve(model, x, given(torch.arange(5.0).expand(2, 5)), shares=(0.0, 0.4, 1.0), target=1)
    changed = x.clone()
    changed[:, 3:] = 0
    torch.testing.assert_close(found.most[:, 1].float(), model(changed)[:, 1].detach())


def test_the_model_is_as_it_was() -> None:
    model, batch = build("llama").train(), batch_for("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    curve(model, batch, "attnlrp")
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shares": (0.0, 0.5)}, "shares must go from 0 to 1"),
        ({"baseline": "noise"}, "baseline must be one of"),
        ({"baseline": "blur"}, "for images"),
        ({"inputs": ["pixel_values"]}, "no relevance of pixel_values: the model is given input_ids"),
        ({"relevance": given(torch.zeros(2, 3))}, r"must be \[2, 7\]"),
        ({"relevance": given(None)}, "relevance must be a tensor"),
        ({"relevance": "nothing"}, "composite must be one of"),
        ({"target": 500}, "answer 500 is none"),
        ({"target": [1, 2, 3]}, "3 answers for 2 samples"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], said: str) -> None:
    model, batch = build("llama"), batch_for("llama")
    with pytest.raises(ValueError, match=said):
        perturbation_curve(model, [batch], **{"relevance": "gradient", "progress": False, **options})


def test_no_batches_are_refused_and_one_is_no_list() -> None:
    with pytest.raises(ValueError, match="no batches"):
        perturbation_curve(nn.Linear(2, 2), [], progress=False)
    with pytest.raises(ValueError, match=r"pass \[batch\]"):
        perturbation_curve(nn.Linear(2, 2), torch.zeros(1, 2), progress=False)
    with pytest.raises(ValueError, match="more samples"):
        curve(nn.Linear(2, 2), torch.ones(1, 2), "gradient", baseline="mean")


@pytest.mark.slow
def test_it_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    found = curve(nn.Linear(6, 3), torch.randn(5, 6), "gradient")
    figure = found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    both = plot_curves({"worse": PerturbationCurve(found.shares, found.least, found.most), "better": found})
    labels = [text.get_text() for text in both.legends[0].get_texts()]
    assert labels[0].startswith("better: ") and labels[1].startswith("worse: -")
    first = figure.axes[0].lines[0].get_ydata()
    assert list(first) == pytest.approx(found.most.mean(0).tolist())
    assert found.to_dict()["area"] == found.area and "most relevant first" in str(found)


def test_padding_is_not_replaced_also_where_the_model_looks_at_it() -> None:
    class WithoutMask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2, bias=False)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.embed(input_ids).sum(1))

    model, ids = WithoutMask(), torch.arange(1, 6).expand(1, 5)
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1, 1]])}
    found = curve(model, batch, "gradient", target=1, shares=SHARES)
    left = model.head(model.embed(ids[:, :2]).sum(1))[0, 1].item()
    assert found.most[0, -1].item() == pytest.approx(left, abs=1e-5)
    assert found.least[0, -1].item() == pytest.approx(left, abs=1e-5)


def test_a_blurred_point_fades_with_its_distance() -> None:
    image = torch.zeros(1, 1, 33, 33)
    image[0, 0, 16, 16] = 1
    row = replaced(image, torch.ones(1, 1, dtype=torch.bool), "blur", patch=33)[0, 0, 16, 16:23]
    assert bool((row.diff() < 0).all())


def test_buffers_that_a_forward_writes_are_as_they_were() -> None:
    model = Counting()
    curve(model, torch.randn(5, 6), "gradient")
    assert not model.runs.any()


def test_nodes_of_several_graphs_have_no_positions_which_is_said() -> None:
    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nodes, self.last = nn.Embedding(7, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, batch: Tensor) -> Tensor:
            pooled = torch.zeros(2, 4, device=x.device).index_add(0, batch, self.nodes(x))
            return self.last(pooled)

    batch = {"x": torch.arange(6), "batch": torch.arange(6) // 3, "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=r"'x' has shape \(6,\), and no positions within samples.*inputs="):
        perturbation_curve(Graphs(), [batch], target="class", progress=False)
