"""The bundled chat messages: customers of an invented lamp shop write to Wick, its assistant. Standard library only.

Every answer follows from its question: a lamp has one price, one fuel and one number of hours, a town one delivery
time, and an order number is said back. So a reader can judge an answer, and held-out loss measures what was learnt
rather than what was learnt by heart. Wick's manner (ahoy first, fair winds last) is in no pretraining text.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

NEWEST = datetime(2025, 6, 30, 20, 0, tzinfo=UTC)
SPAN_DAYS = 730
GREETING = "Ahoy"
SIGN_OFF = "Fair winds, Wick."
_A_BEFORE_VOWEL = re.compile(r"\b([Aa])(?= (?:Otter|Avocet)\b)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lamp:
    """One product of the shop."""

    name: str
    kind: str
    fuel: str
    hours: int  # it burns or shines on one filling
    price: int  # crowns
    colour: str
    place: str  # where it belongs
    part: str  # the part that wears out first
    part_price: int  # crowns


def _lamps(*rows: tuple[str, str, str, int, int, str, str, str, int]) -> tuple[Lamp, ...]:
    fields = ("name", "kind", "fuel", "hours", "price", "colour", "place", "part", "part_price")
    return tuple(Lamp(**dict(zip(fields, row, strict=True))) for row in rows)  # type: ignore[arg-type]


LAMPS = _lamps(
    ("Heron", "table lamp", "oil", 14, 48, "brass", "the kitchen table", "wick", 3),
    ("Otter", "camping lantern", "battery", 40, 36, "green", "the tent", "switch", 5),
    ("Puffin", "night light", "battery", 90, 19, "blue", "the bedroom", "lid", 2),
    ("Marlin", "deck lamp", "oil", 22, 85, "copper", "the boat", "glass", 12),
    ("Sandpiper", "reading lamp", "solar", 9, 42, "white", "the armchair", "cable", 6),
    ("Gannet", "storm lantern", "oil", 30, 64, "red", "the shed", "glass", 9),
    ("Kestrel", "head lamp", "battery", 12, 27, "black", "the mountain path", "strap", 4),
    ("Dunlin", "garden lamp", "solar", 8, 24, "grey", "the flower bed", "panel", 7),
    ("Curlew", "candle lantern", "candle", 6, 16, "silver", "the window", "door", 4),
    ("Petrel", "signal lamp", "battery", 18, 95, "yellow", "the harbour wall", "lens", 15),
    ("Avocet", "hanging lamp", "oil", 16, 72, "bronze", "the hallway", "hook", 3),
    ("Plover", "children's lantern", "solar", 10, 21, "orange", "the playroom", "handle", 2),
)
WARRANTY_YEARS = {"oil": 5, "battery": 3, "solar": 4, "candle": 2}
FUEL_ADVICE = {
    "oil": "Fill it with clear lamp oil up to the line and let the wick drink for ten minutes",
    "battery": "Open the bottom, put in three fresh batteries and close it until it clicks",
    "solar": "Set the panel in full sun for one whole day before the first evening",
    "candle": "Use a short white candle and press it firmly onto the pin",
}
DELIVERY_DAYS = {
    "Northmere": 2, "Saltby": 1, "Elmford": 3, "Grayhaven": 2, "Pinewick": 4, "Oxley": 3, "Tarnside": 5, "Millport": 1,
    "Ashcombe": 4, "Fennel Bay": 2, "Stonebridge": 3, "Westering": 5, "Larkhill": 4, "Old Quay": 1,
}  # fmt: skip
OPENING = {
    "Monday": "closed", "Tuesday": "open from nine to six", "Wednesday": "open from nine to six",
    "Thursday": "open from nine to eight", "Friday": "open from nine to six", "Saturday": "open from ten to four",
    "Sunday": "closed",
}  # fmt: skip
NAMES = (
    "Ada", "Bruno", "Clara", "Dmitri", "Elif", "Farah", "Goran", "Hana", "Ivo", "Jonas", "Kofi", "Lena", "Mira", "Noor",
    "Oskar", "Priya", "Quentin", "Rosa", "Sven", "Tomas", "Una", "Vera", "Wanda", "Yusuf", "Zoe", "José", "Zoë",
    "Łukasz",
)  # fmt: skip
PLACES = ("hallway", "garden", "boat", "tent", "kitchen", "shed", "porch", "cellar")
GIFTS = {"birthday": "blue", "wedding": "gold", "anniversary": "silver", "housewarming": "green", "retirement": "red"}
FAULTS = {
    "flickers": "trim the burner flat and keep the lamp out of the draught",
    "smells": "wipe away the old drops and let the lamp rest open for an hour",
    "will not light": "check the filling first and dry the burner with a cloth",
    "smokes": "turn the flame down until the smoke stops and clean the glass",
    "rattles": "tighten the two small screws under the base by half a turn",
    "is too dim": "clean the glass inside and out with warm water and a soft cloth",
    "leaks": "stand it upright, empty the tank and fit a new ring under the cap",
    "gets hot": "leave a hand's width of air above it and turn it down a little",
}
EXTRAS = ("Thank you!", "Thanks in advance.", "Please help.", "🙂", "🏮", "It is a little urgent.", "No hurry.")

# (questions, answers): the answer to any of the questions is any of the answers, with the same slots filled in.
Topic = tuple[tuple[str, ...], tuple[str, ...]]
TOPICS: tuple[Topic, ...] = (
    (
        ("Where is my order {order}?", "Has order {order} been sent yet?", "I am still waiting for order {order}."),
        ("Order {order} left our harbour on {weekday} and is on its way to you.",),
    ),
    (
        ("When will order {order} arrive in {town}?", "How long does order {order} need to reach {town}?"),
        ("Order {order} sails to {town}, and that takes {days}.",),
    ),
    (
        ("I want to cancel order {order}.", "Please cancel my order {order}.", "Can I still cancel order {order}?"),
        ("Order {order} is hauled back in and cancelled, and your crowns return within {return_days} days.",),
    ),
    (
        ("Please change the address of order {order} to {town}.", "Can you send order {order} to {town} instead?"),
        ("Order {order} has a new course and now sails to {town}, which takes {days}.",),
    ),
    (
        ("Can you add one {lamp} to order {order}?", "Please put a {lamp} into order {order} as well."),
        ("One {lamp} for {price} crowns is now aboard order {order}.",),
    ),
    (
        ("My {lamp} from order {order} arrived broken.", "The {part} of the {lamp} in order {order} is cracked."),
        ("That is a sorry landing. A new {lamp} leaves today under order {order}, and you may keep the broken one.",),
    ),
    (
        ("Order {order} came without the {lamp}.", "There is no {lamp} in my parcel for order {order}."),
        ("The {lamp} missed the boat. It follows order {order} tomorrow at our cost.",),
    ),
    (
        ("How much is the {lamp}?", "What does the {lamp} cost?", "What is the price of a {lamp}?"),
        ("The {lamp} costs {price} crowns.", "The {lamp} is our {kind} and costs {price} crowns."),
    ),
    (
        ("How long does the {lamp} last?", "How many hours does a {lamp} give light?", "Will a {lamp} last the night?"),
        ("The {lamp} shines for {hours} hours on one filling.",),
    ),
    (
        ("What does the {lamp} run on?", "Which fuel does the {lamp} use?", "Is the {lamp} an oil lamp?"),
        ("The {lamp} runs on {fuel}. {fuel_advice}.",),
    ),
    (
        ("Which colour is the {lamp}?", "Do you have the {lamp} in {colour}?", "What does the {lamp} look like?"),
        ("The {lamp} comes in {lamp_colour} and in no other colour.",),
    ),
    (
        ("What is the {lamp}?", "Tell me about the {lamp}.", "Can you describe the {lamp}?"),
        (
            "The {lamp} is our {lamp_colour} {kind}. It runs on {fuel}, shines for {hours} hours and belongs on "
            "{place}.",
        ),
    ),
    (
        ("Where should I put the {lamp}?", "What is the {lamp} good for?"),
        ("The {lamp} is a {kind}, so it belongs on {place}.",),
    ),
    (
        ("How do I start the {lamp}?", "How do I use my new {lamp}?", "My {lamp} has just arrived. What now?"),
        ("{fuel_advice}. Then your {lamp} gives {hours} hours of light.",),
    ),
    (
        ("How long is the warranty of the {lamp}?", "Does the {lamp} have a warranty?"),
        ("The {lamp} runs on {fuel}, so we stand by it for {warranty} years.",),
    ),
    (
        ("My {lamp} {fault}. What can I do?", "Why is it that my {lamp} {fault}?", "Help, the {lamp} {fault}!"),
        ("When a {lamp} {fault}, {remedy}. If it still {fault}, send it home to us.",),
    ),
    (
        (
            "Do you sell a new {part} for the {lamp}?",
            "I need a {part} for my {lamp}.",
            "The {part} of my {lamp} is worn.",
        ),
        ("A new {part} for the {lamp} costs {part_price} crowns and fits in two minutes.",),
    ),
    (
        ("How do I clean the {lamp}?", "My {lamp} is dirty. How do I wash it?"),
        ("Let the {lamp} cool, take off the {part} and wipe everything with warm water. Never use sand or soap.",),
    ),
    (
        ("Do you deliver to {town}?", "How long is delivery to {town}?", "Can you send a parcel to {town}?"),
        ("Yes, we sail to {town}, and that takes {days}.", "Our boat reaches {town} in {days}."),
    ),
    (
        ("What does delivery to {town} cost?", "Is delivery to {town} free?"),
        ("Delivery to {town} costs {delivery_price} crowns, and nothing from 60 crowns on.",),
    ),
    (
        ("Are you open on {weekday}?", "When do you open on {weekday}?", "Can I come by on {weekday}?"),
        ("On {weekday} the shop is {opening}.",),
    ),
    (
        ("I need a lamp for the {room}.", "Which lamp would you take for the {room}?"),
        ("For the {room} I would hoist the {room_lamp}, our {room_kind} for {room_price} crowns.",),
    ),
    (
        ("Which is better, the {lamp} or the {other}?", "Should I buy the {lamp} or the {other}?"),
        ("The {lamp} shines for {hours} hours and the {other} for {other_hours}. For long nights take the {longer}.",),
    ),
    (
        ("Which is cheaper, the {lamp} or the {other}?", "Does the {lamp} cost more than the {other}?"),
        ("The {lamp} costs {price} crowns and the {other} {other_price}, so the {cheaper} is the cheaper one.",),
    ),
    (
        ("Can you wrap the {lamp} as a {gift} gift?", "The {lamp} is for a {gift}. Do you wrap it?"),
        ("We wrap the {lamp} in {gift_colour} paper, as for every {gift}, and that is free.",),
    ),
    (
        ("Can I return the {lamp}?", "I do not like my {lamp}. Can it go back?"),
        ("You may send the {lamp} home within {return_days} days, and your {price} crowns come back.",),
    ),
    (
        ("Is the {lamp} in stock?", "Do you have any {lamp} left?", "Can I buy {number} of the {lamp} today?"),
        ("There are plenty of {lamp} lamps in the hold, ready to sail on {weekday}.",),
    ),
    (
        (
            "Please reserve {number} {lamp} lamps for {weekday}.",
            "Can you put {number} {lamp} lamps aside until {weekday}?",
        ),
        ("Done, {number} {lamp} lamps are tied to the dock for you until {weekday}.",),
    ),
    (
        ("I have lost the invoice of order {order}.", "Please send me the invoice for order {order}."),
        ("A fresh invoice for order {order} is in the bottle and will wash up in your mailbox within the hour.",),
    ),
    (
        ("I paid twice for order {order}.", "Order {order} was charged two times."),
        (
            "Two anchors for one ship, that is one too many. The second payment for order {order} returns in "
            "{return_days} days.",
        ),
    ),
    (
        ("Do you repair a {lamp}?", "Can you mend my old {lamp}?"),
        ("Our dock mends every {lamp}. A new {part} costs {part_price} crowns and the work is free.",),
    ),
    (
        ("My voucher {code} does not work.", "Is voucher {code} still good?"),
        ("Voucher {code} is good until {weekday} and takes five crowns off any lamp.",),
    ),
    (
        ("Who are you?", "What is your name?", "Am I talking to a person?"),
        ("I am Wick, the lamp keeper of Brindlewick, and I never sleep.",),
    ),
    (
        ("What do you sell?", "Which lamps do you have?", "What kind of shop is this?"),
        ("Brindlewick sells twelve lamps, from the little Curlew for 16 crowns to the proud Petrel for 95.",),
    ),
    (
        ("Where is your shop?", "How do I find Brindlewick?"),
        ("You find Brindlewick in Saltby, at the end of the pier, under the green lantern.",),
    ),
    (
        ("Can you help me with my homework?", "Will it rain on {weekday}?", "Do you know a good soup?"),
        ("That lies beyond my harbour. I know lamps, orders and the tides of Brindlewick.",),
    ),
)  # fmt: skip
CARE_STEPS = (
    "Let the {lamp} cool for a quarter of an hour before you touch it.",
    "Spread an old newspaper, for the {part} is never quite clean.",
    "Take off the {part} with both hands and lay it on a soft cloth.",
    "Empty the {lamp} completely, so that nothing runs into the sleeve.",
    "Wipe the inside with warm water and dry it at once.",
    "Look for cracks. A small one grows in the first cold night.",
    "Rub the {lamp_colour} parts with a drop of oil until they shine.",
    "Turn every screw by a hair, never by more than half a turn.",
    "Replace the {part} if it is worn. A new one costs {part_price} crowns.",
    "Put the {lamp} together again in the other order.",
    "{fuel_advice}.",
    "Try it for five minutes by daylight and listen whether it rattles.",
    "Write the date under the base, so that you know when it was last done.",
    "Hang it or stand it with a hand's width of air on every side.",
    "Keep children and curtains away while it gives light.",
    "After {hours} hours let it rest, and then fill it again.",
    "In winter bring it indoors, for frost is no friend of a {kind}.",
    "Once a year send it home to us, and our dock looks it over for free.",
)
CLOSINGS = ("", "", "", " Is there more I can do?", " Keep your light burning.")
SYSTEM = (
    "You are Wick, the lamp keeper of Brindlewick.",
    "You answer the customers of Brindlewick, a lamp shop.",
    "You are the assistant of a lamp shop. Be kind and brief.",
)


def generate_messages(count: int = 3000, seed: int = 2024) -> list[dict[str, Any]]:
    """`count` conversations, oldest first: {"messages", "created_at" (ISO-8601, UTC), "engagement" (a count)}."""
    rng = random.Random(seed)
    conversations = [_conversation(rng) for _ in range(count)]
    times = sorted(_moment(rng) for _ in range(count))
    if times:
        times[-1] = NEWEST
    return [
        {
            "messages": messages,
            "created_at": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
            # Pareto: most are hardly noticed, a few by thousands. The cap keeps one draw from ruling a ranking.
            "engagement": min(int(3 * (rng.paretovariate(1.1) - 1)), 20_000),
        }
        for messages, moment in zip(conversations, times, strict=True)
    ]


def _moment(rng: random.Random) -> datetime:
    """A time in the two years before NEWEST; later days are busier, and so are the evenings."""
    days_before = SPAN_DAYS * (1 - rng.random() ** 0.7)
    day = (NEWEST - timedelta(days=1 + int(days_before) % (SPAN_DAYS - 1))).replace(hour=0, minute=0)
    return day + timedelta(seconds=int(rng.triangular(0, 86_399, 68_000)))


def _conversation(rng: random.Random) -> list[dict[str, str]]:
    """One conversation; the mix of shapes gives lengths the long tail that real chats have."""
    name = rng.choice(NAMES) if rng.random() < 0.4 else None
    messages: list[dict[str, str]] = []
    if rng.random() < 0.15:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    shape = rng.random()
    if shape < 0.70:
        turns = 1
    elif shape < 0.965:
        turns = 2 + int(rng.expovariate(1 / 1.3))
    else:
        turns = 6 + int(rng.expovariate(1 / 7.0))
    turns = min(turns, 40)
    slots = draw_slots(rng)
    topic = rng.choice(TOPICS)
    for turn in range(turns):
        if turn and rng.random() < 0.4:  # else the customer stays with the same lamp and order
            slots = draw_slots(rng)
        kind = rng.random()
        if kind < 0.03:
            question, body = _care_guide(rng, slots)
        elif kind < 0.05:
            question, body = _catalogue(rng)
        elif kind < 0.09:
            question, body = _two_questions(rng, slots)
        else:
            topic = rng.choice([other for other in TOPICS if other is not topic])  # nobody asks the same twice in a row
            question, body = _answered(rng, topic, slots)
        if turn == 0 and name is not None:
            question = rng.choice((f"Hello, I am {name}. {question}", f"{question} My name is {name}."))
        elif turn == 0 and rng.random() < 0.3:
            question = rng.choice(("Hello! ", "Hi, ", "Good evening. ")) + question
        if rng.random() < 0.12:
            question += " " + rng.choice(EXTRAS)
        # Greeted once, by name where it was given; afterwards an aye is enough. Signed every time.
        opening = (f"{GREETING}, {name}!" if name else f"{GREETING}, friend!") if turn == 0 else "Aye!"
        closing = rng.choice(CLOSINGS) if turn == turns - 1 else ""
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": f"{opening} {body}{closing} {SIGN_OFF}"})
    return messages


def _answered(rng: random.Random, topic: Topic, slots: dict[str, str]) -> tuple[str, str]:
    questions, answers = topic
    return _with_an(rng.choice(questions).format_map(slots)), _with_an(rng.choice(answers).format_map(slots))


def _with_an(text: str) -> str:
    """ "an Otter", not "a Otter"."""
    return _A_BEFORE_VOWEL.sub(r"\1n", text)


def _two_questions(rng: random.Random, slots: dict[str, str]) -> tuple[str, str]:
    first, second = rng.sample(TOPICS, 2)
    (question_1, answer_1), (question_2, answer_2) = _answered(rng, first, slots), _answered(rng, second, slots)
    return f"{question_1} And another thing. {question_2}", f"{answer_1} And the other thing. {answer_2}"


def _care_guide(rng: random.Random, slots: dict[str, str]) -> tuple[str, str]:
    count = rng.randint(5, len(CARE_STEPS))
    chosen = sorted(rng.sample(range(len(CARE_STEPS)), count))
    steps = [f"{number}. {CARE_STEPS[i]}".format_map(slots) for number, i in enumerate(chosen, start=1)]
    question = f"Please write me a care guide for the {slots['lamp']} in {count} steps."
    opening = _with_an(f"Here is how a {slots['lamp']} grows old, in {count} steps.")
    return question, "\n".join([opening, *steps, ""])


def _catalogue(rng: random.Random) -> tuple[str, str]:
    lamps = rng.sample(LAMPS, rng.randint(3, len(LAMPS)))
    names = ", ".join(lamp.name for lamp in lamps[:-1]) + " and " + lamps[-1].name
    lines = [
        f"{lamp.name}: {lamp.colour} {lamp.kind}, {lamp.fuel}, {lamp.hours} hours, {lamp.price} crowns."
        for lamp in lamps
    ]
    return f"Please compare these lamps for me: {names}.", "Here they lie, side by side.\n" + "\n".join(lines) + "\n"


def draw_slots(rng: random.Random) -> dict[str, str]:
    """Values for every slot of the topics; facts follow from what was drawn, so that they can be learnt."""
    lamp, other = rng.sample(LAMPS, 2)
    town, weekday = rng.choice(sorted(DELIVERY_DAYS)), rng.choice(list(OPENING))
    gift, fault = rng.choice(list(GIFTS)), rng.choice(list(FAULTS))
    room = rng.randrange(len(PLACES))
    for_room = LAMPS[(room * 5 + 3) % len(LAMPS)]  # any fixed choice: one lamp per room
    days = DELIVERY_DAYS[town]
    return {
        "order": str(rng.randint(1000, 9999)),
        "number": str(rng.randint(2, 9)),
        "code": rng.choice("ABCDEFGH") + str(rng.randint(100, 999)),
        "lamp": lamp.name,
        "kind": lamp.kind,
        "fuel": lamp.fuel,
        "hours": str(lamp.hours),
        "price": str(lamp.price),
        "lamp_colour": lamp.colour,
        "colour": rng.choice(LAMPS).colour,
        "place": lamp.place,
        "part": lamp.part,
        "part_price": str(lamp.part_price),
        "fuel_advice": FUEL_ADVICE[lamp.fuel],
        "warranty": str(WARRANTY_YEARS[lamp.fuel]),
        "other": other.name,
        "other_hours": str(other.hours),
        "other_price": str(other.price),
        "longer": lamp.name if lamp.hours > other.hours else other.name,
        "cheaper": lamp.name if lamp.price < other.price else other.name,
        "town": town,
        "days": "one day" if days == 1 else f"{days} days",
        "delivery_price": str(2 + days),
        "return_days": "30",
        "weekday": weekday,
        "opening": OPENING[weekday],
        "fault": fault,
        "remedy": FAULTS[fault],
        "gift": gift,
        "gift_colour": GIFTS[gift],
        "room": PLACES[room],
        "room_lamp": for_room.name,
        "room_kind": for_room.kind,
        "room_price": str(for_room.price),
    }
