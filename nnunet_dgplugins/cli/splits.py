"""``dgplugins splits``."""

from __future__ import annotations

import click


@click.command("splits", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataset")
@click.option("--single-source", metavar="SITE", help="Train and validate on this site only, folds by patient.")
@click.option("--leave-one-site-out", is_flag=True, help="One fold per site, trained and validated on the others.")
@click.option("--k-fold", type=click.IntRange(2), metavar="K", help="K folds by patient over all training cases.")
@click.option("--folds", type=click.IntRange(2), default=5, show_default=True,
              help="Folds within a single source; of the other sites, one part in FOLDS validates.")  # fmt: skip
@click.option("--seed", type=int, default=12345, show_default=True, help="Seed of the shuffling of patients.")
@click.option("--as-dataset", "new_id", type=click.IntRange(1, 999), metavar="ID",
              help="Write a linked dataset with the other sites in imagesTs: planning never sees them.")  # fmt: skip
def command(
    dataset: str,
    single_source: str | None,
    leave_one_site_out: bool,
    k_fold: int | None,
    folds: int,
    seed: int,
    new_id: int | None,
) -> None:
    """Write splits_final.json for DATASET by site and patient, in the raw and the preprocessed folder or in neither."""
    chosen = [single_source is not None, leave_one_site_out, k_fold is not None]
    if sum(chosen) != 1:
        raise click.UsageError("Say one of --single-source SITE, --leave-one-site-out, --k-fold K.")
    if k_fold is not None and new_id is not None:
        raise click.UsageError("--as-dataset sets target sites apart; --k-fold has none.")
    from nnunet_dgplugins.data.split_dataset import SplitRequest, split_dataset

    request = SplitRequest(dataset, single_source, leave_one_site_out, k_fold, folds, seed, new_id)
    for line in split_dataset(request):
        click.echo(line)
