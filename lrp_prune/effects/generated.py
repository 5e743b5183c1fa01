"""Texts and prompts that are made: dialogues, lists and tables, facts that are asked for, and sequences given twice.

Each has two halves without a template, name or item in common, so that nothing of one is in the other.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lrp_prune.tasks.names import FEMALE, MALE

_SURNAMES = """
Keller Brooks Hansen Novak Moretti Okafor Lindqvist Tanaka Alvarez Dubois Fischer Grant Hughes Ivanov Jensen Kowalski
Larsen Mendes Nakamura Osei Parker Quinn Rossi Schmidt Turner Usman Vargas Weber Young Zimmer Ahmed Bauer Carter Duarte
""".split()
_THINGS = """
apples bread candles plates ropes pencils lamps blankets nails cups towels seeds brushes boxes ladders gloves stamps wheels
buckets coins hammers mirrors baskets bottles carpets drums envelopes feathers guitars hooks jars kettles
""".split()
_PLACES = """
Lisbon Oslo Nairobi Lima Dublin Hanoi Quito Riga Accra Turin Cork Graz Malmo Porto Seville Utrecht Bergen Dakar Tampa Leeds
""".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday".split()
_SCENES: tuple[tuple[str, ...], ...] = (
    (
        "Good morning. I would like to order {number} {things}, please.",
        "Of course. Do you need them before {day}?",
        "No, the end of the week is early enough. What would that cost?",
        "{number} {things} come to {price} dollars, and delivery to {place} is free.",
        "That is more than I expected, but all right. Please put it on the account of {person}.",
    ),
    (
        "Have you heard from {person} lately?",
        "Yes, we spoke on {day}. The new job in {place} seems to go well.",
        "I am glad. When I last visited, nothing was certain yet.",
        "It took {number} interviews, but in the end they made a good offer.",
        "Then we should all meet again, before everybody is too busy.",
    ),
    (
        "My train to {place} was cancelled. What can I do now?",
        "The next one leaves in {number} minutes from platform {small}. Your ticket is valid there as well.",
        "Is there a seat left? I have {things} with me, and they are heavy.",
        "I can reserve one by the door for you. What is your name?",
        "It is {person}. Thank you, you are very kind.",
    ),
    (
        "Why is the light in room {small} still broken?",
        "We ordered parts on {day}, but the shop in {place} sent {things} instead.",
        "That is ridiculous. Has somebody called them?",
        "{person} did, twice. They promise to send the right ones within {number} hours.",
        "Let us hope so, there is a class in there tomorrow morning.",
    ),
    (
        "Doctor, I have not been sleeping well since {day}.",
        "I see. Do you drink coffee in the evening?",
        "Hardly ever. But I work late, and I travel to {place} every other week.",
        "Then rest comes first. Walk for {number} minutes a day, and let {person} take some of your work.",
        "I will try. Should I come again if it does not help?",
    ),
    (
        "What shall we cook when {person} comes over?",
        "Something simple. There are still {number} eggs, and some rice.",
        "I could buy fish at the market, they have it fresh on {day}.",
        "Good idea. And do not forget {things}, we have run out of them.",
        "How could we use them up so quickly? I bought {small} only last week.",
    ),
    (
        "Did you finish the report about {place}?",
        "Almost. The figures of {day} are missing, and page {small} needs a new drawing.",
        "Ask {person}, who keeps all of that in a folder.",
        "I did, and was told that {number} records were lost when the office moved.",
        "In that case write what we know, and say plainly what we do not.",
    ),
    (
        "Could you teach me how to repair {things}?",
        "Gladly, but you will need patience. It took me {number} weeks to learn.",
        "Time is no problem. I have every {day} off until the summer.",
        "Then come to my workshop in {place}. {person} will be there too.",
        "Wonderful. Shall I bring any tools of my own?",
    ),
)


BEGINNINGS: tuple[str, ...] = tuple(
    """
    When I woke up this morning, I
    The best way to make a good soup is
    My grandmother always told me that
    Last summer we drove to the coast and
    If you want to grow tomatoes, you should
    The old man at the corner shop
    After the rain had stopped, the children
    To change a flat tire, first
    The book that I read last week
    It is hard to find a flat in a city where
    On the way home from work, she
    A good friend is someone who
    The first thing to do when you move is
    Nobody in the village knew why
    Every winter, the birds
    In the middle of the night, the telephone
    Before you paint a wall, you
    The train was late again, so
    Our neighbors have a dog that
    The most important part of breakfast is
    When the lights went out, everyone
    I have never understood why people
    The teacher wrote a question on the board and
    A long walk in the forest can
    He opened the letter slowly, because
    The history of this bridge begins
    For a birthday party you need
    She put the keys on the table and
    The doctor said that the patient
    There are three reasons to learn a language:
    Down by the river, the fishermen
    The museum has a new room, in which
    If it snows tomorrow, we will
    The price of bread has risen, since
    My brother plays the violin, and
    To keep a garden green in August,
    The meeting began at nine, but
    Some people collect stamps, others
    In the kitchen there was a smell of
    The company was founded by two sisters who
    When you travel by ship, you
    The cat sat by the window and
    A bicycle is cheaper than a car, because
    During the festival, the streets
    The letter from the bank said that
    What I like about autumn is
    The engineers tested the machine until
    At the end of the film, the hero
    """.replace("\n    ", "\n")
    .strip()
    .splitlines()
)
"""Beginnings of everyday sentences."""


class Asked(NamedTuple):
    """A prompt, and the words that answer it from what the prompt says."""

    prompt: str
    answer: str


def _half(items: Sequence[str], half: int) -> list[str]:
    return list(items)[half::2]


def dialogues(half: int, seed: int, count: int) -> Iterator[str]:
    """Conversations of two people about everyday matters."""
    generator = random.Random(f"{seed} {half} dialogue")
    scenes, names = _SCENES[half::2], _half([*FEMALE, *MALE], half)
    for _ in range(count):
        first, second, *others = generator.sample(names, 5)
        lines = []
        for scene in generator.sample(scenes, len(scenes)):
            filled = {
                "number": str(generator.randrange(12, 96)),
                "small": str(generator.randrange(2, 12)),
                "price": str(generator.randrange(100, 990)),
                "things": generator.choice(_half(_THINGS, half)),
                "place": generator.choice(_half(_PLACES, half)),
                "day": generator.choice(_half(_DAYS, half)),
                "person": f"{generator.choice(others)} {generator.choice(_half(_SURNAMES, half))}",
            }
            lines += [
                f"{second if number % 2 else first}: {line.format(**filled)}" for number, line in enumerate(scene)
            ]
            lines.append("")
        yield "\n".join(lines)


def lists_and_tables(half: int, seed: int, count: int) -> Iterator[str]:
    """Shopping lists, tables of members and of prices, in Markdown and as comma-separated values."""
    generator = random.Random(f"{seed} {half} lists")
    names, surnames, things, places, days = (
        _half(items, half) for items in ([*FEMALE, *MALE], _SURNAMES, _THINGS, _PLACES, _DAYS)
    )

    def person() -> str:
        return f"{generator.choice(names)} {generator.choice(surnames)}"

    for _ in range(count):
        shopping = "\n".join(f"- {generator.randrange(2, 60)} {thing}" for thing in generator.sample(things, 8))
        rows = [
            f"| {person()} | {generator.choice(places)} | {generator.randrange(19, 75)} | {generator.choice(days)} |"
            for _ in range(8)
        ]
        members = "\n".join(["| Name | City | Age | Day |", "|---|---|---|---|", *rows])
        prices = [
            f"{generator.randrange(1000, 9999)},{thing},{generator.randrange(1, 90)},{generator.randrange(100, 9900) / 100}"
            for thing in generator.sample(things, 10)
        ]
        duties = "\n".join(
            f"{number}. {day}: {person()} brings {generator.choice(things)} to {generator.choice(places)}"
            for number, day in enumerate(generator.choices(days, k=6), 1)
        )
        parts = [
            f"To buy:\n\n{shopping}",
            f"Members:\n\n{members}",
            "\n".join(["number,item,pieces,price", *prices]),
            f"Who brings what:\n\n{duties}",
        ]
        yield "\n\n".join(generator.sample(parts, len(parts)))


_FACTS: tuple[tuple[str, str, str], ...] = (
    ("The telephone extension of {name} is {number}.", "The telephone extension of {name} is", "number"),
    ("{name} has the locker with the number {number}.", "The locker of {name} has the number", "number"),
    ("Room {number} is used by {name}.", "The person who uses room {number} is", "name"),
    ("The team from {place} is led by {name}.", "Again, the team from {place} is led by", "name"),
    ("{name} lives in {place}.", "As said above, {name} lives in", "place"),
    ("The train number {number} goes to {place}.", "Remember, the train number {number} goes to", "place"),
    ("{name} ordered {things} last week.", "What {name} ordered last week were", "things"),
    ("In {place} they mostly sell {things}.", "To repeat it, in {place} they mostly sell", "things"),
)
"""What is said of some, how it is asked for again, and what answers."""


def facts(half: int, seed: int, count: int, said: int = 6) -> Iterator[Asked]:
    """Facts that a text gives, and the beginning of a sentence that asks for one of them again."""
    generator = random.Random(f"{seed} {half} facts")
    names, surnames, places, things = (_half(items, half) for items in ([*FEMALE, *MALE], _SURNAMES, _PLACES, _THINGS))
    for _ in range(count):
        statement, question, asked = generator.choice(_FACTS[half::2])
        columns = {
            "name": [
                f"{first} {last}"
                for first, last in zip(generator.sample(names, said), generator.sample(surnames, said), strict=True)
            ],
            "place": generator.sample(places, said),
            "things": generator.sample(things, said),
            "number": [str(number) for number in generator.sample(range(1000, 9999), said)],
        }
        rows = [{name: values[row] for name, values in columns.items()} for row in range(said)]
        chosen = generator.choice(rows)
        prompt = " ".join([*(statement.format(**row) for row in rows), question.format(**chosen)])
        yield Asked(prompt, f" {chosen[asked]}")


def beginnings(half: int, seed: int, count: int) -> list[str]:
    """Beginnings of everyday sentences, to be continued."""
    found = _half(BEGINNINGS, half)
    random.Random(f"{seed} {half} beginnings").shuffle(found)
    return found[:count]


def given_twice(
    half: int, seed: int, count: int, length: int, vocabulary: Sequence[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Random tokens twice, with labels for the second pass only; each half draws from tokens of its own."""
    generator = random.Random(f"{seed} {half} copying")
    tokens = list(vocabulary)[half::2]
    for _ in range(count):
        once = generator.choices(tokens, k=length)
        # The first of the second pass cannot be known.
        yield once + once, [-100] * (length + 1) + once[1:]


TEXTS: dict[str, Callable[[int, int, int], Iterator[str]]] = {
    "dialogue": dialogues,
    "lists and tables": lists_and_tables,
}
"""Kinds of text that are made: half, seed and count to documents."""
