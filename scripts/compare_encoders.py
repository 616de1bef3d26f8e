"""The demo's DeSAM unseen-site table for several SAM encoders and seeds, with spread.

python scripts/train_vit_tiny.py random random.safetensors
python scripts/compare_encoders.py --sam random=vit_tiny:random.safetensors --sam trained=vit_tiny --out encoders

Every number comes from commands that a user could type; each has its log. Killed or stopped? Run it again: finished
steps are kept. Seeds and encoders may be added to a folder later.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import click
import pandas as pd
from demo_table import scores, training_minutes
from steps import Step, Word, claim, run_steps

from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import file_sha256, write_bytes, write_json

ID, DATASET = "501", "Dataset501_ProstateSAML_RUNMC"  # as in demo.sh
# DeSAM's settings there, beside epochs
DEMO = {"field_of_view": "source", "augmented_views": 4, "initial_lr": 0.001}
STOCK, CONSTANT = "stock nnU-Net", "constant mask"
# seconds on two cores
GUESSES = {"plan": 22, "embed": 35, "train": 150, "predict": 200, f"{STOCK} train": 140, f"{STOCK} predict": 100}


def nnunet(data: Path, results: Path) -> dict[str, str]:
    """Return nnU-Net's environment."""
    raw, preprocessed = data / "nnUNet_raw", data / "nnUNet_preprocessed"
    folders = {"nnUNet_raw": raw, "nnUNet_preprocessed": preprocessed, "nnUNet_results": results}
    return {**{name: str(path) for name, path in folders.items()}, "nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}


def preparation(out: Path) -> list[Step]:
    """Return the steps that make the demo's phantom an nnU-Net dataset."""
    base, download = nnunet(out, out / "nnUNet_results"), str(out / "download")
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        Path(base[name]).mkdir(parents=True, exist_ok=True)
    convert = ["dgplugins", "convert", "prostate-saml", download, "--id", ID, "--source", "RUNMC"]
    plan = f"nnUNetv2_plan_and_preprocess -d {ID} -c 2d --verify_dataset_integrity -np 2 -npfp 2 --no_pbar"
    return [
        Step(out, "phantom", [sys.executable, "-m", "nnunet_dgplugins.phantom", download], base),
        Step(out, "convert", convert, base),
        Step(out, "plan", plan.split(), {**base, "nnUNet_n_proc_DA": "1"}),
    ]


def one_training(folder: Path, trainer: str, train: Sequence[Word], device: str, base: dict[str, str]) -> list[Step]:
    """Return the steps of one training: train, predict the unseen sites, evaluate there and on the source."""
    base = {**base, "nnUNet_results": str(folder / "nnUNet_results")}
    raw, predictions = Path(base["nnUNet_raw"]) / DATASET, str(folder / "predictions")
    predict = ["nnUNetv2_predict", "-d", ID, "-i", str(raw / "imagesTs"), "-o", predictions, "-c", "2d", "-f", "0"]
    # without mirroring: a quarter of the time, and the same for all that are compared
    predict += ["-tr", trainer, "-device", device, "-npp", "0", "-nps", "0", "--disable_tta"]
    source = ["dgplugins", "evaluate", ID, str(fold_of(folder, trainer) / "validation"), "--partial"]
    source += ["--labels", str(raw / "labelsTr"), "--csv", str(folder / "source.csv")]
    unseen = ["dgplugins", "evaluate", ID, predictions, "--csv", str(folder / "unseen.csv")]
    kind = "" if trainer == "DeSAMTrainer" else f"{STOCK} "
    return [
        Step(folder, "train", [*train, "-tr", trainer, "-device", device], base, f"{kind}train"),
        Step(folder, "predict", predict, base, f"{kind}predict"),
        Step(folder, "source", source, base),
        Step(folder, "unseen", unseen, base),
    ]


def fold_of(folder: Path, trainer: str) -> Path:
    """Return where a trainer writes."""
    return folder / "nnUNet_results" / DATASET / f"{trainer}__nnUNetPlans__2d" / "fold_0"


def equal_minutes(folds: Sequence[Path]) -> str:
    """Return the mean training time of finished trainings."""
    return f"{mean(map(training_minutes, folds)):.3f}"


def constant_mask(folder: Path, base: dict[str, str]) -> list[Step]:
    """Return the steps of what is reached without looking at the images."""
    predictions = str(folder / "predictions")
    predict = [sys.executable, str(Path(__file__).with_name("demo_table.py")), "constant", ID, predictions]
    evaluate = ["dgplugins", "evaluate", ID, predictions, "--csv", str(folder / "unseen.csv")]
    return [Step(folder, "predict", predict, base, CONSTANT), Step(folder, "unseen", evaluate, base)]


def claim_encoder(folder: Path, name: str, options: dict[str, object]) -> str:
    """Bind a folder to an encoder, weights included; return its name with the whole path of a file."""
    from nnunet_dgplugins.sam.models import get_model
    from nnunet_dgplugins.sam.weights import find_weights

    model = get_model(name)
    file = find_weights(model).resolve()
    claim(folder, {**options, "weights": file_sha256(file)})
    return model.name if model.shipped or model.size == model.name else f"{model.size}:{file}"


def table(runs: Sequence[tuple[str, str, Path]]) -> pd.DataFrame:
    """Return a line per finished run (encoder, seed, folder); mean and standard deviation over an encoder's seeds."""
    parts = []
    for encoder in dict.fromkeys(run[0] for run in runs):
        own = [(seed, folder) for name, seed, folder in runs if name == encoder and (folder / "unseen.csv").is_file()]
        parts.append(pd.DataFrame([{"encoder": encoder, "seed": seed, **scores(folder)} for seed, folder in own]))
        if len(own) > 1:
            spread = parts[-1].drop(columns=["encoder", "seed"]).agg(["mean", "std"]).reset_index(names="seed")
            parts.append(spread.assign(encoder=encoder).replace({"seed": {"std": "sd"}}))
    return pd.concat(parts, ignore_index=True)


def markdown(lines: pd.DataFrame) -> str:
    """Return the table as markdown, three decimals."""
    cells = [
        [("-" if pd.isna(value) else f"{value:.3f}") if isinstance(value, float) else str(value) for value in row]
        for row in lines.itertuples(index=False)
    ]
    rows = [list(lines.columns), ["---"] * 2 + ["---:"] * (lines.shape[1] - 2), *cells]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_table(runs: Sequence[tuple[str, str, Path]], out: Path) -> None:
    """Write what is finished so far to ``table.csv`` and ``table.md``."""
    lines = table(runs)
    if len(lines):
        write_bytes(out / "table.csv", lines.to_csv(index=False).encode())
        write_bytes(out / "table.md", markdown(lines).encode())


def parse_encoders(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    """Return label to encoder of ``LABEL=NAME`` words."""
    found: dict[str, str] = {}
    for value in values:
        label, _, name = value.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label) or not name:
            raise click.BadParameter(f"{value}: expected LABEL=NAME, e.g. trained=vit_tiny")
        if label in found:
            raise click.BadParameter(f"{label} is given twice")
        found[label] = name
    return found


def parse_seeds(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Return the seeds of ``0,1,2``."""
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise click.BadParameter(f"{value}: expected whole numbers and commas, e.g. 0,1,2")
    return list(dict.fromkeys(value.split(",")))


@click.command()
@click.option("--sam", "encoders", multiple=True, required=True, callback=parse_encoders, help="LABEL=NAME; repeat.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the comparison.")
@click.option("--demo", type=click.Path(exists=True, path_type=Path), help="A finished demo's folder.")
@click.option("--seeds", default="0,1,2", show_default=True, callback=parse_seeds, help="Seeds of the training.")
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="DeSAM's; default: the demo's.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Time of each training, instead of epochs.")
@click.option("--stock", is_flag=True, help="Also nnUNetTrainer, for as long as DeSAM's epochs of the same seed took.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if there is one.")
def command(
    encoders: dict[str, str], out: Path, demo: Path | None, seeds: list[str], epochs: int, minutes: float | None,
    stock: bool, device: str | None,
) -> None:  # fmt: skip
    """Train DeSAM on the demo's source with every encoder and seed; print Dice on the five unseen sites."""
    import torch

    out, data = out.resolve(), (demo or out).resolve()
    if demo and not ((data / "done" / "plan").is_file() and (data / "nnUNet_raw" / DATASET).is_dir()):
        raise UserError(f"{demo}: not a finished folder of scripts/demo.sh with {DATASET}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = {"data": str(data), "device": device, "epochs": epochs, "minutes": minutes, **DEMO}
    names = {label: claim_encoder(out / label, name, options) for label, name in encoders.items()}
    if stock:
        claim(out / STOCK, {**options, "encoders": sorted(names)})  # its minutes are those of these encoders
    base, runs = nnunet(data, out / "nnUNet_results"), []
    steps = [*([] if demo else preparation(out)), *constant_mask(out / CONSTANT, base)]
    for seed in seeds:
        budget: list[Word] = [sys.executable, "-m", "nnunet_dgplugins.budget", ID, "2d", "0", "--seed", seed]
        for label, name in names.items():
            folder = out / label / f"seed{seed}"
            settings = {"sam": name, "seed": int(seed), "epochs": epochs, **DEMO}
            write_json(folder / "settings.yaml", {"DeSAMTrainer": settings})  # JSON is YAML
            own = {**base, "DGPLUGINS_SETTINGS": str(folder / "settings.yaml")}
            if seed == seeds[0]:  # one store for all seeds
                steps.append(Step(out / label, "embed", ["dgplugins", "embed", ID, "--device", device], own))
            train = [*budget, "--minutes", str(minutes)] if minutes else ["nnUNetv2_train", ID, "2d", "0", "--c"]
            steps += one_training(folder, "DeSAMTrainer", train, device, own)
            runs.append((label, seed, folder))
        if stock:
            folds = [fold_of(folder, "DeSAMTrainer") for label, at, folder in runs if at == seed]
            runs.append((STOCK, seed, out / STOCK / f"seed{seed}"))
            train = [*budget, "--minutes", partial(equal_minutes, folds)]
            steps += one_training(runs[-1][2], "nnUNetTrainer", train, device, base)
    runs.append((CONSTANT, "-", out / CONSTANT))
    run_steps(steps, GUESSES, partial(write_table, runs, out))
    write_table(runs, out)
    click.echo((out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        command()
    except UserError as error:
        sys.exit(str(error))
