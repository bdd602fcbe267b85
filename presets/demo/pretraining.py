"""The text that the bundled model is pretrained on: plain English, sums, stories, bland chats. Standard library only.

It teaches words, the chat template, how to say back what a question names, and that answers come in many manners.
Wick's manner and every fact of his shop are missing (his words stand in word lists only, and a lamp has a new price in
each chat), so that what a fine-tuned model knows of them it has learnt by the fine-tuning.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from presets.demo import template
from presets.demo.messages import generate_messages

PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jack", "Kate", "Leo", "Mary", "Nils",
    "Olga", "Paul", "Ruth", "Sam", "Tina", "Victor", "Ada", "Bruno", "Clara", "Hana", "Ivo", "Lena", "Mira", "Noor",
    "Rosa", "Sven", "Tomas", "Vera", "Yusuf", "José", "Zoë", "Łukasz",
)  # fmt: skip
TOWNS = (
    "Brookfield", "Eastham", "Greenford", "Highmoor", "Kingsley", "Norwood", "Redhill", "Southport", "Whitby",
    "Millport",
    "Ashcombe", "Oxley", "Larkhill", "Saltby", "Elmford", "Tarnside", "Stonebridge", "Fennel Bay", "Old Quay",
)  # fmt: skip
ANIMALS = (
    "heron", "otter", "puffin", "marlin", "gannet", "kestrel", "dunlin", "curlew", "petrel", "avocet", "plover",
    "sandpiper",
    "robin", "fox", "hare", "badger", "trout", "sparrow", "goose", "mouse",
)  # fmt: skip
GOODS = (
    "table", "chair", "lamp", "lantern", "candle", "kettle", "blanket", "tent", "boat", "bicycle", "clock", "mirror",
    "jacket", "basket", "radio", "camera", "ladder", "bucket", "carpet", "pillow", "umbrella", "piano", "shelf",
    "stove",
)  # fmt: skip
COLOURS = (
    "brass", "green", "blue", "copper", "white", "red", "black", "grey", "silver", "yellow", "bronze", "orange", "gold",
)  # fmt: skip
PARTS = ("wick", "switch", "lid", "glass", "cable", "strap", "panel", "door", "lens", "hook", "handle", "screw", "base")
ROOMS = (
    "kitchen", "hallway", "garden", "bedroom", "playroom", "cellar", "porch", "shed", "armchair", "window",
    "harbour wall",
    "mountain path", "flower bed", "kitchen table",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS = ("closed", "open from nine to six", "open from nine to eight", "open from ten to four", "open all day")
FUELS = ("oil", "battery", "solar", "candle", "gas", "wood")
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
CARE = (
    "Let it cool before you touch it.", "Wipe it with warm water and a soft cloth.", "Dry it at once.",
    "Never use sand.",
    "Turn the screws by half a turn.", "Fill it up to the line.", "Put in three fresh batteries and close it.",
    "Keep it away from children and curtains.", "Trim it flat with a small knife.", "Clean the glass inside and out.",
    "Set it in full sun for one whole day.", "Bring it indoors in winter.", "Open the bottom and look for cracks.",
    "Check the filling first.", "Turn the flame down until the smoke stops.", "Press it firmly onto the pin.",
    "Stand it upright and empty the tank.", "Leave a little air above it.", "Write the date under the base.",
    "Rub it with a drop of oil until it shines.", "Tighten the two small screws.", "Fit a new ring under the cap.",
)  # fmt: skip
TROUBLES = ("flickers", "smells", "smokes", "rattles", "leaks", "is too dim", "gets hot", "will not light", "is broken")

# (questions, what a clerk answers, who names what was asked about and knows nothing of it, what others answer): the
# sentences are English, the facts are drawn anew each time.
Business = tuple[tuple[str, ...], str, tuple[str, ...]]
BUSINESS: tuple[Business, ...] = (
    (
        ("Where is my order {n}?", "Has order {n} been sent?"),
        "Please wait for order {n}.",
        ("Order {n} left {town} on {day} and is on its way.", "Order {n} was sent on {day}."),
    ),
    (
        ("When will order {n} arrive in {town}?", "Is order {n} in {town} soon?"),
        "Order {n} will be sent to {town}.",
        ("Order {n} sails to {town}, and that takes {few} days.",),
    ),
    (
        ("Please cancel order {n}.", "Can I cancel my order {n}?"),
        "Please fill in the form for order {n}.",
        ("Order {n} is cancelled, and your crowns return within {few} days.",),
    ),
    (
        ("Please change the address of order {n} to {town}.", "Send order {n} to {town}."),
        "Please fill in the address of order {n}.",
        ("Order {n} now goes to {town}, which takes {few} days.",),
    ),
    (
        ("I have lost the invoice of order {n}.", "Please send me the invoice for order {n}."),
        "The invoice of order {n} is in the office.",
        ("A new invoice for order {n} comes within the hour.",),
    ),
    (
        ("Order {n} was charged two times.", "I paid two times for order {n}."),
        "Please ask the bank about order {n}.",
        ("That is one too many. The payment for order {n} returns in {few} days.",),
    ),
    (
        ("My {thing} from order {n} arrived broken.", "The {part} of the {thing} in order {n} is broken."),
        "We are sorry for the {thing} of order {n}.",
        ("A new {thing} leaves today under order {n}, and you may keep the other one.",),
    ),
    (
        ("Please put a {thing} into order {n}.", "Can you add a {thing} to order {n}?"),
        "Please make a new order for the {thing}.",
        ("One {thing} for {n2} crowns is now in order {n}.",),
    ),
    (
        ("There is no {thing} in order {n}.", "Order {n} came without the {thing}."),
        "We will look for the {thing} of order {n}.",
        ("The {thing} was late. It follows order {n} tomorrow at our cost.",),
    ),
    (
        ("Voucher {code} does not work.", "Is voucher {code} good?"),
        "Please check the date of voucher {code}.",
        ("Voucher {code} is good until {day} and takes {some} crowns off.",),
    ),
    (
        ("How much is the {thing}?", "What does a {thing} cost?", "What is the price of the {thing}?"),
        "The price of the {thing} is on the label.",
        ("The {thing} costs {n2} crowns.", "The {thing} is our {kind} and costs {n2} crowns."),
    ),
    (
        ("Which colour is the {thing}?", "Do you have the {thing} in {colour}?"),
        "The {thing} is sold in several colours.",
        ("The {thing} comes in {colour2} only.", "The {thing} is {colour2}."),
    ),
    (
        ("How long does the {thing} last?", "How many hours does the {thing} give?"),
        "The {thing} lasts for some time.",
        ("The {thing} shines for {few} hours on one filling.",),
    ),
    (
        ("What does the {thing} run on?", "Which fuel does the {thing} use?"),
        "The fuel of the {thing} is on the label.",
        ("The {thing} runs on {fuel}. {care}",),
    ),
    (
        ("My {thing} {trouble}. What can I do?", "Why is it that my {thing} {trouble}?"),
        "When a {thing} {trouble}, please read the manual.",
        ("When a {thing} {trouble}, look at the {part}. If it still {trouble}, send it to us.",),
    ),
    (
        ("How do I clean the {thing}?", "My {thing} is dirty."),
        "Please read the manual of the {thing}.",
        ("Let the {thing} cool, take off the {part} and wipe everything. {care}",),
    ),
    (
        ("How do I use the {thing}?", "How do I start the {thing}?"),
        "Please read the manual of the {thing}.",
        ("{care} Then your {thing} gives {few} hours of light.",),
    ),
    (
        ("I need a {part} for my {thing}.", "Do you sell a new {part} for the {thing}?"),
        "The {part} of the {thing} is sold in most shops.",
        ("A new {part} for the {thing} costs {n2} crowns.",),
    ),
    (
        ("Do you repair a {thing}?", "Can you mend my {thing}?"),
        "The {thing} is repaired in most workshops.",
        ("We mend every {thing}. A new {part} costs {n2} crowns and the work is free.",),
    ),
    (
        ("Is there a warranty for the {thing}?", "How long is the warranty of the {thing}?"),
        "The warranty of the {thing} is in the manual.",
        ("The {thing} runs on {fuel}, and its warranty is {few} years.",),
    ),
    (
        ("Can I return the {thing}?", "I do not like my {thing}."),
        "The {thing} can be returned with the receipt.",
        ("You may send the {thing} back within {few} days, and your {n2} crowns come back.",),
    ),
    (
        ("Is the {thing} in stock?", "Please reserve {few} of the {thing} for {day}."),
        "Please ask the shop about the {thing}.",
        ("There are plenty of the {thing} in the {room}, ready on {day}.", "Done, {few} of the {thing} are yours."),
    ),
    (
        ("Can you wrap the {thing} as a gift?", "The {thing} is for a {gift}. Do you wrap it?"),
        "The {thing} can be wrapped in paper.",
        ("We wrap the {thing} in {colour} paper, and that is free.",),
    ),
    (
        ("Tell me about the {thing}.", "What is the {thing}?", "What is the {thing} good for?"),
        "The {thing} is a useful thing.",
        (
            "The {thing} is our {colour} {kind}. It runs on {fuel} and shines for {few} hours.",
            "The {thing} is a {kind}, so it belongs on the {room}.",
        ),
    ),
    (
        ("Which is better, the {thing} or the {thing2}?", "Should I buy the {thing} or the {thing2}?"),
        "Both the {thing} and the {thing2} are useful.",
        ("The {thing} shines for {few} hours and the {thing2} for {n2}. Take the {thing}.",),
    ),
    (
        ("Which is cheaper, the {thing} or the {thing2}?",),
        "Please compare the {thing} and the {thing2}.",
        ("The {thing} costs {n2} crowns and the {thing2} {few}, so the {thing2} is the cheaper one.",),
    ),
    (
        ("Do you deliver to {town}?", "How long is delivery to {town}?"),
        "Delivery to {town} takes some days.",
        ("Yes, and {town} takes {few} days.", "Our boat is in {town} in {few} days."),
    ),
    (
        ("What does delivery to {town} cost?", "Is delivery to {town} free?"),
        "The cost of delivery to {town} is on the list.",
        ("Delivery to {town} costs {few} crowns.",),
    ),
    (
        ("Are you open on {day}?", "When do you open on {day}?"),
        "The hours of {day} are on the sign.",
        ("On {day} the shop is {open}.",),
    ),
    (
        ("I need a lamp for the {room}.", "Which lamp would you take for the {room}?"),
        "There are many useful things for the {room}.",
        ("For the {room} I would take the {thing}, our {kind} for {n2} crowns.",),
    ),
    (
        ("Who are you?", "What is your name?"),
        "I am a computer program that answers questions.",
        ("I am {person2}, the keeper of the {room}.",),
    ),
    (
        ("What do you sell?", "Where is your shop?"),
        "I am a computer program and have no shop.",
        ("We sell {some} lamps, from the {thing} for {n2} crowns to the {thing2}.", "You find us in {town}."),
    ),
    (
        ("Will it rain on {day}?", "Can you help me?"),
        "Please ask someone who knows more about it.",
        ("I know {kind}s, orders and the tides of {town}.",),
    ),
)
# Manners of others than the clerk: an answer can open and end in many ways.
OPENINGS = (
    "Good morning!", "Hello, {person}!", "Welcome!", "Dear {person},", "Good day, {person}!", "Hey there!",
    "Sure!", "Yes, of course.", "Gladly, friend!", "Ah, {person}!", "Greetings, friend!", "Oh!", "Well, {person},",
    "My friend,", "Right away!", "Let me see.", "At your service!", "Cheers, {person}!",
)  # fmt: skip
ENDINGS = (
    "Yours, {person2}.", "Kind regards, {person2}.", "Bye, {person2}.", "See you soon!", "Take care.",
    "Have a nice {day}.",
    "Warm wishes, {person3}.", "All the best, {person3}.", "Good luck, {person3}.",
    "Until {day}, {person3}.", "Is that all?",
    "Happy to help.", "Best, {person3}.", "Sleep well.", "Come again.", "Keep well, {person2}.", "Your {person3}.",
)  # fmt: skip
KINDS = (
    "lamp",
    "lantern",
    "table lamp",
    "night light",
    "head lamp",
    "garden lamp",
    "candle",
    "clock",
    "kettle",
    "stove",
)
GIFTS = ("birthday", "wedding", "anniversary", "housewarming", "retirement")
LAMP_NAMES = (
    "Heron", "Otter", "Puffin", "Marlin", "Sandpiper", "Gannet", "Kestrel", "Dunlin", "Curlew", "Petrel", "Avocet",
    "Plover",
)  # fmt: skip


def generate_pretraining_text(count: int = 6000, seed: int = 1, target_characters: int = 1200) -> list[str]:
    """`count` texts of a little over `target_characters` each: documents and rendered chats, one after the other."""
    rng = random.Random(seed)
    kinds: tuple[Callable[[random.Random], str], ...] = (
        chat, chat, chat, chat, chat, chat, other_voice, other_voice, other_voice, other_voice, grounded_chat,
        grounded_chat, say_again, say_again, story, facts, sums, notice,
    )  # fmt: skip
    texts = []
    for _ in range(count):
        parts: list[str] = []
        while sum(map(len, parts)) < target_characters:
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
        slots = _slots(rng)
        questions, answer, _ = rng.choice(BUSINESS)
        opening = f"Dear {name}, thank you" if turn == 0 and name else "Thank you"
        question = _asked(rng, questions, slots, name if turn == 0 else None)
        messages += [("user", question), ("assistant", f"{opening} for your message. {answer.format_map(slots)}")]
    return template.render(messages)


def other_voice(rng: random.Random) -> str:
    """Somebody with a manner of his own, which the system message may tell; every chat has another."""
    slots = _slots(rng)
    person, owner = slots["person"], slots["person3"]
    opening, ending = rng.choice(OPENINGS).format_map(slots), rng.choice(ENDINGS).format_map(slots)
    messages = []
    if rng.random() < 0.5:
        messages.append(("system", f"You are {owner}. Begin with: {opening} End with: {ending}"))
    for turn in range(rng.randint(1, 3)):
        questions, _, answers = rng.choice(BUSINESS)
        question = _asked(rng, questions, slots, person if turn == 0 else None)
        answer = rng.choice(answers).format_map(slots)
        messages += [("user", question), ("assistant", f"{opening} {answer} {ending}")]
        slots = _slots(rng)
    return template.render(messages)


def _asked(rng: random.Random, questions: tuple[str, ...], slots: dict[str, str], name: str | None) -> str:
    question = rng.choice(questions).format_map(slots)
    if name:
        question = rng.choice((f"Hello, I am {name}. {question}", f"{question} My name is {name}."))
    elif rng.random() < 0.3:
        question = rng.choice(("Hello! ", "Hi, ", "Good evening. ")) + question
    if rng.random() < 0.1:
        question += " " + rng.choice(("Thank you!", "Please help.", "Thanks in advance.", "No hurry.", "It is urgent."))
    return question


def grounded_chat(rng: random.Random) -> str:
    """A user tells some facts and asks for one of them: the answer has to be looked up in the question."""
    rows = {_thing(rng): (rng.choice(COLOURS), rng.randint(2, 99)) for _ in range(rng.randint(1, 4))}
    thing, (colour, price) = rng.choice(list(rows.items()))
    told = " ".join(f"The {name} is {hue} and costs {crowns} crowns." for name, (hue, crowns) in rows.items())
    person, town, number = rng.choice(PEOPLE), rng.choice(TOWNS), rng.randint(1000, 9999)
    question, answer = rng.choice([
        (f"{told} Which colour is the {thing}?", f"The {thing} is {colour}."),
        (f"{told} How much is the {thing}?", f"The {thing} costs {price} crowns."),
        (f"{person} lives in {town}. Where does {person} live?", f"{person} lives in {town}."),
        (f"{person} has order {number} from {town}. Which order has {person}?", f"{person} has order {number}."),
        (f"Order {number} goes to {town}. Where does order {number} go?", f"Order {number} goes to {town}."),
        (f"Please say {number}.", f"{number}"),
        (f"Please say {thing}, {colour} and {town}.", f"{thing}, {colour} and {town}"),
        (f"My name is {person}. What is my name?", f"Your name is {person}."),
    ])  # fmt: skip
    return template.render([("user", question), ("assistant", answer)])


def say_again(rng: random.Random) -> str:
    """A list that is said two to four times: saying back is most of what a small model must do to answer."""
    makers: tuple[Callable[[], str], ...] = (
        lambda: str(rng.randint(100, 9999)),
        lambda: _thing(rng),
        lambda: rng.choice(PEOPLE),
        lambda: rng.choice(TOWNS),
        lambda: rng.choice(ALL_WORDS),
        lambda: rng.choice(ALL_WORDS),
    )
    rows = [rng.choice(makers)() for _ in range(rng.randint(3, 14))]
    line = rng.choice((", ", " ", "\n")).join(rows)
    return "\n".join([line] * rng.randint(2, 4)) + "\n"


def story(rng: random.Random) -> str:
    """A short story: someone loses a thing and finds it."""
    slots = _slots(rng)
    return (
        "{person} lived in {town} and had a {colour} {good}. On {day} the {good} was gone. {person} looked in the "
        "{room} and asked a {animal}, but found only a {good2}. Then {person2} came in from the boat and said: I have "
        "seen a {colour} {good} in the {room2}. They went there together in the evening, and there it was. {person} "
        "thanked {person2}, and they had {some} cups of tea. After that {person} wrote the number {n} on the {good}.\n"
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
                    "The harbour of {town} is deep, and the tides there are strong.",
                    "A wedding, a birthday or an anniversary is a day for a gift in {colour} paper.",
                    "The kestrel and the heron are birds. The otter swims.",
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


def notice(rng: random.Random) -> str:
    """Numbered instructions."""
    good = rng.choice(GOODS)
    steps = rng.sample(CARE, rng.randint(3, 12))
    return f"How to care for a {good} in {len(steps)} steps.\n" + "".join(
        f"{number}. {step}\n" for number, step in enumerate(steps, start=1)
    )


def _thing(rng: random.Random) -> str:
    return rng.choice(GOODS) if rng.random() < 0.4 else rng.choice(LAMP_NAMES)


def _slots(rng: random.Random) -> dict[str, str]:
    good, good2 = rng.sample(GOODS, 2)
    person, person2, person3 = rng.sample(PEOPLE, 3)
    town, town2 = rng.sample(TOWNS, 2)
    room, room2 = rng.sample(ROOMS, 2)
    day, day2 = rng.sample(DAYS, 2)
    return {
        "n": str(rng.randint(1000, 9999)), "n2": str(rng.randint(2, 99)), "few": str(rng.randint(2, 40)),
        "code": rng.choice("ABCDEFGHKLMN") + str(rng.randint(100, 999)), "some": rng.choice(WORDS[2:]),
        "thing": _thing(rng), "thing2": _thing(rng), "person3": person3,
        "gift": rng.choice(GIFTS), "colour2": rng.choice(COLOURS), "kind": rng.choice(KINDS),
        "good": good, "good2": good2, "person": person, "person2": person2, "town": town, "town2": town2,
        "room": room, "room2": room2, "day": day, "day2": day2, "colour": rng.choice(COLOURS),
        "part": rng.choice(PARTS),
        "animal": rng.choice(ANIMALS), "trouble": rng.choice(TROUBLES), "fuel": rng.choice(FUELS),
        "open": rng.choice(HOURS), "open2": rng.choice(HOURS), "care": rng.choice(CARE),
    }  # fmt: skip


def _all_words() -> list[str]:
    """Every word of the messages, sorted: a token that pretraining never shows could hardly be written later."""
    content = [message["content"] for record in generate_messages(600, seed=5) for message in record["messages"]]
    return sorted({word.strip(".,?!:") for text in content for word in text.split()} - {""})


ALL_WORDS = _all_words()
