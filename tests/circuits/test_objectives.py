"""What gates are trained for, against its definition."""

import torch

from lrp_prune.circuits.objectives import objective_value


def test_answers_are_told_from_distractors() -> None:
    """Several answers count together; what fills up rows does not count; the rest of the vocabulary does not either."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    batch = {"answers": torch.tensor([[0, 2], [5, -1]]), "distractors": torch.tensor([[1, -1, -1], [0, 3, 4]])}
    p = logits.softmax(-1)
    expected = -(
        ((p[0, 0] + p[0, 2]) / (p[0, 0] + p[0, 2] + p[0, 1])).log()
        + (p[1, 5] / (p[1, 5] + p[1, 0] + p[1, 3] + p[1, 4])).log()
    )
    value = objective_value("answers", logits, batch, logits)
    torch.testing.assert_close(value, expected / 2)
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient.isfinite().all()
    assert gradient[0, 3] == gradient[1, 1] == 0


def test_the_full_model_diverges_from_itself_by_nothing() -> None:
    logits = torch.randn(3, 5)
    batch = {"answers": torch.tensor([[0]] * 3), "distractors": torch.tensor([[1]] * 3)}
    assert objective_value("kl", logits, batch, logits).abs() < 1e-6
    assert objective_value("kl", logits, batch, torch.randn(3, 5)) > 0
