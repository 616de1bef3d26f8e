"""Renders a report: one HTML file that loads nothing, and its numbers beside it as CSV and JSON."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from nnunet_dgplugins import __version__
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation import comparison
from nnunet_dgplugins.evaluation.report.content import Report
from nnunet_dgplugins.evaluation.report.parts import Section
from nnunet_dgplugins.evaluation.report.sections import background, class_metrics, lead, results
from nnunet_dgplugins.evaluation.report.views import views
from nnunet_dgplugins.files import write_bytes, write_json

JSON_FORMAT = 1
_PACKAGES = ("nnunetv2", "torch", "numpy", "scipy", "pandas", "matplotlib", "SimpleITK")
_ELSEWHERE = "Trainings, predictions and numbers of cases may come from another machine, with other versions."


def write_report(report: Report, path: Path) -> list[Path]:
    """Write the page, and its numbers beside it; each file in one step.

    Args:
        report: what it shows.
        path: of the page; the numbers get its name with ``.csv`` and ``.json``.

    Returns:
        The written files, the page last: it is there only when everything is.

    Raises:
        UserError: the page's name does not end in ``.html``.
    """
    csv, json_file = beside(path)
    html = render(report)
    write_bytes(csv, report.table.to_csv(index=False, lineterminator="\n").encode())
    write_json(json_file, to_json(report))
    write_bytes(path, html.encode())
    return [csv, json_file, path]


def beside(path: Path) -> tuple[Path, Path]:
    """Return the files that a page's numbers go to."""
    if path.suffix != ".html":
        raise UserError(f"{path}: a page's name ends in .html.")
    return path.with_suffix(".csv"), path.with_suffix(".json")


def render(report: Report) -> str:
    """Return the page; the same report gives the same page."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    sections = [*results(report), *views(report), *background(report), _made_with()]
    shown = [section for section in sections if section.texts or section.blocks]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_resource("page.html.j2"))
    style = Markup(_resource("style.css"))  # ours, not a user's
    return template.render(title=report.title, lead=lead(report), sections=shown, style=style) + "\n"


def to_json(report: Report) -> dict[str, Any]:
    """Return the numbers of the page as plain JSON values; what is not defined is null."""
    table, metric, baseline = report.table, report.metric, report.baseline
    against = {
        name: comparison.records(function(report.compared, baseline, metric)) if baseline else []
        for name, function in (
            ("differences", comparison.differences),
            ("tests", comparison.paired_tests),
            ("wins", comparison.wins),
        )
    }
    return {
        "format": JSON_FORMAT,
        "title": report.title,
        "protocol": report.protocol,
        "metric": metric,
        "baseline": baseline,
        "budget": report.budget,
        "bounds": list(report.bounds),
        "matrix": comparison.records(comparison.matrix(table, metric)),
        "intervals": comparison.records(comparison.intervals(table, metric)),
        **against,
        "classes": comparison.records(comparison.by_class(report.compared, class_metrics(report))),
    }


def versions() -> dict[str, str]:
    """Return the versions that this machine has; packages that are absent are left out."""
    found = {"nnunet_dgplugins": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _made_with() -> Section:
    text = ", ".join(f"{name} {number}" for name, number in versions().items())
    return Section("versions", "Versions", [f"This page was written with {text}. {_ELSEWHERE}"])


def _resource(name: str) -> str:
    return (files("nnunet_dgplugins.evaluation.report") / name).read_text(encoding="utf-8")
