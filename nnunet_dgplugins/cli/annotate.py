"""``dgplugins annotate``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("annotate", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("dataset")
@click.option("--sites", required=True, type=click.Path(path_type=Path, dir_okay=False),
              help="CSV with columns case, site and, if wanted, patient; or JSON {case: site}.")  # fmt: skip
@click.option("--source", "sources", multiple=True, metavar="SITE", help="The site(s) that are trained on.")
def command(dataset: str, sites: Path, sources: tuple[str, ...]) -> None:
    """Give an existing nnU-Net raw dataset a case table: the site and patient of each case of imagesTr and imagesTs.

    Writes dataset.json in the raw folder and, where it exists, in the preprocessed one; the old files stay as .bak.
    """
    from nnunet_dgplugins.data.annotate import annotate

    for line in annotate(dataset, sites, sources):
        click.echo(line)
