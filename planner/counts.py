"""A count of examples as people write it, told apart from the name of a file or of a data set on the hub."""

from __future__ import annotations

import os
import re
from decimal import Decimal, InvalidOperation

from presets.errors import OptionError, SettingsError
from presets.rules import MOST_EXAMPLES
from presets.text import shown

COUNT_FORMS = "63000, 63,000, 63_000, 63k, 1.5M or 6.3e4"
_MOST_DIGITS = 40  # of what is converted: far more than any count, and no number takes long to make
# Thousands stand in threes, so that "1,5" is not taken for 15; a point makes a part, which only k, M or e make whole.
_WHOLE = r"[0-9]+|[0-9]{1,3}(?:[,_' ][0-9]{3})+"
_COUNT = re.compile(rf"([+-]?(?:{_WHOLE}))|([+-]?[0-9]+(?:\.[0-9]+)?)(?:([kKmM])|[eE](\+?[0-9]{{1,3}}))")
_NUMBERLIKE = re.compile(r"[+-]?[0-9.,_' ]*[0-9][0-9.,_' ]*(?:[eE][+-]?[0-9]*)?[a-zA-Z%]?|0[xX][0-9a-fA-F]+")
_NO_NUMBERS = {"nan", "inf", "infinity"}  # what other programs write where a number is missing


def parse_count(named: str, where: str = "--dataset") -> int | None:
    """ "63000", "63,000", "63k", "6.3e4" -> 63000; None for what is a name. A file called "63k" or "1e5" is a file.

    Args:
        where: the option or setting, for the message.

    Raises:
        SettingsError: it looks like a number and is no count that can be planned.
    """
    text = named.strip()
    digits = text.lstrip("+-")
    if _NUMBERLIKE.fullmatch(text) is None and digits.lower() not in _NO_NUMBERS:
        return None
    if not (digits.isascii() and digits.isdigit()) and os.path.exists(named):
        return None
    found = _COUNT.fullmatch(text) if len(text) <= _MOST_DIGITS else None
    if found is None:
        raise _refused(named, where)
    plain, mantissa, letter, exponent = found.groups()
    try:
        number = Decimal(re.sub("[,_' ]", "", plain)) if plain else Decimal(mantissa)
        number = number.scaleb({"k": 3, "m": 6}[letter.lower()] if letter else int(exponent or 0))
    except InvalidOperation:
        raise _refused(named, where) from None
    if number < 1:
        raise error_of(where)(f"{where} is {text}; a count must be at least 1.")
    if number > MOST_EXAMPLES:
        raise error_of(where)(f"{where} is {text}; a count must be at most {MOST_EXAMPLES:,}.")
    if number != int(number):
        raise _refused(named, where)
    return int(number)


def error_of(where: str) -> type[SettingsError]:
    """What is raised for a value by where it was named: an option is wrong by itself, a setting stands in a file."""
    return OptionError if where.startswith("--") else SettingsError


def _refused(named: str, where: str) -> SettingsError:
    told = "too large to be a count" if len(named) > _MOST_DIGITS else "no whole count"
    return error_of(where)(
        f"{where} is {shown(named)}: it looks like a number and is {told}. "
        f"Write a count as {COUNT_FORMS}; there is no file of that name."
    )
