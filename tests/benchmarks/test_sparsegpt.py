import torch
from torch import nn

from tests.benchmarks import sparsegpt
from tests.support.small_models import llama


def layer_problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs with strongly correlated columns of different scale."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1.5, 96)[torch.randperm(96, generator=generator)]
    mixing = torch.randn(96, 96, generator=generator) * scales
    inputs = torch.randn(512, 96, generator=generator) @ mixing
    return torch.randn(64, 96, generator=generator), inputs


def reconstruction_error(dense: torch.Tensor, pruned: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (dense - pruned).T).square().sum() / (inputs @ dense.T).square().sum())


def test_sparsegpt_reconstructs_better_than_wanda_and_magnitude():
    dense, inputs = layer_problem()
    gram = inputs.T @ inputs
    errors = {}
    for name in ("sparsegpt", "wanda", "magnitude"):
        weight = dense.clone()
        if name == "sparsegpt":
            sparsegpt.sparsegpt_(weight, gram, 0.5, block=32)
        else:
            sparsegpt.wanda_(weight, gram if name == "wanda" else torch.eye(96), 0.5)
        assert int((weight == 0).sum()) == weight.numel() // 2, name
        errors[name] = reconstruction_error(dense, weight, inputs)
    assert errors["sparsegpt"] < 0.7 * errors["wanda"], errors
    assert errors["wanda"] < errors["magnitude"], errors


def test_one_column_is_pruned_as_the_closed_form_says():
    """Removing column 0 alone: the others must become the least squares solution for what the layer put out before."""
    dense, inputs = layer_problem()
    inputs = inputs.double()
    mask = torch.ones_like(dense, dtype=torch.bool)
    mask[:, 0] = False
    weight = dense.double()
    sparsegpt.sparsegpt_(weight, inputs.T @ inputs, 0.0, mask=mask, block=32, damping=0.0)
    best = torch.linalg.lstsq(inputs[:, 1:], inputs @ dense.double().T).solution.T
    assert torch.equal(weight[:, 0], torch.zeros(64, dtype=torch.float64))
    torch.testing.assert_close(weight[:, 1:], best, rtol=1e-6, atol=1e-8)


def test_lazy_blocks_change_nothing_but_the_order_of_the_work():
    dense, inputs = layer_problem()
    mask = torch.rand(dense.shape) > 0.5
    results = []
    for block in (8, 96):
        weight = dense.clone()
        sparsegpt.sparsegpt_(weight, inputs.T @ inputs, 0.0, mask=mask, block=block)
        results.append(weight)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_patterns_keep_the_best_of_each_group():
    dense, inputs = layer_problem()
    gram = inputs.T @ inputs
    errors = {}
    for name in ("sparsegpt_", "wanda_", "ria_"):
        weight = dense.clone()
        kept = getattr(sparsegpt, name)(weight, gram, 0.0, pattern=(2, 4))
        assert torch.equal(kept.unflatten(1, (-1, 4)).sum(2), torch.full((64, 24), 2)), name
        assert torch.equal(weight != 0, kept), name
        errors[name] = reconstruction_error(dense, weight, inputs)
    assert errors["sparsegpt_"] < 0.8 * errors["wanda_"], errors
    free = dense.clone()
    sparsegpt.sparsegpt_(free, gram, 0.5)
    assert reconstruction_error(dense, free, inputs) < errors["sparsegpt_"]


def test_ria_is_its_formula():
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    gram = torch.tensor([[16.0, 0.0], [0.0, 1.0]])
    # Relative importance: 1/3 + 1/4, 2/3 + 2/6, 3/7 + 3/4, 4/7 + 4/6; times 2 in the first column, whose inputs have norm 4.
    # 7/6, 1, 33/14, 26/21: the second is the smallest, then the first.
    assert sparsegpt.ria_(weight.clone(), gram, 0.25).tolist() == [[True, False], [True, True]]
    assert sparsegpt.ria_(weight.clone(), gram, 0.5).tolist() == [[False, False], [True, True]]


def test_block_by_block_feeds_each_block_with_the_pruned_blocks_before_it():
    model = llama(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    ).eval()
    ids = torch.randint(0, 50, (3, 16))
    grams = {}

    def solve(name: str, linear: nn.Linear, gram: torch.Tensor) -> None:
        grams[name] = gram.clone()
        sparsegpt.wanda_(linear.weight, gram, 0.5)

    sparsegpt.block_by_block(model, ids, solve)
    assert set(grams) == {n for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    seen = []
    last = model.model.layers[1]
    last.self_attn.q_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(input_ids=ids)
    inputs = seen[0].flatten(0, 1)
    torch.testing.assert_close(grams["model.layers.1.self_attn.q_proj.weight"], inputs.T @ inputs, rtol=1e-4, atol=1e-4)
