"""How many inputs a fuzz test takes: 10,000 in the usual run, `FUZZ_EXAMPLES` where that is set (make fuzz).

Hypothesis makes the valid content and one seed; from the seed come `MUTANTS` inputs, so that 10,000 of them take the
time that Hypothesis alone would need for a few hundred. A failure names the very input.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10000"))
MUTANTS = 50
SEEDS = st.integers(0, 2**48)


def fuzzed(inputs_each: int = MUTANTS) -> Callable[[Any], Any]:
    """Settings of a fuzz test: the same inputs each time, unless another number of them is asked for.

    Args:
        inputs_each: how many inputs one example of Hypothesis becomes.
    """
    return settings(
        max_examples=max(1, EXAMPLES // inputs_each),
        deadline=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
        # Not "explain": it traces every line of every input, which takes five times as long as the inputs.
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
    )


# What breaks parsers: edges of encodings, of nesting and of numbers.
NASTY = [
    b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b'"', b"\\", b"\\u0000", b"\\ud800", b"[",
    b"]", b"{", b"}", b",", b":", b"=", b"'", b"#", b"nan", b"inf", b"-inf", b"NaN", b"-", b"0", b"1e999", b"9" * 400,
    b"[" * 2000, b'{"a":' * 1200, b"\xe2\x80\xa8", b"\x1b[31m", b"\x9b", "\u202e".encode(), "\U0001f642".encode(),
    b"true", b"null", b" ", b"\t", b"1979-13-32", b"0x", b"_", b'"""', b"[[phase]]", b"export ", b"${A}", b"9" * 5000,
]  # fmt: skip
LEAVES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 8, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), "", "a",
    "lora", "fp16", "\x1b[31m", "\ud800", "user", "assistant", "top", "\u202e", "x" * 70, "2025-01-02", "1e5",
]  # fmt: skip


def mutants(content: bytes, seed: int) -> Iterator[bytes]:
    """The content itself, then it with a few bytes cut out and others put in: that reaches far into a parser."""
    yield content
    chance = random.Random(seed)
    for _ in range(MUTANTS - 1):
        changed = content
        for _ in range(chance.randint(1, 4)):
            at = chance.randint(0, len(changed))
            new = chance.choice(NASTY) if chance.random() < 0.7 else chance.randbytes(chance.randint(0, 6))
            changed = changed[:at] + new + changed[at + chance.choice((0, 0, 1, 1, 2, 8, 40)) :]
        yield changed


def any_value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly a leaf that some rule speaks of."""
    kind = chance.random()
    if depth > 2 or kind < 0.8:
        return chance.choice(LEAVES)
    if kind < 0.9:
        return [any_value(chance, depth + 1) for _ in range(chance.randint(0, 3))]
    return {chance.choice("abc") + chance.choice(("", "\x1b")): any_value(chance, depth + 1) for _ in range(2)}


def changed(plain: Any, places: list[tuple[str, ...]], chance: random.Random) -> Any:
    """The object with one to three values in other places of it."""
    for _ in range(chance.randint(1, 3)):
        place, inside = chance.choice(places), plain
        for step in place[:-1]:
            inside = inside[step] if isinstance(inside, dict) and isinstance(inside.get(step), dict) else {}
        inside[place[-1]] = any_value(chance)
    return plain
