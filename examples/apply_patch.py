"""Applies a patch that was made on another machine to a fresh model, generates with it, and saves the corrected model.

The file is kilobytes; it names the entries, their values before and the model it was made for, and is refused by any other.
`correct_repetition.py` and `correct_toxicity.py` write such files.
"""

import argparse
from pathlib import Path

import torch
from command_line import add_patch, parser
from language_model import load_model
from presenting import quiet
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lrp_prune import Patch


def parse() -> argparse.Namespace:
    given = parser(__doc__)
    add_patch(given)
    given.add_argument("--prompt", default="In the 1950's we helped to contain", help="what is continued")
    given.add_argument("--output", type=Path, default=Path("outputs/corrected"), help="folder for the corrected model")
    return given.parse_args()


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Continues a prompt by the model's ordinary, greedy `generate`."""
    given = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**given, max_new_tokens=50, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(output[0, given["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    options = parse()
    quiet()
    model, tokenizer = load_model(options.model)
    print("before:", answer(model, tokenizer, options.prompt))

    patch = Patch.load(options.patch)
    strength = patch.provenance.get("strength", 1.0) if options.strength is None else options.strength
    patch.apply_(model, strength)  # refused, with nothing changed, if the model is another one
    print(f"\n{patch} at strength {strength:g}")
    print("after:", answer(model, tokenizer, options.prompt))

    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    loaded = AutoModelForCausalLM.from_pretrained(options.output)
    same = all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    print(f"\nsaved to {options.output}; loaded again it is {'the same' if same else 'DIFFERENT'}")

    patch.revert_(model)
    print("reverted:", answer(model, tokenizer, options.prompt))


if __name__ == "__main__":
    main()
