"""Beginnings of everyday sentences, as many as are asked for, in two halves that share no template and no word to fill in."""

import random
from collections.abc import Sequence

_HALVES: tuple[dict[str, Sequence[str]], dict[str, Sequence[str]]] = (
    {
        "template": (
            "When {who} came home on {day}, the {thing}",
            "{who} could not find the {thing}, so",
            "The easiest way to clean a {thing} is",
            "Last week in {place}, {who} met",
            "If the {thing} breaks again, we should",
            "Nobody told {who} that the {thing}",
            "On {day} the shop in {place}",
            "There was a {thing} under the table, and",
            "{who} has lived in {place} since",
            "Before you buy a {thing}, ask",
            "The neighbor of {who} says that",
            "Every {day}, people in {place}",
            "It took {who} a whole day to",
            "The old {thing} in the kitchen",
            "My letter to {who} began with",
            "While we waited for {who}, the {thing}",
        ),
        "who": ("my sister", "the baker", "our teacher", "Peter", "the nurse", "a young farmer", "Mrs. Hill", "my uncle"),
        "thing": ("lamp", "bicycle", "kettle", "carpet", "ladder", "radio", "suitcase", "oven"),
        "place": ("Bristol", "a small harbor", "the valley", "Vermont", "the old town", "Norway"),
        "day": ("Monday", "Thursday", "Sunday"),
    },
    {
        "template": (
            "{who} put the {thing} on the shelf and",
            "What I like about {place} is",
            "The {thing} was too heavy for {who}, because",
            "On the way to {place}, we saw",
            "You can repair a {thing} with",
            "{who} wrote in the diary that",
            "By {day} evening, the {thing}",
            "In winter, the houses of {place}",
            "Please tell {who} that the {thing}",
            "A {thing} that costs less than ten dollars",
            "{who} was born in {place}, where",
            "After lunch on {day}, {who}",
            "The children gave {who} a {thing}, which",
            "Why the {thing} stopped working",
            "From the window {who} could see",
            "The road to {place} is closed, but",
        ),
        "who": ("my cousin", "the driver", "our landlord", "Anna", "the dentist", "an old sailor", "Mr. Cole", "my aunt"),
        "thing": ("clock", "blanket", "camera", "mirror", "hammer", "violin", "teapot", "fan"),
        "place": ("Glasgow", "a quiet island", "the mountains", "Texas", "the next village", "Portugal"),
        "day": ("Tuesday", "Friday", "Saturday"),
    },
)  # fmt: skip


def everyday_beginnings(half: int, count: int, seed: int = 0) -> list[str]:
    """Draws different beginnings of sentences, each template about as often.

    Args:
        half: 0 or 1; what one is made of is in no sentence of the other.
        count: How many.
        seed: Of what is drawn.
    """
    words, generator = _HALVES[half], random.Random(f"{seed} {half}")
    found: dict[str, None] = {}
    templates = list(words["template"])
    while len(found) < count:
        generator.shuffle(templates)
        for template in templates:
            filled = template.format(
                **{name: generator.choice(words[name]) for name in ("who", "thing", "place", "day")}
            )
            found[filled[0].upper() + filled[1:]] = None
    return list(found)[:count]
