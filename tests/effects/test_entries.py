"""Each kind of entry against an independent computation."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lrp_prune.effects import Answers, Choice, Entry, Likelihood, Losses, Measured, Shown
from lrp_prune.effects.answers import STOP_WORDS
from lrp_prune.effects.generating import greedy
from lrp_prune.tasks import TableTask
from tests.support.small_models import build


def ids(samples: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (samples, tokens), generator=torch.Generator().manual_seed(seed))


def measured(entry, model, before=None):
    found = [
        entry.measure(model, part, None if before is None else before[index], keep=True)
        for index, part in enumerate(entry.parts)
    ]
    return [values for values, _ in found], [kept for _, kept in found]


def test_likelihood_counts_labelled_tokens_as_the_model_predicts_them() -> None:
    model, tokens = build("llama"), ids(3, 9)
    labels = tokens.clone()
    labels[0, :5], labels[2, 4] = -100, -100
    with torch.no_grad():
        ((values,), _) = measured(Likelihood([{"input_ids": tokens, "labels": labels}]), model)
        log_p = model(input_ids=tokens).logits.log_softmax(-1)
    for row in range(3):
        places = [place for place in range(1, 9) if labels[row, place] != -100]
        expected = -sum(float(log_p[row, place - 1, tokens[row, place]]) for place in places)
        assert values[""].counts[row] == len(places)
        assert float(values[""].totals[row]) == pytest.approx(expected, rel=1e-5)


def test_padding_neither_counts_nor_changes_what_does() -> None:
    model, tokens = build("llama"), ids(2, 8)
    padding, real = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        plain, _ = measured(Likelihood([tokens]), model)
        for order in (1, -1):  # on the right, and on the left
            ids_, mask = (torch.cat(parts[::order], 1) for parts in ((tokens, padding), (real, padding)))
            padded, _ = measured(Likelihood([{"input_ids": ids_, "attention_mask": mask}]), model)
            assert torch.equal(plain[0][""].counts, padded[0][""].counts)
            torch.testing.assert_close(plain[0][""].totals, padded[0][""].totals)


def test_the_divergence_is_that_of_the_counted_places() -> None:
    model, other, tokens = build("llama"), build("llama"), ids(2, 7)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
        labels = tokens.clone()
        labels[1, :4] = -100
        entry = Likelihood([{"input_ids": tokens, "labels": labels}])
        _, before = measured(entry, model)
        same, _ = measured(entry, model, before)
        changed, _ = measured(entry, other, before)
        first, second = (each(input_ids=tokens).logits.log_softmax(-1) for each in (model, other))
    kl = F.kl_div(second, first, log_target=True, reduction="none").sum(-1)[:, :-1]
    expected = torch.stack([kl[0].sum(), kl[1, 3:].sum()]).double()
    torch.testing.assert_close(changed[0][""].divergence, expected, rtol=1e-4, atol=1e-6)
    assert float(same[0][""].divergence.abs().max()) == 0


def test_a_choice_is_that_between_answers_and_distractors() -> None:
    vocabulary = "the cat dog says meow woof purr".split()

    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [vocabulary.index(word) + 5 for word in text.split()]}

    rows = [
        {
            "clean": "the cat says",
            "counterfactual": "the dog says",
            "answers": [" meow", " purr"],
            "distractors": " woof",
        },
        {"clean": "the dog says", "counterfactual": "the cat says", "answers": " woof", "distractors": " meow"},
    ]
    model = build("llama")
    entry = Choice(TableTask(tokenizer, rows))
    with torch.no_grad():
        ((values,), _) = measured(entry, model)
        for row, (prompt, right, wrong) in enumerate((([5, 6, 8], [9, 11], [10]), ([5, 7, 8], [10], [9]))):
            p = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
            expected = -torch.log(p[right].sum() / (p[right].sum() + p[wrong].sum()))
            assert float(values[""].totals[row]) == pytest.approx(float(expected), rel=1e-5)
    assert values[""].counts.tolist() == [1, 1]


def test_words_of_answers_are_counted() -> None:
    texts = {1: "The cat, the dog and the CAT.", 2: "Nobody's here", 3: ""}

    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return texts[tokens[0]]

    class Fixed(nn.Module):
        def generate(self, given, **options):
            assert options["do_sample"] is False
            return torch.cat([given, torch.tensor([[1], [2], [3]])], 1)

    entry = Answers([[4, 4], [4, 5], [4, 6]], Tokenizer())
    ((values,), _) = measured(entry, Fixed())
    assert values["words"].totals.tolist() == [7, 2, 0]
    assert values["different words"].totals.tolist() == [4 / 7, 1.0, 0.0]
    assert values["different words"].counts.tolist() == [1, 1, 0]
    assert {"the", "and", "here"} <= STOP_WORDS
    assert values["stop words"].totals.tolist() == [4, 1, 0]
    assert not entry.directed


def test_prompts_of_several_lengths_are_answered_as_each_alone() -> None:
    """Padded where the model is told so; a model that is not told reads equal lengths together."""
    model = build("llama")
    model.generation_config.eos_token_id = None

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids, use_cache=False).logits

    prompts = [ids(1, length, seed=length)[0].tolist() for length in (7, 3, 5, 3)]
    with torch.no_grad():
        alone = [greedy(model, [prompt], 6)[0] for prompt in prompts]
        assert greedy(model, prompts, 6) == alone
        assert greedy(Bare(), prompts, 6) == alone


def test_a_behaviour_is_the_share_of_answers_that_show_it() -> None:
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return {(1,): "yes", (2,): "no"}[tuple(ids)]

    class Fixed(nn.Module):
        def generate(self, given, attention_mask, **options):
            return torch.cat([given, 1 + given[:, -1:] % 2], 1)

    entry = Shown([[4, 4], [4, 5], [4, 6], [7]], Tokenizer(), lambda text: text == "yes", tokens=1, batch_size=3)
    (first, second), _ = measured(entry, Fixed())
    assert sorted([*first[""].totals.tolist(), *second[""].totals.tolist()]) == [0.0, 0.0, 1.0, 1.0]
    assert entry.samples == 4
    assert not entry.directed
    assert Shown([[4]], Tokenizer(), lambda text: 0.25).judged(["yes"])[""].totals.tolist() == [0.25]
    with pytest.raises(NotImplementedError, match="Entry defines neither"):
        Entry().measure(nn.Linear(1, 1), None)


def test_greedy_answers_are_the_same_with_and_without_the_models_own_generate() -> None:
    model = build("llama")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            return self.inner(input_ids=input_ids, use_cache=False).logits

    with torch.no_grad():
        model.generation_config.eos_token_id = None
        assert greedy(Bare(), ids(3, 5), 6) == greedy(model, ids(3, 5), 6)
        answer = greedy(model, ids(1, 5), 6)[0]
        model.generation_config.eos_token_id = answer[2]
        assert greedy(model, ids(1, 5), 6)[0] == answer[: answer.index(answer[2])]


def test_answers_of_an_encoder_decoder_are_all_that_it_generates() -> None:
    model, prompts = build("bart"), ids(2, 6)
    with torch.no_grad():
        model.generation_config.eos_token_id = None
        found = greedy(model, prompts, 5)
        decoded = torch.zeros(2, 1, dtype=torch.int64)  # its start token
        for _ in range(5):
            logits = model(input_ids=prompts, decoder_input_ids=decoded).logits
            decoded = torch.cat([decoded, logits[:, -1:].argmax(-1)], 1)
    assert found == decoded[:, 1:].tolist()


def test_a_text_is_refused_for_a_model_without_logits_for_each_token() -> None:
    class Classifier(nn.Module):
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.tokens, self.embedding = tokens, nn.Embedding(50, 5)

        def forward(self, input_ids):
            logits = self.embedding(input_ids)
            return logits.mean(1) if not self.tokens else torch.cat([logits[:, : self.tokens], logits], 1)

    entry = Likelihood([ids(3, 9)])
    for tokens in (0, 2):  # a class for each text; tokens before the text, as prompt tuning has them
        with pytest.raises(ValueError, match=r"logits \[samples, tokens, vocabulary\], got .* for tokens \[3, 9\]"):
            entry.measure(Classifier(tokens), entry.parts[0])


def test_what_is_no_entry_is_refused() -> None:
    linear = nn.Linear(2, 2)
    for call, message in (
        (lambda: Likelihood([]), "at least one batch"),
        (lambda: Likelihood([{"inputs": ids(1, 2)}]), "batch 1 has no token ids"),
        (lambda: Likelihood([ids(2, 3), torch.rand(2, 3)]), "batch 2 has no token ids"),
        (lambda: Likelihood([ids(2, 1)]), "nothing to predict"),
        (lambda: Losses(lambda model: 1.0).measure(linear, None), "a loss for each sample"),
        (lambda: Answers([], object()), "at least one token"),
        (lambda: Answers([[1]], object()), "tokenizer with decode"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert isinstance(Losses(lambda model: torch.ones(2)).measure(linear, None)[0][""], Measured)
