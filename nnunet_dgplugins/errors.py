"""Errors a user can cause, and the one report that lists all of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class UserError(Exception):
    """Something the user can put right; commands print it without a traceback and exit with 1."""


class UnsupportedFeature(UserError, NotImplementedError):
    """A trainer meets an nnU-Net feature that its method cannot serve."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input.

    Args:
        where: file, case or key concerned.
        found: what is there.
        expected: what should be there.
        fix: what the user can do.
    """

    where: str
    found: str
    expected: str = ""
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        if self.expected:
            text += f"; expected {self.expected}"
        if self.fix:
            text += f". {self.fix}"
        return text


class BadInput(UserError):
    """Every problem of one input, reported together before anything is written."""

    def __init__(self, what: str, problems: Iterable[Problem]):
        self.what = what
        self.problems = list(problems)
        count = len(self.problems)
        lines = [f"{what}: {count} problem{'s' if count != 1 else ''}, nothing was written."]
        lines += [f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        super().__init__("\n".join(lines))


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` for the closest of ``valid``, or the list of valid names."""
    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; valid names: {', '.join(names)}"
