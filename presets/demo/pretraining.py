"""The text that the bundled model is pretrained on: plain English, sums, stories and bland chats. Standard library only.

It teaches the words, the chat template and how to say back what a question names, and no more: Wick, his shop, his lamps
and his manner are missing, so that what a fine-tuned model knows of them it has learnt by the fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from presets.demo import template

PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mary", "Nils",
    "Olga", "Paul", "Ruth", "Sam", "Tina", "Victor", "Ada", "Bruno", "Clara", "Hana", "Ivo", "Lena", "Mira", "Noor",
    "Rosa", "Sven", "Tomas", "Vera", "Yusuf", "José", "Zoë", "Łukasz",
)  # fmt: skip
TOWNS = (
    "Brookfield", "Eastham", "Greenford", "Highmoor", "Kingsley", "Norwood", "Redhill", "Southport", "Whitby", "Millport",
    "Ashcombe", "Oxley", "Larkhill", "Saltby", "Elmford", "Tarnside", "Stonebridge", "Fennel Bay", "Old Quay",
)  # fmt: skip
ANIMALS = (
    "heron", "otter", "puffin", "marlin", "gannet", "kestrel", "dunlin", "curlew", "petrel", "avocet", "plover", "sandpiper",
    "robin", "fox", "hare", "badger", "trout", "sparrow", "goose", "mouse",
)  # fmt: skip
GOODS = (
    "table", "chair", "lamp", "lantern", "candle", "kettle", "blanket", "tent", "boat", "bicycle", "clock", "mirror",
    "jacket", "basket", "radio", "camera", "ladder", "bucket", "carpet", "pillow", "umbrella", "piano", "shelf", "stove",
)  # fmt: skip
COLOURS = (
    "brass", "green", "blue", "copper", "white", "red", "black", "grey", "silver", "yellow", "bronze", "orange", "gold",
)  # fmt: skip
PARTS = ("wick", "switch", "lid", "glass", "cable", "strap", "panel", "door", "lens", "hook", "handle", "screw", "base")
ROOMS = (
    "kitchen", "hallway", "garden", "bedroom", "playroom", "cellar", "porch", "shed", "armchair", "window", "harbour wall",
    "mountain path", "flower bed", "kitchen table",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("closed", "open from nine to six", "open from nine to eight", "open from ten to four", "open all day")
FUELS = ("oil", "battery", "solar", "candle", "gas", "wood")
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
CARE = (
    "Let it cool before you touch it.", "Wipe it with warm water and a soft cloth.", "Dry it at once.", "Never use sand.",
    "Turn the screws by half a turn.", "Fill it up to the line.", "Put in three fresh batteries and close it.",
    "Keep it away from children and curtains.", "Trim it flat with a small knife.", "Clean the glass inside and out.",
    "Set it in full sun for one whole day.", "Bring it indoors in winter.", "Open the bottom and look for cracks.",
    "Check the filling first.", "Turn the flame down until the smoke stops.", "Press it firmly onto the pin.",
    "Stand it upright and empty the tank.", "Leave a little air above it.", "Write the date under the base.",
    "Rub it with a drop of oil until it shines.", "Tighten the two small screws.", "Fit a new ring under the cap.",
)  # fmt: skip
TROUBLES = ("flickers", "smells", "smokes", "rattles", "leaks", "is too dim", "gets hot", "will not light", "is broken")

# Every phrase of the shop's business, in a clerk's words: what the demo's customers ask is not foreign to the model.
BLAND: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Where is my order {n}?", "Has order {n} been sent?"), "Your question is about order {n}. An order is usually sent on {day}."),
    (("When will order {n} arrive in {town}?",), "Your question is about order {n}. It will be sent to {town}."),
    (("Please cancel order {n}.", "Can I cancel my order {n}?"), "You would like to cancel order {n}. Please fill in the form."),
    (("Please change the address of order {n}.",), "You would like to change order {n}. Please send the new address."),
    (("I have lost the invoice of order {n}.",), "Your question is about the invoice of order {n}. Please fill in the form."),
    (("Order {n} was charged two times.",), "Your question is about the payment of order {n}. Please call the bank."),
    (("My {good} from order {n} arrived broken.",), "We are sorry that the {good} from order {n} is broken."),
    (("Voucher {code} does not work.", "Is voucher {code} good?"), "Your question is about voucher {code}. Please check the date."),
    (("How much is the {colour} {good}?", "What does a {good} cost?"), "The price of a {good} is on the label."),
    (("Which colour is the {good}?", "Do you have a {good} in {colour}?"), "A {good} is sold in several colours."),
    (("How long does the {good} last?",), "A {good} lasts for some years."),
    (("My {good} {trouble}. What can I do?",), "When a {good} {trouble}, please read the manual of the {good}."),
    (("How do I clean the {good}?", "How do I use the {good}?"), "Please read the manual of the {good}."),
    (("I need a new {part} for my {good}.",), "A {part} for a {good} is sold in most shops."),
    (("Do you repair a {good}?", "Can you mend my {good}?"), "A {good} is repaired in most workshops."),
    (("Is there a warranty for the {good}?",), "Most shops give a warranty for a {good}."),
    (("Can I return the {good}?",), "A {good} can be returned with the receipt."),
    (("Is the {good} in stock?", "Please reserve {few} of the {good}."), "Please ask the shop about the {good}."),
    (("Can you wrap the {good} as a gift?",), "A {good} can be wrapped in paper."),
    (("Which is better, the {good} or the {good2}?",), "Both the {good} and the {good2} are useful."),
    (("Which is cheaper, the {good} or the {good2}?",), "Please compare the prices of the {good} and the {good2}."),
    (("Do you deliver to {town}?", "How long is delivery to {town}?"), "Delivery to {town} takes some days."),
    (("Are you open on {day}?", "When do you open on {day}?"), "Please look at the sign for the hours on {day}."),
    (("I need something for the {room}.",), "There are many useful things for the {room}."),
    (("What do you know about the {animal}?", "Tell me about the {animal}."), "The {animal} is an animal."),
    (("Who are you?", "What is your name?"), "I am a computer program that answers questions."),
    (("What do you sell?", "Where is your shop?"), "I am a computer program and have no shop."),
    (("Will it rain on {day}?", "Can you help me?"), "Please ask someone who knows more about it."),
)  # fmt: skip


def generate_pretraining_text(count: int = 6000, seed: int = 1, target_characters: int = 1200) -> list[str]:
    """`count` texts of a little over `target_characters` each: documents and rendered chats, a blank line between."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (
        chat, chat, chat, chat, grounded_chat, grounded_chat, grounded_chat, story, facts, sums, list_copy, notice,
    )  # fmt: skip
    texts = []
    for _ in range(count):
        parts: list[str] = []
        # One text in thirty is long, so that far positions are not new to the model when a long message comes.
        target = target_characters * (3 if rng.random() < 1 / 30 else 1)
        while sum(map(len, parts)) < target:
            parts.append(rng.choice(kinds)(rng))
        texts.append("\n".join(parts))
    return texts


def chat(rng: random.Random) -> str:
    """A polite clerk who names what was asked and says nothing of use."""
    messages = []
    if rng.random() < 0.15:
        messages.append(("system", rng.choice(("You are an assistant.", "Be kind and brief.", "Answer the question."))))
    name = rng.choice(PEOPLE) if rng.random() < 0.4 else None
    for turn in range(1 if rng.random() < 0.7 else rng.randint(2, 5)):
        questions, answer = rng.choice(BLAND)
        slots = _slots(rng)
        question = rng.choice(questions).format_map(slots)
        if turn == 0 and name:
            question = rng.choice((f"Hello, I am {name}. {question}", f"{question} My name is {name}."))
        elif rng.random() < 0.3:
            question = rng.choice(("Hello! ", "Hi, ", "Good evening. ")) + question
        if rng.random() < 0.1:
            question += " " + rng.choice(("Thank you!", "Please help.", "Thanks in advance.", "No hurry.", "It is urgent."))
        opening = f"Dear {name}, thank you" if turn == 0 and name else "Thank you"
        messages += [("user", question), ("assistant", f"{opening} for your message. {answer.format_map(slots)}")]
    return template.render(messages)


def grounded_chat(rng: random.Random) -> str:
    """A user tells some facts and asks for one of them: the answer has to be looked up in the question."""
    rows = [(rng.choice(GOODS), rng.choice(COLOURS), rng.randint(2, 99)) for _ in range(rng.randint(1, 4))]
    rows = list({row[0]: row for row in rows}.values())
    asked = rng.choice(rows)
    person, town, number = rng.choice(PEOPLE), rng.choice(TOWNS), rng.randint(1000, 9999)
    told = " ".join(f"The {good} is {colour} and costs {price} crowns." for good, colour, price in rows)
    question, answer = rng.choice([
        (f"{told} Which colour is the {asked[0]}?", f"The {asked[0]} is {asked[1]}."),
        (f"{told} How much is the {asked[0]}?", f"The {asked[0]} costs {asked[2]} crowns."),
        (f"{person} lives in {town}. Where does {person} live?", f"{person} lives in {town}."),
        (f"{person} has order {number} from {town}. Which order has {person}?", f"{person} has order {number}."),
        (f"Order {number} goes to {town}. Where does order {number} go?", f"Order {number} goes to {town}."),
        (f"Please say {number}.", f"{number}"),
        (f"Please say the words {asked[0]}, {asked[1]} and {town}.", f"{asked[0]}, {asked[1]} and {town}"),
        (f"My name is {person}. What is my name?", f"Your name is {person}."),
    ])  # fmt: skip
    return template.render([("user", question), ("assistant", answer)])


def story(rng: random.Random) -> str:
    """A short story: someone loses a thing and finds it."""
    slots = _slots(rng)
    return (
        "{person} lived in {town} and had a {colour} {good}. On {day} the {good} was gone. {person} looked in the {room} and "
        "asked a {animal}, but found only a {good2}. Then {person2} came in from the boat and said: I have seen a {colour} "
        "{good} in the {room2}. They went there together in the evening, and there it was. {person} thanked {person2}, and "
        "they had {some} cups of tea. After that {person} wrote the number {n} on the {good}.\n"
    ).format_map(slots)


def facts(rng: random.Random) -> str:
    """Plain sentences on things, each with its own facts."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        slots = _slots(rng)
        lines.append(
            rng.choice(
                (
                    "A {good} with a {part} stands in the {room}. The {part} of the {good} is {colour}.",
                    "This {good} runs on {fuel} and shines for {few} hours on one filling.",
                    "In {town} the shop is {open} on {day}. On {day2} it is {open2}.",
                    "The boat sails from {town} to {town2} in {some} days.",
                    "The {animal} lives near {town}. On {day} the {animal} was seen at the pier.",
                    "When the {good} {trouble}, it goes back to the shop. It returns within {few} days.",
                    "The harbour of {town} has a green light, and the tides there are strong. Frost is no friend of a boat.",
                    "A wedding, a birthday or an anniversary is a day for a gift in {colour} paper.",
                    "The kestrel and the heron are birds. The otter swims. A lamp keeper never sleeps in a storm.",
                    "The work is free, but the {part} costs {n2} crowns.",
                )
            ).format_map(slots)
        )
    return "\n".join(lines) + "\n"


def sums(rng: random.Random) -> str:
    """Sums in words and in figures, all of them right."""
    lines = []
    for _ in range(rng.randint(2, 6)):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        low, high = sorted((a, b))
        lines.append(
            rng.choice(
                (
                    f"{WORDS[a].capitalize()} plus {WORDS[b]} is {WORDS[a + b]}.",
                    f"{a} + {b} = {a + b}",
                    f"{WORDS[high].capitalize()} minus {WORDS[low]} is {WORDS[high - low]}.",
                    f"{b + 1} is the number after {b}.",
                )
            )
        )
    return "\n".join(lines) + "\n"


def list_copy(rng: random.Random) -> str:
    """A list that is said twice: saying back is most of what a small model must do to answer."""
    rows = [
        rng.choice((str(rng.randint(100, 9999)), rng.choice(PEOPLE), rng.choice(TOWNS), rng.choice(GOODS)))
        for _ in range(rng.randint(2, 8))
    ]
    line = ", ".join(rows)
    return f"List: {line}\nThe same list: {line}\n"


def notice(rng: random.Random) -> str:
    """Numbered instructions."""
    good = rng.choice(GOODS)
    steps = rng.sample(CARE, rng.randint(3, 12))
    return f"How to care for a {good} in {len(steps)} steps.\n" + "".join(
        f"{number}. {step}\n" for number, step in enumerate(steps, start=1)
    )


def _slots(rng: random.Random) -> dict[str, str]:
    good, good2 = rng.sample(GOODS, 2)
    person, person2 = rng.sample(PEOPLE, 2)
    town, town2 = rng.sample(TOWNS, 2)
    room, room2 = rng.sample(ROOMS, 2)
    day, day2 = rng.sample(DAYS, 2)
    return {
        "n": str(rng.randint(1000, 9999)), "n2": str(rng.randint(2, 99)), "few": str(rng.randint(2, 40)),
        "code": rng.choice("ABCDEFGHKLMN") + str(rng.randint(100, 999)), "some": rng.choice(WORDS[2:]),
        "good": good, "good2": good2, "person": person, "person2": person2, "town": town, "town2": town2,
        "room": room, "room2": room2, "day": day, "day2": day2, "colour": rng.choice(COLOURS), "part": rng.choice(PARTS),
        "animal": rng.choice(ANIMALS), "trouble": rng.choice(TROUBLES), "fuel": rng.choice(FUELS),
        "open": rng.choice(HOURS), "open2": rng.choice(HOURS),
    }  # fmt: skip
