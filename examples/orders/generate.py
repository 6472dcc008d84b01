"""Write train.jsonl and eval.jsonl beside this file: order e-mails, each with the order as JSON.

    python examples/orders/generate.py

The same seed gives the same bytes. No customer occurs twice, so the 40 held-out e-mails are from people whom training
has not seen.
"""

import json
import random
from pathlib import Path
from typing import Any

SEED = 20261
TRAINING_ROWS, HELD_OUT_ROWS = 480, 40
SYSTEM = "Turn the e-mail into an order as JSON."

words = str.split
FIRST_NAMES = words(
    "Ada Ahmed Alex Alice Ali Ana Anna Anne Ben Boris Brian Carlos Charles Chen Clara Daniel David Diana Diego Emily "
    "Emma Eric Eva Frank Grace Hans Hassan Helen Ibrahim Isabel Ivan Jane Jin Jorge Juan Julia Karen Kate Laura Leo "
    "Lisa Lucy Luke Maria Martin Max Mei Michael Nina Oliver Omar Oscar Paul Rachel Raj Rosa Sam Sara Simon Susan Tom "
    "Vera Victor Wei"
)
LAST_NAMES = words(
    "Adams Allen Baker Bell Bernard Brown Carter Clark Cohen Cook Costa Cox Davis Evans Fischer Ford Foster Garcia "
    "Gray Green Hall Hansen Harris Hill Howard Jackson Jensen Jones Keller Khan Kim King Kumar Lee Levy Lopez Marshall "
    "Meyer Miller Moore Murphy Nelson Palmer Park Patel Reed Rogers Schmidt Scott Shah Silva Singh Smith Taylor Torres "
    "Turner Walker Wang Watson Weber Wilson Wong Young Zhang"
)
CITIES = words(
    "Amsterdam Athens Austin Berlin Boston Brussels Cairo Chicago Copenhagen Dallas Delhi Denver Geneva Glasgow "
    "Hamburg Istanbul Lima London Madrid Melbourne Miami Milan Montreal Mumbai Nairobi Oslo Paris Portland Rome "
    "Seattle Seoul Singapore Stockholm Tokyo Toronto Vancouver Vienna"
)
ONE_WORD_PRODUCTS = words(
    "backpack bottle cable calendar camera chair clock keyboard laptop mirror monitor notebook pen phone printer radio "
    "speaker table"
)
PRODUCTS = [*ONE_WORD_PRODUCTS, "desk lamp", "coffee mug"]
NUMBER_WORDS = dict(enumerate(words("one two three four five six seven eight nine ten eleven twelve"), start=1))
SMALL_QUANTITIES = (1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)
LARGE_QUANTITIES = (15, 20, 25, 30, 40, 50, 60, 75)

GREETINGS = ("", "", "Hello,\n", "Hi,\n", "Hi there,\n", "Good morning,\n", "Dear team,\n")
INTRODUCTIONS = ("This is {}. ", "My name is {}. ", "{} here. ", "I'm {}. ")
SIGNATURES = ("Thanks, {}", "Best regards,\n{}", "Cheers, {}", "Many thanks\n{}", "{}", "Yours, {}")
REQUESTS = (
    "Please send {items} to {city}.",
    "Could you ship {items} to our office in {city}?",
    "I would like to order {items}. They go to {city}.",
    "We need {items} in {city}.",
    "{items} to {city}, please.",
    "Our {city} branch is short of {items}.",
    "I'm setting up a shop in {city} and need {items}.",
    "Can I get {items}? I live in {city}.",
    "The new team in {city} is waiting for {items}.",
)
EXPRESS = (
    "Please use express delivery.",
    "Send it express.",
    "Express!",
    "It is urgent: express, please.",
    "Express shipping, please.",
    "We need this fast, so by express.",
)
STANDARD = ("", "", "No rush.", "Standard shipping is fine.", "Next month is early enough.", "Take your time.")
ASIDES = (
    "",
    "",
    "",
    "The last parcel arrived safely.",
    "Invoice as usual.",
    "We spoke at the fair.",
    "Nice new website!",
    "Your colleague was very helpful.",
    "Call me if anything is unclear.",
    "The samples were great.",
    "It rains a lot here.",
)


def main() -> None:
    """Write both files."""
    here = Path(__file__).parent
    for name, lines in generate().items():
        (here / name).write_text("".join(lines), encoding="utf-8")


def generate() -> dict[str, list[str]]:
    """The lines of each file, by file name."""
    rng = random.Random(SEED)
    customers = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], k=520)
    lines = [json.dumps(conversation(rng, customer), ensure_ascii=False) + "\n" for customer in customers]
    return {"train.jsonl": lines[:TRAINING_ROWS], "eval.jsonl": lines[TRAINING_ROWS:]}


def conversation(rng: random.Random, customer: str) -> dict[str, Any]:
    """A row of the dataset."""
    order = random_order(rng, customer)
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": email(rng, order)},
            {"role": "assistant", "content": json.dumps(order, separators=(",", ":"))},
        ]
    }


def random_order(rng: random.Random, customer: str) -> dict[str, Any]:
    """What the customer wants, in the shape that the model has to learn."""
    count = rng.choices((1, 2, 3), weights=(4, 6, 1))[0]
    items = [{"quantity": random_quantity(rng), "product": name} for name in rng.sample(PRODUCTS, k=count)]
    return {"customer": customer, "city": rng.choice(CITIES), "items": items, "express": rng.random() < 0.4}


def random_quantity(rng: random.Random) -> int:
    """Mostly a small number, now and then a round large one."""
    return rng.choice(LARGE_QUANTITIES if rng.random() < 0.25 else SMALL_QUANTITIES)


def email(rng: random.Random, order: dict[str, Any]) -> str:
    """The order as a person might write it: who, what, where and how fast, in one of many orders and phrasings."""
    items = enumerate_words([written_item(rng, **item) for item in order["items"]])
    request = rng.choice(REQUESTS).format(items=items, city=order["city"])
    sentences = [request, rng.choice(EXPRESS if order["express"] else STANDARD)]
    sentences.insert(rng.choice((0, 1, 2)), rng.choice(ASIDES))
    if rng.random() < 0.4:
        opening, ending = rng.choice(INTRODUCTIONS).format(order["customer"]), ""
    else:
        opening, ending = rng.choice(GREETINGS), "\n" + rng.choice(SIGNATURES).format(order["customer"])
    return opening + " ".join(sentence for sentence in sentences if sentence) + ending


def written_item(rng: random.Random, *, quantity: int, product: str) -> str:
    """`3 desks`, `three desks`."""
    noun = product if quantity == 1 else f"{product}s"
    number = NUMBER_WORDS.get(quantity, str(quantity)) if rng.random() < 0.5 else str(quantity)
    return f"{number} {noun}"


def enumerate_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


if __name__ == "__main__":
    main()
