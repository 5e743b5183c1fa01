"""Takes a behaviour of one's own away from a language model, and shows what that does and costs.

Two sets of prompts and a regular expression say what is meant (`behaviours.py` has some of SmolLM2): prompts that draw the
behaviour and prompts whose answers are to stay. The patch is found with one half of them, chosen by the worst of what it does
besides, and tested on the other half. With `--lightning` a validation does the same by the callback `ContrastiveCorrection`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from behaviours import BEHAVIOURS
from command_line import (
    EVERYWHERE,
    add_condition,
    add_model,
    add_search,
    add_suite,
    check_place,
    condition,
    limits,
    parser,
)
from language_model import load_model
from lightning.pytorch import Trainer
from presenting import quiet, stage
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lrp_prune import CorrectedModule
from lrp_prune.callbacks import ContrastiveCorrection
from lrp_prune.correction import Automatic, Behaviour, Corrected, correct
from lrp_prune.effects import Shown
from lrp_prune.effects.generating import greedy
from lrp_prune.metrics import Suite


def parse() -> argparse.Namespace:
    given = parser(__doc__)
    add = given.add_argument
    add("--behaviour", choices=list(BEHAVIOURS), default="apology", help="which of behaviours.py")
    add_model(given)
    add("--answer-tokens", type=int, default=24, help="tokens generated for each prompt")
    add("--reduction", type=float, default=0.5, help="wanted reduction of the share of answers that show it")
    add_search(given, [0.000003, 0.00001, 0.00005], [0.5])
    add_condition(given)
    add_suite(given, windows=3, length=128, samples=16, allowed=["*=0.02", "copying=0.35"])
    add("--lightning", action="store_true", help="by a Lightning validation instead of a call")
    add("--output", type=Path, default=Path("outputs/behaviour"), help="folder for the patch, the report and figures")
    options = given.parse_args()
    if options.lightning and options.at != EVERYWHERE:
        given.error("--at is not for --lightning: the callback's patches act everywhere")
    return options


def asked(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[str]:
    """Questions in the words of a chat, where the tokenizer has a template for one."""
    if not getattr(tokenizer, "chat_template", None):
        return [f"{question}\n" for question in questions]
    chats = [[{"role": "user", "content": question}] for question in questions]
    return [str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in chats]


def in_a_validation(
    model: PreTrainedModel, behaviour: Behaviour, halves: tuple[Suite, Suite], automatic: Automatic
) -> Corrected:
    """What `correct` does, by a callback; the loader is what the validation is of, and plays no part here."""
    correction = ContrastiveCorrection(**behaviour.for_callback(halves), amount=automatic)
    loader = DataLoader(behaviour.batches, batch_size=None)
    trainer = Trainer(callbacks=[correction], logger=False, enable_checkpointing=False, enable_progress_bar=False)
    corrected = CorrectedModule(model)
    trainer.validate(corrected, loader, verbose=False)
    for name in corrected.patches:
        corrected.disable(name)
    assert correction.search is not None
    return Corrected(behaviour, correction.search, correction.side_effects, halves[1].allowed)


def shown_examples(
    model: PreTrainedModel, tokenizer: Any, found: Corrected, said: Callable[[str], str] = str, count: int = 4
) -> None:
    """Answers to a few held-out prompts before and after, or what is to be said of each text."""
    tested = found.behaviour.tested
    assert isinstance(tested, Shown)
    prompts = [prompt for part in tested.parts for prompt in part][:count]
    with torch.no_grad():
        answers = [greedy(model, prompts, tested.tokens)]
        if found.patch is not None:
            found.patch.apply_(model, found.patch.provenance["strength"])
            answers.append(greedy(model, prompts, tested.tokens))
            found.patch.revert_(model)
    for row in zip(prompts, *answers, strict=True):
        prompt, *texts = (said(" ".join(tokenizer.decode(ids, skip_special_tokens=True).split())) for ids in row)
        for when, text in zip(("before", "after "), texts, strict=False):
            print(f"> {prompt}\n  {when}: {text}" if when == "before" else f"  {when}: {text}")


def main() -> None:
    options = parse()
    quiet()
    stage(f"loading {options.model} and texts")
    model, tokenizer = load_model(options.model)
    check_place(options, model)
    sizes = {"windows": options.windows, "length": options.length, "samples": options.samples}
    halves = Suite.halves(tokenizer, **sizes, seed=options.seed, allowed=limits(options.allowed))

    stage(f"looking for prompts that draw {options.behaviour}")
    undesired, wanted, shows = BEHAVIOURS[options.behaviour]
    behaviour = Behaviour.from_prompts(
        model,
        tokenizer,
        asked(tokenizer, undesired),
        shows,
        wanted=asked(tokenizer, wanted),
        name=options.behaviour,
        answer_tokens=options.answer_tokens,
    )
    print(behaviour, flush=True)

    stage("searching and testing a patch")
    automatic = Automatic(options.reduction, None, options.amounts, options.strengths)
    if options.lightning:
        found = in_a_validation(model, behaviour, halves, automatic)
    else:
        found = correct(
            model,
            behaviour,
            halves,
            automatic=automatic,
            condition=condition(options),
            guard=options.guard,
            random=options.random,
            seed=options.seed,
        )
    found.save(options.output)
    stage(f"results (report.md, figures and the patch are in {options.output})")
    print(found)
    shown_examples(model, tokenizer, found)


if __name__ == "__main__":
    main()
