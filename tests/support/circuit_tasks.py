"""A task of token ids for the tiny models of :mod:`small_models`."""

from lrp_prune.tasks import TableTask


def numbers(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer whose words are token ids."""
    return {"input_ids": [int(word) for word in text.split()]}


def small_task() -> TableTask:
    """Three prompts of two lengths."""
    return TableTask(
        numbers,
        [
            {"clean": "5 6 7 8 9", "counterfactual": "5 6 17 8 9", "answers": " 11", "distractors": " 12"},
            {"clean": "15 6 27 8 9", "counterfactual": "15 6 17 8 9", "answers": " 21", "distractors": [" 22", " 23"]},
            {"clean": "15 6 9", "counterfactual": "15 16 9", "answers": " 31", "distractors": " 32"},
        ],
    )
