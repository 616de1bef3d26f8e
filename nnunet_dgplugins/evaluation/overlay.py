"""Pictures of one slice with the contours of reference and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.evaluation.evaluate import Evaluation
from nnunet_dgplugins.evaluation.label_maps import read_label_map
from nnunet_dgplugins.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by every kind of colour vision; line styles tell them apart without colour
REFERENCE_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"
_INCHES, _DPI = 6.0, 130
_MARGIN = 0.35  # of the object's size, shown around it


def overlay_png(
    image_path: Path,
    reference_path: Path | None,
    prediction_path: Path,
    out_png: Path,
    title: str = "",
    *,
    slice_by: Literal["reference", "disagreement"] = "reference",
    ignore: int | None = None,
    dpi: int = _DPI,
) -> Path:
    """Draw one slice: the image in grey, the reference's contour in blue, the prediction's dashed in orange.

    Args:
        image_path: one channel of the case; PNG images are drawn in grey.
        reference_path: reference labels on the image's grid; None draws the prediction alone.
        prediction_path: predicted labels on the image's grid.
        out_png: written in one step.
        title: shown above; the slice is added to it.
        slice_by: the slice with the largest ``reference`` area, or with the most voxels in ``disagreement``. An empty
            reference leaves the choice to the prediction, and two empty maps take the middle slice.
        ignore: value of the reference that means "not annotated"; nothing is drawn there.
        dpi: pixels per inch; the picture is 6 inches wide.

    Returns:
        ``out_png``.

    Raises:
        UserError: a file cannot be read, or the grids differ.
    """
    prediction = read_label_map(prediction_path)
    reference = prediction if reference_path is None else read_label_map(reference_path)
    grey, spacing = _read_grey(image_path), prediction.spacing
    truth, guess = _volume(reference.values), _volume(prediction.values)
    if reference_path is not None and (difference := reference.geometry_difference(prediction)):
        raise UserError(f"{prediction_path}: grid differs from that of {reference_path}: {difference}")
    if grey.shape != guess.shape:
        raise UserError(f"{prediction_path}: shape {guess.shape} differs from that of {image_path}: {grey.shape}")
    if ignore is not None:
        truth, guess = (np.where(truth == ignore, 0, labels) for labels in (truth, guess))
    index = pick_slice(truth, guess, slice_by)
    place = f"slice {index + 1} of {len(guess)}" if len(guess) > 1 else ""
    heading = ", ".join(part for part in (title, place) if part)
    shown = None if reference_path is None else truth[index]
    with replacing(out_png) as temporary:
        _draw(grey[index], shown, guess[index], spacing[-2:], heading, temporary, dpi)
    return out_png


def overlay_folder(result: Evaluation, folder: Path, images: Path | None = None) -> list[Path]:
    """Write one overlay per evaluated case, named ``<site>_<case>.png``.

    Args:
        result: of any protocol.
        folder: receives the pictures.
        images: images of the cases; None takes ``imagesTs`` and then ``imagesTr`` of the dataset.

    Raises:
        UserError: a case's image is in neither folder.
    """
    data = result.dataset
    ignore = data.classes.ignore
    truths, guesses = data.files(result.labels), data.files(result.predictions)
    written = []
    for case in (case for case in truths if case in guesses):
        name = f"{case}_0000{data.file_ending}"
        places = [images] if images else [data.folder / "imagesTs", data.folder / "imagesTr"]
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is None:
            raise UserError(f"{name}: not in {' or '.join(map(str, places))}; name its folder with --images.")
        site = data.site_of(case)
        title = f"{case} ({site}){_dice_text(result, case)}"
        target = folder / f"{site}_{case}.png".replace("/", "-").replace(" ", "_")
        written.append(overlay_png(found, truths[case], guesses[case], target, title, ignore=ignore))
    return written


def pick_slice(truth: npt.NDArray[Any], guess: npt.NDArray[Any], by: str = "reference") -> int:
    """Return the index of the slice to draw, of two label maps (z, y, x)."""
    wanted = (truth != guess) if by == "disagreement" else (truth > 0)
    for mask in (wanted, guess > 0):
        area = mask.sum(axis=(1, 2))
        if area.any():
            return int(area.argmax())
    return len(truth) // 2


def _dice_text(result: Evaluation, case: str) -> str:
    values = result.table[(result.table["case"] == case) & (result.table["metric"] == "dice")]["value"]
    return "" if values.isna().all() else f", Dice of the case {values.mean():.3f}"


def _read_grey(path: Path) -> npt.NDArray[np.float64]:
    """Return the image as (z, y, x)."""
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be read ({str(error).strip().splitlines()[-1]})") from error
    values = SimpleITK.GetArrayFromImage(image).astype(np.float64)
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = values[..., :3].mean(axis=-1)
    return values if values.ndim == 3 else values.reshape(-1, *values.shape[-2:])


def _volume(values: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    return values if values.ndim == 3 else values[None]


def _draw(
    grey: npt.NDArray[np.float64],
    truth: npt.NDArray[np.integer] | None,
    guess: npt.NDArray[np.integer],
    spacing: Sequence[float],
    title: str,
    path: Path,
    dpi: int,
) -> None:
    # the object-oriented interface: no global state, no window system, whatever the user's backend is
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = _window(guess if truth is None else (truth > 0) | (guess > 0), spacing)
    height = (rows.stop - rows.start) * spacing[0]
    width = (columns.stop - columns.start) * spacing[1]
    figure = Figure(figsize=(_INCHES, _INCHES * height / width + 0.75), dpi=dpi, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.36 / figure.get_figheight(), 1.0, 1 - 0.75 / figure.get_figheight()))
    low, high = np.percentile(grey, (0.5, 99.5))
    axes.imshow(
        grey,
        cmap="gray",
        vmin=low,
        vmax=max(high, low + 1e-6),
        aspect=spacing[0] / spacing[1],
        interpolation="bilinear",
    )
    axes.set_xlim(columns.start - 0.5, columns.stop - 0.5)
    axes.set_ylim(rows.stop - 0.5, rows.start - 0.5)
    axes.set_axis_off()
    drawn = []
    if truth is not None:
        drawn.append(_contours(axes, truth, REFERENCE_COLOUR, "solid", "reference"))
    drawn.append(_contours(axes, guess, PREDICTION_COLOUR, (0, (4, 2)), "prediction"))
    _scale_bar(axes, rows, columns, spacing)
    figure.text(0.012, 1 - 0.2 / figure.get_figheight(), title, fontsize=11, va="center", ha="left", color="#222222")
    figure.legend(handles=drawn, loc="lower left", ncols=2, frameon=False, fontsize=11, borderaxespad=0.3)
    figure.savefig(path, format="png")


def _contours(axes: Axes, labels: npt.NDArray[np.integer], colour: str, style: Any, name: str) -> Any:
    """Draw the outline of every label value over a dark halo, and return the legend's entry."""
    from matplotlib import patheffects
    from matplotlib.lines import Line2D

    halo = [patheffects.Stroke(linewidth=3.2, foreground="black", alpha=0.55), patheffects.Normal()]
    present = [value for value in np.unique(labels).tolist() if value != 0]
    for value in present:
        # a ring of background lets contours close at the image's edge
        mask = np.pad(labels == value, 1).astype(float)
        grid = (np.arange(mask.shape[1]) - 1, np.arange(mask.shape[0]) - 1)
        axes.contour(*grid, mask, levels=[0.5], colors=[colour], linewidths=1.8, linestyles=[style], path_effects=halo)
    label = name if present else f"{name}: nothing on this slice"
    return Line2D([], [], color=colour, linestyle=style, linewidth=2.6, label=label)


def _window(mask: npt.NDArray[Any], spacing: Sequence[float]) -> tuple[slice, slice]:
    """Return the rows and columns to show: the object with a margin, at least half of the image each way."""
    windows = []
    for axis, size in enumerate(mask.shape):
        hits = np.flatnonzero(mask.any(axis=1 - axis))
        middle, extent = ((hits[0] + hits[-1]) / 2, np.ptp(hits) + 1) if hits.size else (size / 2, size)
        length = min(size, max(size / 2, extent * (1 + 2 * _MARGIN)))
        start = int(np.clip(round(middle - length / 2), 0, size - round(length)))
        windows.append(slice(start, start + round(length)))
    return windows[0], windows[1]


def _scale_bar(axes: Axes, rows: slice, columns: slice, spacing: Sequence[float]) -> None:
    """Draw a bar whose length is a round number of millimetres, about a fifth of the picture."""
    from matplotlib import patheffects

    if tuple(spacing) == (1.0, 1.0):  # PNG: pixels of unknown size
        return
    width = (columns.stop - columns.start) * spacing[1]
    length = max(step for step in (1, 2, 5, 10, 20, 50, 100) if step == 1 or step <= width / 4)
    right = columns.stop - 0.04 * (columns.stop - columns.start)
    bottom = rows.stop - 0.04 * (rows.stop - rows.start)
    left = right - length / spacing[1]
    bar = axes.plot([left, right], [bottom, bottom], color="white", linewidth=2.5, solid_capstyle="butt")[0]
    bar.set_path_effects([patheffects.withStroke(linewidth=4.5, foreground="black", alpha=0.6)])
    above = bottom - 0.012 * (rows.stop - rows.start)
    text = axes.text((left + right) / 2, above, f"{length} mm", color="white", fontsize=9, ha="center", va="bottom")
    text.set_path_effects([patheffects.withStroke(linewidth=3.0, foreground="black", alpha=0.6)])
