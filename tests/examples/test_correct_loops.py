import json

import correct_loops
import pytest
import torch

from lrp_prune.correction import ConditionalPatch, load_patch
from tests.support.conditions import LAST_DOWN, LAST_UP, last_layer_patch
from tests.support.patches import UP, unchanged, weights
from tests.support.small_models import build


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary."""

    all_special_ids = (0,)

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}

    def __len__(self):
        return 50

    def decode(self, ids, **options):
        return "".join(chr(97 + token % 26) for token in ids)


@pytest.mark.slow
def test_a_patch_is_put_under_a_condition_and_tested_on_other_prompts(monkeypatch, tmp_path, capsys):
    model, letters = build("llama"), "abcdefghijklmnopqrstuvwxyz"
    before = weights(model)
    speeches = [". ".join(letters[n:] + letters[:n] + end for n in range(26)) for end in ("one", "two", "six", "ten")]
    monkeypatch.setattr(correct_loops, "load_model", lambda _: (model, Letters()))
    monkeypatch.setattr(correct_loops, "load_documents", lambda _: speeches)
    everywhere = last_layer_patch(model) | type(last_layer_patch(model)).from_positions(model, {UP: torch.arange(4)})
    everywhere.save(tmp_path / "everywhere.safetensors")
    sizes = "--windows 2 --length 24 --samples 4 --test-windows 2 --test-samples 4"
    sizes += " --candidates 6 --everyday 4 --test-candidates 4 --test-everyday 4 --answer-tokens 8"
    options = ["--layer", "0", "--repetitive", "1", "--seeds", "2", "--allowed", "*=9", "--output", str(tmp_path)]
    monkeypatch.setattr(
        "sys.argv", ["correct_loops.py", str(tmp_path / "everywhere.safetensors"), *sizes.split(), *options]
    )
    correct_loops.main()
    printed = capsys.readouterr().out
    patch = load_patch(tmp_path / "loops.safetensors")
    assert isinstance(patch, ConditionalPatch)
    assert set(patch) == {LAST_UP, LAST_DOWN}
    shares = patch.condition.shares
    assert max(share for name, share in shares.items() if name != "undesired") <= 0.15
    assert shares["contexts of facts"] <= 0.02
    assert "copying" in shares
    assert patch.provenance["side_effects"]["verdict"] in printed
    assert (tmp_path / "reach.md").read_text() in printed
    assert (tmp_path / "reach.md").read_text().count("| everyday sentences") == 2
    assert unchanged(model, before)
    assert patch.strength_in(model) == 0

    # Answers of the uncorrected model are kept, and are those of these prompts.
    kept = json.loads((tmp_path / "answers.json").read_text())
    assert len(kept) == 2 + 2 * 2
    monkeypatch.setattr(correct_loops, "generate", lambda *_: pytest.fail("generated again"))
    prompts = {key.rsplit(" 8 ")[1]: each["prompts"] for key, each in kept.items()}
    again = correct_loops.answered(model, prompts, correct_loops.parse())
    assert [answers for _, answers in again.values()] == [each["answers"] for each in kept.values()]


def test_everyday_sentences_of_two_halves_share_nothing_but_small_words():
    first, second = (correct_loops.everyday_beginnings(half, 64, seed=3) for half in (0, 1))
    assert len(set(first)) == len(set(second)) == 64
    assert not set(first) & set(second)
    assert correct_loops.everyday_beginnings(1, 64, seed=4) != second
