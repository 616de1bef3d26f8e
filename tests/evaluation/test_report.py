"""The report of folders of predictions: whole, self-contained, the same again."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pandas
import pytest
from click.testing import CliRunner
from made_dataset import CASES, LENGTH, bar, make, write

from nnunet_dgplugins.cli.main import cli
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation import evaluate

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
SECTIONS = (
    "Results by site",
    "Against stock",
    "Cases by site",
    "Look at these first",
    "Cases",
    "Classes",
    "Definitions",
)


class Page(HTMLParser):
    """What a screen reader and a browser would find."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Folders of two methods; the second one is better by one voxel of ten everywhere."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    stock, better = make(tmp_path), tmp_path / "better"
    for case, (_, shared) in CASES.items():
        write(bar(2 + LENGTH - shared - 1), better / f"{case}.nii.gz")
    return stock, better


@pytest.fixture
def page(predictions: tuple[Path, Path], tmp_path: Path) -> Path:
    stock, better = predictions
    return report(tmp_path / "report.html", "501", f"stock={stock}", f"<b>ours</b>={better}")


def report(out: Path, *words: str) -> Path:
    done = CliRunner().invoke(cli, ["report", *words, "-o", str(out), "--jobs", "1"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.output.split()[-3:] == [str(out.with_suffix(ending)) for ending in (".csv", ".json", ".html")]
    return out


def test_the_page_shows_every_section_and_its_numbers_lie_beside_it(page: Path):
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert [title for title in titles if title in SECTIONS] == list(SECTIONS)
    assert "0.600 [" in text  # sites weigh equally: A 0.8, B 0.6, C 0.4
    assert "0.700 [" in text
    table = pandas.read_csv(page.with_suffix(".csv"))
    assert set(table["method"]) == {"stock", "<b>ours</b>"}
    numbers = json.loads(page.with_suffix(".json").read_text())
    (difference,) = numbers["differences"]
    assert difference["difference"] == pytest.approx(0.1)
    assert {row["target"]: row["ahead"] for row in numbers["wins"]} == {"A": 2, "B": 1, "C": 3}


def test_the_page_loads_nothing_and_keeps_names_as_text(page: Path):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert all(str(image["src"]).startswith("data:image/") for image in found.all("img"))
    assert not found.all("link")
    assert not any(script.get("src") for script in found.all("script"))
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text)
    assert "url(" not in re.sub(r"data:image[^\"]*", "", text)
    assert "&lt;b&gt;ours&lt;/b&gt;" in text
    assert "<b>ours" not in text


def test_it_can_be_read_without_eyes_and_without_a_mouse(page: Path):
    found = Page(page.read_text(encoding="utf-8"))
    assert found.all("html") == [{"lang": "en"}]
    assert all(len(str(image["alt"])) > 20 for image in found.all("img"))
    assert all(head.get("scope") in ("col", "row") for head in found.all("th"))
    assert len(found.all("caption")) == len(found.all("table")) > 3
    assert all(box.get("tabindex") == "0" and box.get("aria-label") for box in found.all("div") if box.get("role"))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {str(link["href"]).removeprefix("#") for link in found.all("a")}
    assert targets <= set(ids)
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert max(after - before for before, after in itertools.pairwise(levels)) <= 1


def test_best_median_and_worst_case_of_each_site_are_shown(page: Path):
    text = page.read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>([ABC]: [^<]*)</figcaption>", text)
    assert len(captions) == 2 * (2 + 1 + 3)  # methods x cases: each site has so few that all are shown
    assert "C: C_1, worst, Dice 0.200" in captions
    assert "C: C_3, best, Dice 0.600" in captions
    assert "C: C_2, median, Dice 0.400" in captions
    assert "A: A_1, best, Dice 0.900" in captions
    assert "A: A_2, worst, Dice 0.700" in captions  # of two cases neither is the median
    assert "B: B_1, best, Dice 0.600" in captions
    assert "cases without a picture" not in text


def test_pictures_that_cannot_be_drawn_are_counted_with_their_reasons(predictions: tuple[Path, Path], tmp_path: Path):
    stock, better = predictions
    images = tmp_path / "nnUNet_raw" / "Dataset501_Bars" / "imagesTs"
    for case in ("A_1", "A_2"):
        (images / f"{case}_0000.nii.gz").unlink()
    write(bar(2, shape=(6, 5, 24)), images / "C_3_0000.nii.gz")
    text = report(tmp_path / "r.html", "501", f"stock={stock}", f"ours={better}").read_text(encoding="utf-8")
    for name in ("stock", "ours"):
        (said,) = re.findall(rf"<p>[^<]*, {name}, [^<]*cases without a picture: ([^<]*)</p>", text)
        assert said == (
            "2 whose image is not where the dataset has its images, "
            "1 whose image or truth cannot be read or has another grid than the prediction."
        )
    assert len(re.findall(r"<figcaption>[ABC]: ", text)) == 2 * 3


def test_classes_are_shown_by_site_on_the_page_and_beside_it(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "<summary>Dataset501_Bars: by site, 3 sites</summary>" in text
    rows = json.loads(page.with_suffix(".json").read_text())["classes"]
    dice = {(row["method"], row["target"]): row["mean"] for row in rows if row["metric"] == "dice"}
    assert dice["stock", "A"] == pytest.approx(0.8)
    assert dice["<b>ours</b>", "C"] == pytest.approx(0.5)
    assert {row["class"] for row in rows} == {"prostate"}


def test_a_site_of_one_patient_is_said_to_give_no_interval(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "1 unseen site with one patient (B): how patients differ there is in no interval." in text
    rows = json.loads(page.with_suffix(".json").read_text())["intervals"]
    assert {row["target"] for row in rows} == {"A", "C", "mean unseen"}


def test_a_page_of_the_sources_own_cases_shows_them_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nnUNet_raw"))
    stock = make(tmp_path, source="A", cases={case: CASES[case] for case in ("A_1", "A_2")})
    page = report(tmp_path / "r.html", "501", str(stock))
    text = page.read_text(encoding="utf-8")
    assert "no unseen site" in text
    assert "No case is unseen: everything on this page is of the source" in text
    titles = set(re.findall(r"<h2[^>]*>([^<]*)</h2>", text))
    assert {"Cases by site", "Look at these first", "Cases", "Classes"} <= titles
    assert "A: A_2, worst, Dice 0.700" in text
    assert "(0.800)" in text  # in brackets as ever
    assert "Mean over seen cases" in text
    assert set(pandas.read_csv(page.with_suffix(".csv"))["split"]) == {"validation"}


def test_methods_without_a_common_case_are_not_said_to_be_pixels(predictions: tuple[Path, Path], tmp_path: Path):
    stock, better = predictions
    for folder, gone in ((stock, "C"), (better, "A")):
        for file in folder.glob(f"{gone}_*"):
            file.unlink()
    (stock / "B_1.nii.gz").unlink()
    text = report(tmp_path / "r.html", "501", f"stock={stock}", f"ours={better}", "--partial").read_text("utf-8")
    assert "No other method shares a case and seed with it yet." in text
    assert "canvases" not in text


def test_the_same_predictions_give_the_same_bytes(page: Path, predictions: tuple[Path, Path], tmp_path: Path):
    stock, better = predictions
    again = report(tmp_path / "again.html", "501", f"stock={stock}", f"<b>ours</b>={better}")
    assert again.read_bytes() == page.read_bytes()


def test_evaluate_writes_the_small_form(predictions: tuple[Path, Path], tmp_path: Path):
    out = tmp_path / "one.html"
    words = ["evaluate", "501", str(predictions[0]), "--html", str(out), "--jobs", "1"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0
    text = out.read_text(encoding="utf-8")
    assert "Results by site" in text
    assert "Against" not in text
    assert out.with_suffix(".json").is_file()


def test_doubt_comes_first_where_a_model_has_said_it(predictions: tuple[Path, Path], tmp_path: Path):
    stock, _ = predictions
    doubt = {case: {"doubt": 0.1 * place, "slices": [0.0, 0.3, None]} for place, case in enumerate(CASES)}
    (stock / "dgplugins_doubt.json").write_text(json.dumps(doubt))
    text = report(tmp_path / "r.html", "501", str(stock)).read_text(encoding="utf-8")
    listed = text[text.index("own doubt, highest first") :]
    assert listed.index("C_3") < listed.index("C_2") < listed.index("A_2")


def test_names_that_look_like_formulae_are_names(predictions: tuple[Path, Path], tmp_path: Path):
    stock, better = predictions
    text = report(tmp_path / "r.html", "501", f"stock={stock}", f"a$x_{{$b={better}").read_text(encoding="utf-8")
    assert "a$x_{$b" in text


@pytest.mark.parametrize("protocol", ["desam", "samsdg", "dcam"])
def test_every_protocol_has_a_page_that_claims_no_more_than_it_knows(
    predictions: tuple[Path, Path], tmp_path: Path, protocol: str
):
    stock, better = predictions
    words = ["501", f"stock={stock}", f"ours={better}", "--protocol", protocol]
    text = report(tmp_path / "r.html", *words).read_text(encoding="utf-8")
    assert "Difference to stock" in text
    assert ("Wilcoxon" in text) == (protocol == "desam")
    assert ("Intervals are 95" in text) == (protocol == "desam")
    assert ("IoU over all unseen pixels" in text) == (protocol == "dcam")
    assert ("mIoU, over all pixels of a site" in text) == (protocol == "dcam")
    assert "In brackets" not in text  # no case of the source is among them
    assert ("mean over all unseen cases as one group" in text) == (protocol == "desam")


def test_what_is_no_study_and_names_that_do_not_exist_are_said(
    predictions: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stock, _ = predictions

    def never(*words: object, **options: object) -> None:
        raise AssertionError("evaluated before the words were looked at")

    monkeypatch.setattr(evaluate, "evaluate", never)
    with pytest.raises(UserError, match="no such folder of a study"):
        CliRunner().invoke(cli, ["report", "nowhere"], catch_exceptions=False)
    words = ["report", "501", f"stock={stock}", "--baseline", "stok", "-o", str(tmp_path / "x.html")]
    with pytest.raises(UserError, match="No method 'stok'"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    with pytest.raises(UserError, match=r"ends in \.html"):
        CliRunner().invoke(cli, ["report", "501", str(stock), "-o", str(tmp_path / "x.v1")], catch_exceptions=False)
    words = ["evaluate", "501", str(stock), "--html", str(tmp_path / "x.htm")]
    with pytest.raises(UserError, match=r"ends in \.html"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    (tmp_path / "study").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "study")
    words = ["report", str(tmp_path / "study"), "-o", str(tmp_path / "link" / "results.html")]
    with pytest.raises(UserError, match="would overwrite the study's own"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    clash = ["evaluate", "501", str(stock), "--csv", str(tmp_path / "x.csv"), "--html", str(tmp_path / "x.html")]
    assert "leave out --csv" in CliRunner().invoke(cli, clash).output
    twice = CliRunner().invoke(cli, ["report", "501", str(stock), str(stock)])
    assert twice.exit_code == 2
    assert "two are called predictions" in twice.output
    assert not (tmp_path / "x.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine (.ci/run installs it)")
def test_a_browser_shows_every_figure_and_complains_about_nothing(page: Path, tmp_path: Path):
    counted = tmp_path / "counted.html"
    script = (
        "<script>addEventListener('load', () => {"
        "document.querySelectorAll('details').forEach(one => { one.open = true; });"
        "const good = [...document.images].filter(one => one.naturalWidth > 50 && one.clientWidth > 50);"
        "const charts = [...document.querySelectorAll('figure .scroll img')].map(one => one.clientWidth);"
        "const wide = document.documentElement.scrollWidth > innerWidth;"
        "parent.postMessage({figures: good.length, chart: Math.min(...charts), wide}, '*'); });</script></body>"
    )
    counted.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    expected = len(Page(page.read_text(encoding="utf-8")).all("img"))
    for width in (1200, 390):  # a phone's is less than a window of Chromium may be, a frame's may be anything
        picture, framed = tmp_path / f"{width}.png", tmp_path / f"{width}.html"
        framed.write_text(
            "<!DOCTYPE html><body style='margin: 0'><script>addEventListener('message', one => "
            "Object.assign(document.body.dataset, one.data))</script>"
            f"<iframe src='{counted.name}' width='{width}' height='2000' style='border: 0'></iframe></body>"
        )
        base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={max(width, 500)},2000",
                "--enable-logging=stderr", "--virtual-time-budget=20000",
                f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
        shown = subprocess.run([*base, "--dump-dom", framed.as_uri()], capture_output=True, text=True, timeout=180,
                               check=True)  # fmt: skip
        assert f'data-figures="{expected}"' in shown.stdout
        assert 'data-wide="false"' in shown.stdout  # tables and charts scroll in their own boxes
        chart = re.search(r'data-chart="(\d+)"', shown.stdout)
        assert chart
        assert int(chart[1]) >= 640  # and can be read there
        assert "CONSOLE" not in shown.stderr
        subprocess.run(
            [*base, f"--screenshot={picture}", framed.as_uri()], capture_output=True, timeout=180, check=True
        )
        from PIL import Image

        with Image.open(picture) as image:
            assert image.size[0] == max(width, 500)
            assert len(image.crop((0, 0, width, 2000)).convert("L").getcolors() or []) > 20  # not blank
