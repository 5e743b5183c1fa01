import re

import correct_behaviour
import pytest
from behaviours import BEHAVIOURS, Example

from lrp_prune import Patch
from tests.support.patches import unchanged, weights
from tests.support.small_models import build


class Letters:
    """A tokenizer of ids that are below the tiny model's vocabulary, with a template for chats."""

    all_special_ids = ()
    chat_template = "there is one"

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) % 40 + 3 for character in text]}

    def __len__(self):
        return 50

    def decode(self, ids, **options):
        return " ".join(f"w{token}" for token in ids)

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        return f"<{chat[0]['content']}>"


def run(monkeypatch, tmp_path, model, *given):
    prompts = [f"{number} {chr(97 + number) * 3}" for number in range(12)]
    monkeypatch.setitem(BEHAVIOURS, "apology", Example(prompts, [f"{prompt}?" for prompt in prompts], r"w\d*[2-6]\b"))
    monkeypatch.setattr(correct_behaviour, "load_model", lambda _: (model, Letters()))
    sizes = ["--windows", "2", "--length", "16", "--samples", "4", "--random", "1", "--answer-tokens", "6"]
    sizes += ["--amounts", "0.05", "0.3", "--strengths", "1", "--allowed", "*=9", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["correct_behaviour.py", *sizes, *given])
    correct_behaviour.main()


@pytest.mark.slow
@pytest.mark.parametrize("way", [[], ["--lightning"]])
def test_the_report_the_patch_and_examples_are_written(monkeypatch, tmp_path, capsys, way):
    model = build("llama")
    model.generation_config.eos_token_id = None
    before = weights(model)
    run(monkeypatch, tmp_path, model, "--reduction", "0.000001", *way)
    printed = capsys.readouterr().out
    assert "prompts to test on draw it" in printed
    assert "  before: w" in printed
    report = (tmp_path / "report.md").read_text()
    assert "| wanted answers " in report or "none of 2 trials" in report
    assert (tmp_path / "frontier.png").stat().st_size > 5000
    if "within all limits" in report:
        assert Patch.load(tmp_path / "patch.safetensors").behaviour == "apology"
        assert "  after : w" in printed
    assert unchanged(model, before)


def test_behaviours_have_prompts_of_their_own_and_patterns_that_part_answers():
    shown = {"apology": "I'm sorry for any confusion, but I am a chatbot.", "praise": "This is a beautiful poem."}
    assert set(shown) == set(BEHAVIOURS)
    for name, (undesired, wanted, shows) in BEHAVIOURS.items():
        assert len(set(undesired)) == len(undesired) >= 40
        assert len(set(wanted)) >= 12
        assert not set(undesired) & set(wanted)
        assert re.search(shows, shown[name])
        assert not re.search(shows, "The capital of France is Paris.")


def test_questions_are_asked_as_the_tokenizer_has_it():
    assert correct_behaviour.asked(Letters(), ["Why?"]) == ["<Why?>"]
    assert correct_behaviour.asked(object(), ["Why?"]) == ["Why?\n"]


def test_a_condition_is_not_silently_left_out_of_a_validation(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correct_behaviour.py", "--lightning", "--at", "model.layers.0"])
    with pytest.raises(SystemExit):
        correct_behaviour.parse()
    assert "--at is not for --lightning" in capsys.readouterr().err


def test_every_option_is_explained(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["correct_behaviour.py", "--help"])
    with pytest.raises(SystemExit):
        correct_behaviour.parse()
    text = capsys.readouterr().out
    for option in ("--behaviour", "--amounts", "--allowed", "--lightning"):
        assert f"{option} " in text
