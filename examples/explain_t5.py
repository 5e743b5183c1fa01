"""Explains an encoder-decoder on both of its sides: a T5 that says which word of a sentence is written in capitals.

It is trained here, on sentences from a few words, in about a minute. What its decoder says is explained token by token: the word,
from the encoder's side, and then the end, from what the decoder has said itself.
"""

import argparse
import random
from pathlib import Path

import torch
from presenting import progress, quiet, stage
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import lrp_prune

NOUNS = "fox dog cat house tree river king queen horse bird table garden".split()
OTHERS = "the a saw found near behind lost and old young red small with".split()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=600, help="of training, with 64 sentences each")
    add("--seed", type=int, default=0, help="of the model and the sentences")
    add("--output", type=Path, default=Path("outputs/explain_t5"), help="folder for pages and figures")
    return parser.parse_args()


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    """Each word is a token, in small letters or in capitals."""
    words = ["<pad>", "</s>", *OTHERS, *NOUNS, *(noun.upper() for noun in NOUNS)]
    made = Tokenizer(models.WordLevel({f"▁{word}": number for number, word in enumerate(words)}, unk_token="▁<pad>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="▁<pad>", eos_token="▁</s>")


def sentences(number: int, chance: random.Random) -> tuple[list[str], list[str]]:
    """Sentences in which one noun is in capitals, and these nouns."""
    texts, answers = [], []
    for _ in range(number):
        nouns = chance.sample(NOUNS, 4)
        marked = chance.randrange(4)
        words: list[str] = []
        for place, noun in enumerate(nouns):
            words += chance.sample(OTHERS, chance.randrange(1, 4))
            words.append(noun.upper() if place == marked else noun)
        texts.append(" ".join(words))
        answers.append(nouns[marked])
    return texts, answers


def batch_of(tokenizer: PreTrainedTokenizerFast, texts: list[str], answers: list[str]) -> dict[str, Tensor]:
    """Sentences, padded, and as labels the word and the end."""
    given = tokenizer(texts, return_tensors="pt", padding=True)
    labels = tokenizer([f"{answer} </s>" for answer in answers], return_tensors="pt").input_ids
    return {"input_ids": given.input_ids, "attention_mask": given.attention_mask, "labels": labels}


def trained(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> T5ForConditionalGeneration:
    """A small T5, from nothing."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    config = T5Config(
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        vocab_size=len(tokenizer),
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=max(steps, 10))
    for _ in progress(range(steps), "training"):
        optimizer.zero_grad()
        model(**batch_of(tokenizer, *sentences(64, chance))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def main() -> float:
    options = parse()
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of_words()
    stage(f"training a T5 for {options.steps} steps")
    model = trained(tokenizer, options.steps, options.seed)
    texts, answers = sentences(64, random.Random(options.seed + 1000))
    batch = batch_of(tokenizer, texts, answers)
    with torch.no_grad():
        right = float((model(**batch).logits[:, 0].argmax(-1) == batch["labels"][:, 0]).float().mean())
    print(f"it says the right word of {right:.0%} of new sentences")

    stage("the first token that it says")
    said = lrp_prune.explain(model, texts[:3], tokenizer=tokenizer)
    print(said)
    said.html(options.output / "word.html")
    said.plot(options.output / "word.png")

    stage("the second, the end of the answer")
    ended = {**{name: value[:3] for name, value in batch.items()}}
    end = lrp_prune.explain(model, ended, tokenizer=tokenizer)
    print(end)
    end.html(options.output / "end.html")
    end.plot(options.output / "end.png")

    stage("whether that can be trusted")
    report = lrp_prune.audit(model, batch)
    print(report)
    report.plot(options.output / "audit.png")
    print(f"\npages and figures are in {options.output}")
    return right


if __name__ == "__main__":
    main()
