"""Makes the weights of ``vit_tiny`` that ship with the package, from a seed and generated images alone.

python scripts/train_vit_tiny.py train --out runs/vit_tiny       run again after a kill: it goes on
python scripts/train_vit_tiny.py random FILE                     untrained weights of the same architecture
python scripts/train_vit_tiny.py show FILE.png                   what the training sees
"""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import replacing, write_bytes
from nnunet_dgplugins.parallel import run
from nnunet_dgplugins.sam.models import MODELS
from nnunet_dgplugins.sam.seeded import seeded_weights
from nnunet_dgplugins.sam.tiny.anatomy import Drawing
from nnunet_dgplugins.sam.tiny.rendering import render, sample_look
from nnunet_dgplugins.sam.tiny.training import Recipe, Training, draw_map, write_weights
from nnunet_dgplugins.system import keep_freed_memory

_SAVE_SECONDS = 120
_LINE_STEPS = 50
_COLUMNS = "step,prompt,iou,contrast,seconds"


@click.group()
def cli() -> None:
    """Train vit_tiny, or make untrained weights of its architecture."""


@cli.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of this run.")
@click.option("--seed", default=Recipe.seed, show_default=True)
@click.option("--maps", type=click.IntRange(1), default=Recipe.maps, show_default=True, help="Label maps to draw.")
@click.option("--steps", type=(int,) * 5, help="Steps of the five phases. Default: the recipe's.")
@click.option("--minutes", type=float, help="Stop after so many minutes; run again to go on.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True, help="Processes that draw the maps.")
def train(
    out: Path, seed: int, maps: int, steps: tuple[int, ...] | None, minutes: float | None, device: str, jobs: int
) -> None:
    """Draw the maps, train, write OUT/vit_tiny.safetensors."""
    recipe = Recipe(seed=seed, maps=maps)
    if steps:
        if min(steps) < 0 or not sum(steps):
            raise click.BadParameter("expected five whole numbers, not all zero", param_hint="--steps")
        phases = tuple(replace(phase, steps=count) for phase, count in zip(recipe.all_phases, steps, strict=True))
        recipe = replace(recipe, phases=phases[: len(recipe.phases)], robust=phases[len(recipe.phases) :])
    out.mkdir(parents=True, exist_ok=True)
    click.echo(keep_freed_memory())
    training = Training(recipe, _drawings(out, recipe, jobs), device)
    saved = out / "state.pt"
    if saved.is_file():
        training.resume(saved)
        click.echo(f"{saved}: goes on behind step {training.step}")
    _train(training, out, saved, minutes)
    if training.step == recipe.steps:
        training.export(out / "vit_tiny.safetensors")
        click.echo(f"{out / 'vit_tiny.safetensors'} written after {training.seconds / 60:.1f} min of steps")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def random(file: Path, seed: int) -> None:
    """Write untrained weights of vit_tiny's architecture as safetensors."""
    write_weights(seeded_weights(MODELS["vit_tiny"], seed), file, f"untrained, seed {seed}")


@cli.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--seed", default=0, show_default=True)
def show(file: Path, seed: int) -> None:
    """Draw eight maps, each rendered three times, into a PNG."""
    from matplotlib.figure import Figure

    size = MODELS["vit_tiny"].image_size
    tissue = torch.from_numpy(np.stack([draw_map(seed, index, size).planes[0] for index in range(8)]))
    figure = Figure(figsize=(16, 8), layout="constrained")
    axes = figure.subplots(4, 8)
    generator = torch.Generator().manual_seed(seed)
    rows = [tissue, *(render(tissue, sample_look(len(tissue), generator))[:, 0] for _ in range(3))]
    for number, (row, images) in enumerate(zip(axes, rows, strict=True)):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, cmap="gray" if number else "nipy_spectral", interpolation="nearest")
            axis.set_axis_off()
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=80, format="png")


def _drawings(out: Path, recipe: Recipe, jobs: int) -> list[Drawing]:
    """Draw the maps with several processes; about 30 ms each."""
    size = MODELS["vit_tiny"].image_size
    click.echo(f"{recipe.maps} label maps, {recipe.maps * 3 * size**2 / 2**20:.0f} MiB of memory")
    threads = torch.get_num_threads()
    try:
        return run("maps", _draw_alone, [(recipe.seed, number, size) for number in range(recipe.maps)], jobs)
    finally:
        torch.set_num_threads(threads)  # with one job the maps are drawn in this process


def _draw_alone(seed: int, number: int, size: int) -> Drawing:
    torch.set_num_threads(1)  # processes that draw side by side must not share their cores again
    return draw_map(seed, number, size)


def _train(training: Training, out: Path, saved: Path, minutes: float | None) -> None:
    recipe = training.recipe
    started = last_save = time.monotonic()
    sums: dict[str, float] = {}
    first, clock = training.step, training.seconds
    with open(_log_until(out / "log.csv", training.step), "a", newline="", encoding="utf-8") as handle:
        log = csv.writer(handle)
        while training.step < recipe.steps:
            for key, value in training.run_step().items():
                sums[key] = sums.get(key, 0.0) + value
            now = time.monotonic()
            if training.step % _LINE_STEPS == 0:
                done = training.step - first
                means = {key: value / done for key, value in sums.items()}
                pace = (training.seconds - clock) / done
                log.writerow([training.step, *(f"{value:.5f}" for value in means.values()), f"{training.seconds:.0f}"])
                handle.flush()
                text = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
                click.echo(
                    f"step {training.step}/{recipe.steps}  {text}  {pace:.2f} s/step, {_left(training, pace)} left"
                )
                sums, first, clock = {}, training.step, training.seconds
            if now - last_save > _SAVE_SECONDS or training.step == recipe.steps:
                training.save(saved)
                last_save = now
            if minutes is not None and now - started > 60 * minutes and training.step < recipe.steps:
                training.save(saved)
                click.echo(f"Stopped after {minutes:g} min behind step {training.step}; run again to go on.")
                return


def _log_until(path: Path, step: int) -> Path:
    """Give the log a heading, or take off the lines behind the step at which the training goes on."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
    kept = [line for line in lines if int(line.partition(",")[0]) <= step]
    write_bytes(path, "\n".join([_COLUMNS, *kept, ""]).encode())
    return path


def _left(training: Training, pace: float) -> str:
    """Return the time left if a step costs what its pixels say and the last ones took ``pace`` seconds each."""
    recipe, now = training.recipe, training.recipe.phase(training.step - 1)
    behind, pixels = training.step, 0
    for phase in recipe.all_phases:
        pixels += max(0, phase.steps - behind) * phase.maps * phase.canvas**2
        behind = max(0, behind - phase.steps)
    return f"{pace * pixels / (now.maps * now.canvas**2) / 60:.0f} min"


if __name__ == "__main__":
    try:
        cli()
    except UserError as error:
        sys.exit(str(error))
