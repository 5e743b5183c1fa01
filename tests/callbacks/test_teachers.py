"""Teachers that would move with their students, or be pruned with them, are refused."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lrp_prune.callbacks import Distillation, RelevancePruning, Rounds


def pruning(**options) -> RelevancePruning:
    return RelevancePruning(0.5, Rounds(1, start=1), method="magnitude", **options)


@pytest.mark.parametrize("share", ["itself", "a part", "its values"])
def test_a_teacher_that_moves_with_its_student_is_refused(make_module, make_loader, make_trainer, share: str) -> None:
    module, other = make_module(), make_module(seed=3)
    if share == "a part":
        other.net[4] = module.net[4]
    elif share == "its values":
        other.net[4].weight.data = module.net[4].weight.data
    teacher = module if share == "itself" else other
    with pytest.raises(MisconfigurationException, match=r"teacher= shares net\.[4*].* which are trained.*deepcopy"):
        fitted = make_trainer(callbacks=[pruning(), Distillation(teacher=teacher)], max_epochs=3)
        fitted.fit(module, make_loader(), make_loader(seed=2))
    assert not module.zeros_after_step


def test_frozen_parameters_may_be_a_teachers_as_long_as_they_are_not_pruned(
    make_module, make_loader, make_trainer
) -> None:
    module, teacher = make_module("sgd"), make_module(seed=3)
    teacher.net[0] = module.net[0].requires_grad_(False)
    callbacks = [pruning(), Distillation(teacher=teacher)]
    make_trainer(callbacks=callbacks, max_epochs=3).fit(module, make_loader(), make_loader(seed=2))
    assert callbacks[0].round
    with pytest.raises(
        MisconfigurationException, match=r"teacher= shares net.0.weight .* which are going to be pruned"
    ):
        make_trainer(callbacks=[pruning(include=["*weight"]), Distillation(teacher=teacher)], max_epochs=3).fit(
            module, make_loader(), make_loader(seed=2)
        )
    assert module.net[0].weight.all()
