"""What fits a dataset: reads its JSON files only, never images. Importable without torch."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from nnunet_dgplugins.data.case_table import CaseTable
from nnunet_dgplugins.data.folds import has_tags, is_labelled, without_masks
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import PREPROCESSED, RAW, RESULTS, dataset_name, read_json
from nnunet_dgplugins.registry import TRAINERS

PLANS = "nnUNetPlans"


def advise(dataset: int | str) -> dict[str, Any]:
    """Return facts about a dataset, the trainers that fit it with reasons, and the next commands.

    Raises:
        UserError: the dataset or its ``dataset.json`` does not exist.
    """
    name = dataset_name(dataset)
    number = int(name[7:10])
    raw, preprocessed = (Path(os.environ.get(v, "")) / name for v in (RAW, PREPROCESSED))
    source = next((folder for folder in (raw, preprocessed) if (folder / "dataset.json").is_file()), None)
    if source is None:
        raise UserError(f"{name}: no dataset.json in {raw} or {preprocessed}.")
    content = read_json(source / "dataset.json")
    missing = [key for key in ("channel_names", "labels", "file_ending") if key not in content]
    if missing:
        raise UserError(f"{source / 'dataset.json'}: lacks {' and '.join(missing)}; nnU-Net v2 wants them.")
    table = CaseTable.from_dataset_json(content, str(source / "dataset.json"))
    training = int(content.get("numTraining", 0))
    names = _training_cases(raw, preprocessed, content["file_ending"])
    mixed = _foreign_sites(names, table)
    known = names or set(table.cases if table else ())
    with_tags = [case for case in known if has_tags(table, case)]
    patches = [case for case in with_tags if _of_patch(table, case)]
    hidden = len([case for case in without_masks(names, table) if not has_tags(table, case)])
    masks = table is None or any(is_labelled(table, case) for case in known)
    trainers = [
        _fit_tags(info.name, len(patches), len(with_tags) - len(patches))
        if info.tags
        else _fit(info.name, table, mixed, hidden, masks)
        for info in TRAINERS.values()
    ]
    return {
        "dataset": name,
        "cases": training,
        "test_cases": _test_cases(raw, content["file_ending"]),
        "facts": _facts(content, table),
        "trainers": trainers,
        "next": _next(name, number, preprocessed, [str(item["name"]) for item in trainers if item["fits"]], hidden),
    }


def _test_cases(raw: Path, ending: str) -> int:
    folder = raw / "imagesTs"
    return len({p.name[: -len(ending) - 5] for p in folder.glob(f"*{ending}")}) if folder.is_dir() else 0


def _facts(content: dict[str, Any], table: CaseTable | None) -> list[str]:
    facts = [
        "channels: " + ", ".join(str(v) for v in content["channel_names"].values()),
        "labels: " + ", ".join(k for k in content["labels"] if k != "background"),
    ]
    if table is None:
        return [*facts, "no case table: sites and patients are unknown (dgplugins annotate adds them)"]
    sites = Counter(case.site or "unknown" for case in table.cases.values())
    facts.append("sites: " + ", ".join(f"{site} ({count})" for site, count in sorted(sites.items())))
    if table.sources:
        facts.append("source: " + ", ".join(table.sources))
    unlabelled = sum(not case.labelled for case in table.cases.values())
    if unlabelled:
        facts.append(f"unlabelled cases: {unlabelled}")
    if any(case.tags is not None for case in table.cases.values()):
        facts.append("image tags: yes")
    return facts


def _training_cases(raw: Path, preprocessed: Path, ending: str) -> set[str]:
    """Return the cases of imagesTr; where the raw folder is gone, those of the preprocessed copy."""
    if (raw / "imagesTr").is_dir():
        return {p.name[: -len(ending) - 5] for p in (raw / "imagesTr").glob(f"*{ending}")}
    return {p.name[: -len(ending)] for p in (preprocessed / "gt_segmentations").glob(f"*{ending}")}


def _foreign_sites(names: set[str], table: CaseTable | None) -> list[str]:
    """Return sites of imagesTr that are not the source: planning has seen them, though folds leave them out."""
    if table is None or not table.sources:
        return []
    sites = {table.site_of(name) for name in names} - {None}
    return sorted(str(site) for site in sites if site not in table.sources)


def _of_patch(table: CaseTable | None, case: str) -> bool:
    """Return whether a case's tags say of a whole patch which of several classes it shows."""
    tags = (table.cases[case].tags if table is not None else None) or []
    return any(isinstance(tag, list) for tag in tags)


def _fit_tags(name: str, patches: int, volumes: int) -> dict[str, Any]:
    """Say whether a trainer that learns from tags fits, and why: D-CAM from tags of patches, the other of slices."""
    of_patches = TRAINERS[name].method == "D-CAM"
    why = [f"Reads {TRAINERS[name].supervision}; gives {TRAINERS[name].output}."]
    if found := patches if of_patches else volumes:
        return {"name": name, "fits": True, "why": [*why, f"{found} cases have tags: what the method is made for."]}
    lacking = "No patch has tags." if of_patches else "No slice has tags (derive_tags=true makes them from masks)."
    return {"name": name, "fits": False, "why": [*why, lacking]}


def _fit(name: str, table: CaseTable | None, mixed: list[str], hidden: int, masks: bool) -> dict[str, Any]:
    """Say whether a trainer that learns from masks fits, and why."""
    why = [f"Reads {TRAINERS[name].supervision}; gives {TRAINERS[name].output}."]
    if not masks:
        return {"name": name, "fits": False, "why": [*why, "No case has masks."]}
    if table is None:
        why.append("Trains on any dataset with masks; without a case table results cannot be told apart by site.")
    elif mixed:
        why.append(
            f"imagesTr holds {', '.join(mixed)} beside the source {', '.join(table.sources)}: folds leave them out, "
            "but planning saw them. `dgplugins splits --single-source SITE --as-dataset ID` makes a clean dataset."
        )
    elif len(table.sources) == 1 and len(table.sites()) > 1:
        why.append(
            f"One source site ({table.sources[0]}), {len(table.sites()) - 1} unseen: what the method is made for."
        )
    elif len(table.sites()) > 1 and not table.sources:
        why.append(
            "All sites are in one set: `dgplugins splits --single-source SITE --as-dataset ID` keeps targets unseen."
        )
    else:
        why.append("Works; its strength shows on sites that training has not seen.")
    if name == "EPLTrainer":
        why.append(
            f"{hidden} cases without masks teach it too: what the method is made for."
            if hidden
            else "No case without masks is known; it would learn from the labelled images alone."
        )
    if name == "DeSAMTrainer":
        why.append("The first to try: one decoder pass per slice.")
    return {"name": name, "fits": True, "why": why}


def _next(name: str, number: int, preprocessed: Path, fitting: list[str], hidden: int) -> list[str]:
    """Return the commands of the next stage: plan, train what fits best, then its later stage, then predict."""
    trained = _trained(Path(os.environ.get(RESULTS, "")) / name)
    if not fitting and not trained:
        return []
    if not (preprocessed / f"{PLANS}.json").is_file():
        return [f"nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity"]
    if not trained:
        first = "EPLTrainer" if hidden and "EPLTrainer" in fitting else fitting[0]
        return [f"nnUNetv2_train {number} 2d 0 -tr {first}"]
    for later in fitting:
        if later not in trained and (before := trained.get(TRAINERS[later].after)):
            plans, fold = before
            return [f"nnUNetv2_train {number} 2d {fold} -tr {later}{_with(plans)}"]
    earlier = {TRAINERS[trainer].after for trainer in trained}
    last = next(trainer for trainer in trained if trainer not in earlier)
    plans, fold = trained[last]
    folder = f"{os.environ.get(RAW, '$nnUNet_raw')}/{name}/imagesTs"
    return [
        f"nnUNetv2_predict -d {number} -i {folder} -o predictions -c 2d -f {fold} -tr {last}{_with(plans)}",
        f"dgplugins evaluate {number} predictions",
    ]


def _trained(results: Path) -> dict[str, tuple[str, str]]:
    """Return plans and fold of each of our trainers that has finished; nnU-Net's own plans and fold 0 come first."""
    found = {}
    for trainer in TRAINERS:
        paths = results.glob(f"{trainer}__*__2d/fold_*/checkpoint_final.pth")
        pairs = [(path.parent.parent.name.split("__")[1], path.parent.name.removeprefix("fold_")) for path in paths]
        if pairs:
            found[trainer] = min(pairs, key=lambda pair: (pair != (PLANS, "0"), pair))
    return found


def _with(plans: str) -> str:
    return "" if plans == PLANS else f" -p {plans}"
