"""``dgplugins embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nnunet_dgplugins.cli.options import configuration_option, plans_option, trainer_option


@click.command("embed")
@click.argument("dataset")
@configuration_option
@plans_option
@trainer_option
@click.option("--model", help="vit_h, vit_l, vit_b, vit_tiny, a weight file, or auto. Default: the trainer's setting.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "half", "compact"]),
    help="Precision on disk: half (12 bits), compact (8 bits), or auto. Default: the trainer's setting.",
)
@click.option("--part-id", default=0, show_default=True, help="Which share to compute on this machine, from 0.")
@click.option("--num-parts", default=1, show_default=True, help="Number of shares.")
@click.option("--verify", is_flag=True, help="Read every entry completely and compute damaged ones again.")
@click.option("--device", default=None, help="cuda, cuda:1, cpu or mps. Default: cuda if there is one.")
@click.option(
    "--bfloat16/--float32",
    default=None,
    help="Products on the CPU; default: the trainer's setting cpu_bfloat16. The trainer reads what its setting names.",
)
@click.option("--keep-freed-memory/--give-back-memory", default=True, show_default=True, help="CPU allocator (glibc).")
def command(
    dataset: str,
    configuration: str,
    plans: str,
    trainer: str,
    model: str | None,
    mode: str | None,
    part_id: int,
    num_parts: int,
    verify: bool,
    device: str | None,
    bfloat16: bool | None,
    keep_freed_memory: bool,
) -> None:
    """Compute the image embeddings of DATASET that a SAM trainer reads.

    The frozen encoder runs once over every preprocessed slice; training then needs the small decoder only. The trainer
    does this by itself where embeddings are missing. Can be killed and run again; entries that are there are kept.
    The published scripts call this step precompute_embeddings.py.
    """
    from nnunet_dgplugins import system
    from nnunet_dgplugins.files import PREPROCESSED, dataset_name, nnunet_folder

    base = nnunet_folder(PREPROCESSED) / dataset_name(dataset)
    chosen, folder, masked = _chosen(base, plans, configuration, trainer)

    import torch

    from nnunet_dgplugins.sam.embed import prepare_store, preprocessed_cases
    from nnunet_dgplugins.trainers.views import SliceViews
    from nnunet_dgplugins.trainers.whole_slices import largest_slice

    bfloat16 = chosen.cpu_bfloat16 if bfloat16 is None else bfloat16
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if target.type == "cpu" and keep_freed_memory:
        click.echo(f"CPU memory: {system.keep_freed_memory()}")
    prepare_store(
        folder,
        preprocessed_cases(folder),
        sam=model or chosen.sam,
        channels=chosen.channels or (0,),
        mode=mode or chosen.store,
        device=target,
        dtype=torch.bfloat16 if bfloat16 else None,
        views=chosen.augmented_views,
        transform=SliceViews(chosen.seed, masked) if chosen.augmented_views else None,
        field=largest_slice(folder) if chosen.field_of_view == "source" else None,
        part=part_id,
        num_parts=num_parts,
        verify=verify,
        say=click.echo,
    )


def _chosen(base: Path, plans: str, configuration: str, trainer: str) -> tuple[Any, Path, list[bool]]:
    """Return the trainer's settings for this dataset, completed as the trainer does, the preprocessed data
    folder, and per channel whether nnU-Net normalised it within a mask.

    Raises:
        UserError: no such plans or configuration, or the trainer has no SAM encoder.
    """
    from nnunet_dgplugins import settings
    from nnunet_dgplugins.errors import UserError
    from nnunet_dgplugins.files import read_json
    from nnunet_dgplugins.registry import TRAINERS, load_trainer

    cls = settings.settings_class(TRAINERS[trainer].settings)
    if "sam" not in cls.__dataclass_fields__:
        raise UserError(f"{trainer} has no SAM encoder, there is nothing to embed.")
    if "store" not in cls.__dataclass_fields__:
        raise UserError(f"{trainer} embeds canvases of several slices, which it puts together itself while it trains.")
    path = base / f"{plans}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such plans. Run nnUNetv2_plan_and_preprocess with -c {configuration} first.")
    content = read_json(path)
    if configuration not in content["configurations"]:
        raise UserError(f"{path}: no configuration '{configuration}', only {', '.join(content['configurations'])}.")
    resolved: Any = settings.resolve(cls, content, configuration, trainer)
    trainer_class: Any = load_trainer(trainer)
    resolved = trainer_class.complete_settings(resolved, {}, read_json(base / "dataset.json"))
    masked = list(_inherited(content, configuration, "use_mask_for_norm")) if resolved.augmented_views else []
    return resolved, base / str(_inherited(content, configuration, "data_identifier")), masked


def _inherited(plans: dict[str, Any], configuration: str, key: str) -> Any:
    """Return a value of a configuration; one that lacks it uses its parent's."""
    block = plans["configurations"][configuration]
    return block[key] if key in block else _inherited(plans, block["inherits_from"], key)
