"""A word-level tokenizer and small models with planted circuits, of which everything is computed by hand."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from lrp_prune.tasks import TableTask


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words; anything else is unknown."""
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["[UNK]", *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


WORDS = ["x", "y", "yes", "no", "pad"]
X, Y, YES, NO = 1, 2, 3, 4


class PlantedNeurons(nn.Module):
    """Neuron ``j`` is ``x[j]`` after the word "x" and ``y[j]`` after "y"; it adds ``c[j]`` to yes minus no.

    So with the kept neurons ``K`` the logit difference in a prompt of "x" is ``sum(K: c x) + sum(not K: c r)`` with the
    replacement ``r``: ``y`` (counterfactual "y"), 0 (zero), ``y`` (mean over counterfactuals of one token).
    """

    def __init__(self, x: Sequence[float], y: Sequence[float], c: Sequence[float], frozen: bool = False) -> None:
        super().__init__()
        units, words = len(x), len(WORDS) + 1
        self.embed = nn.Embedding(words, words)
        self.up = nn.Linear(words, units, bias=False)
        self.act = nn.ReLU()
        self.down = nn.Linear(units, words)
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(words))
            self.up.weight.zero_()
            self.up.weight[:, X], self.up.weight[:, Y] = torch.tensor(x), torch.tensor(y)
            self.down.weight.zero_()
            self.down.weight[YES] = torch.tensor(c)
            self.down.bias.zero_()
        self.requires_grad_(not frozen)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        return hidden + self.down(self.act(self.up(hidden)))


class PlantedHeads(nn.Module):
    """Heads of two channels that attend to all positions alike; then an MLP of neurons, both onto the residual stream.

    In a prompt of equal words, head ``h``'s first channel is ``x[h]`` (or ``y[h]``), its second half of that; the projection
    adds ``c[h]`` times the first and nothing of the second, and 1/4 by its bias, to yes minus no. There are two MLP neurons:
    the first reads "x" and adds 1, the other does nothing.
    """

    def __init__(self, x: Sequence[float], y: Sequence[float], c: Sequence[float]) -> None:
        super().__init__()
        self.heads, words = len(x), len(WORDS) + 1
        self.embed = nn.Embedding(words, words)
        self.q, self.k, self.v = (nn.Linear(words, 2 * self.heads, bias=False) for _ in range(3))
        self.o = nn.Linear(2 * self.heads, words)
        self.up, self.down = nn.Linear(words, 2, bias=False), nn.Linear(2, words, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            self.embed.weight.copy_(torch.eye(words))
            for head in range(self.heads):
                self.v.weight[2 * head, X], self.v.weight[2 * head, Y] = x[head], y[head]
                self.v.weight[2 * head + 1] = self.v.weight[2 * head] / 2
                self.o.weight[YES, 2 * head] = c[head]
            self.o.bias[YES] = 0.25
            self.up.weight[0, X], self.down.weight[YES, 0] = 1.0, 1.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        batch, tokens, _ = hidden.shape
        q, k, v = (
            layer(hidden).view(batch, tokens, self.heads, 2).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1)
        hidden = hidden + self.o(mixed)
        return hidden + self.down(F.relu(self.up(hidden)))


class Twice(nn.Module):
    """The same MLP runs twice, as in models that share layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 5)
        self.mlp = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))
        self.head = nn.Linear(5, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embed(input_ids)
        for _ in range(2):
            hidden = hidden + self.mlp(hidden)
        return self.head(hidden)


def planted_task(prompts: int = 2, metric: str = "logit_difference", length: int = 1) -> TableTask:
    """Prompts of "x" words, counterfactual "y"; yes rather than no."""
    row = {"clean": "x " * length, "counterfactual": "y " * length, "answers": " yes", "distractors": " no"}
    return TableTask(word_tokenizer(WORDS), [row] * prompts, metric)


class Redundant(nn.Module):
    """yes = 1 - relu(1 - a - b - c) of neurons a, b, c: it is saturated, and the largest alone suffices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = (
            nn.Embedding(6, 1),
            nn.Linear(1, 3, bias=False),
            nn.Linear(3, 6, bias=False),
        )
        with torch.no_grad():
            self.embed.weight.zero_()
            self.embed.weight[1] = 1.0
            self.up.weight.copy_(torch.tensor([[1.0], [0.9], [0.1]]))
            self.down.weight.zero_()
            self.down.weight[3] = torch.tensor([1.0, 1.0, 1.0])

    def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> torch.Tensor:
        written = self.down(torch.relu(self.up(self.embed(input_ids))))
        return 1 - torch.relu(1 - written)
