"""The parts that a page is put together from; the template knows these and nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        caption: what it shows.
        heading: names of its columns.
        rows: cells as text.
        texts: so many columns from the left are text, the others are numbers.
        notes: sentences below it.
    """

    caption: str
    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picture:
    """A picture within the page.

    Args:
        data: address that holds the whole picture.
        alt: what somebody who does not see it has to know.
        caption: shown below.
        narrow: several stand side by side where there is room.
    """

    data: str
    alt: str
    caption: str
    narrow: bool = False


@dataclass(frozen=True)
class Block:
    """Part of a section.

    Args:
        title: heading; "" for none.
        tables: its tables.
        figures: its pictures.
        terms: pairs of term and description.
        folded: where set, the block is closed under this line.
    """

    title: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Picture] = ()
    terms: Sequence[tuple[str, str]] = ()
    folded: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Args:
        anchor: its name in addresses.
        title: heading.
        texts: paragraphs.
        blocks: what follows.
    """

    anchor: str
    title: str
    texts: Sequence[str] = ()
    blocks: Sequence[Block] = field(default_factory=list)


def embedded(content: bytes, kind: str) -> str:
    """Return an address that holds a picture's bytes.

    Args:
        content: of the file.
        kind: ``svg+xml``, ``png`` or ``webp``.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
