import add_a_callback
import pytest

from lrp_prune.callbacks import RelevancePruning


@pytest.mark.slow
def test_one_added_callback_prunes_and_the_accuracy_stays():
    _, dense = add_a_callback.train([], epochs=8, seed=0)
    pruning = RelevancePruning(sparsity=0.7, rounds=3)
    module, pruned = add_a_callback.train([pruning], epochs=8, seed=0)
    weights = [module.layers[index].weight for index in (0, 2, 4)]
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.7 * sum(w.numel() for w in weights))
    assert dense > 0.9
    assert pruned > dense - 0.05
