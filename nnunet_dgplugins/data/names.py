"""Names of cases and sites: safe in files on every system, and the nearest one to a typing error."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches


def safe_name(text: str) -> str:
    """Return ``text`` with letters, digits, ``-`` and ``_`` only; accents are taken off, the rest becomes ``-``."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-_")
    if safe:
        return safe
    # nothing of the name survives in ASCII (another script): its code points still tell two names apart
    return "u" + "-".join(f"{ord(char):x}" for char in text.strip())


def near(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of ``valid``, or nothing: lists of cases are too long to print."""
    close = get_close_matches(name, sorted(valid), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
