"""Fills the embedding store of a preprocessed dataset: cost first, then progress; can be killed and run again."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from nnunet_dgplugins.content import Field
from nnunet_dgplugins.errors import UserError
from nnunet_dgplugins.files import human_bytes, read_json, require_disk, write_json
from nnunet_dgplugins.sam.codec import BITS, pack, unpack
from nnunet_dgplugins.sam.frozen import FrozenEncoder
from nnunet_dgplugins.sam.models import SamModel, get_model
from nnunet_dgplugins.sam.preprocess import check_channels, to_canvas
from nnunet_dgplugins.sam.probe import Change, Probe, change, fixed_probe
from nnunet_dgplugins.sam.store import EmbeddingStore, Key, slice_hash, store_folder
from nnunet_dgplugins.sam.weights import weights_hash

AUTO = "auto"
MODES = (AUTO, *BITS)
SIZE_BOUND = {"half": 0.42, "compact": 0.27}  # share of the float32 size
LOGITS_BOUND = 0.015  # largest change of a logit that lets auto choose compact, as a share of the range
SAMPLE_SLICES = 4
_CUDA_BATCH = 8
_LEFTOVER = re.compile(r"^\.tmp-(\d+)-")


class ViewTransform(Protocol):
    """Augmentation behind stored views: the same (case, z, view) always gives the same result."""

    name: str

    def __call__(self, image: torch.Tensor, key: Key) -> torch.Tensor:
        """Return the augmented slice (C, H, W)."""


def prepare_store(
    folder: str | Path,
    cases: Sequence[str],
    *,
    sam: str | SamModel = "vit_tiny",
    channels: Sequence[int] = (0,),
    mode: str = AUTO,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    encoder: FrozenEncoder | None = None,
    part: int = 0,
    num_parts: int = 1,
    verify: bool = False,
    views: int = 0,
    transform: ViewTransform | None = None,
    probe: Probe | None = None,
    field: Field | None = None,
    say: Callable[[str], None] = print,
) -> EmbeddingStore:
    """Make sure that the features of all slices of the cases are stored, and return the store.

    Entries made from the same slice content by the same encoder and preprocessing are kept. The result does not depend
    on interruptions: a run that was killed, run again on the same device and thread count, gives the same bytes.

    Args:
        folder: nnU-Net's preprocessed data, ``<nnUNet_preprocessed>/<Dataset>/<data_identifier>``.
        cases: identifiers.
        sam: model, or a name as for :func:`nnunet_dgplugins.sam.models.get_model`.
        channels: one input channel or three.
        mode: ``half``, ``compact`` or ``auto`` (measured once on the dataset's own slices, then remembered).
        device: where the encoder runs.
        dtype: precision of the encoder's products on the CPU, kept apart from the default float32.
        encoder: an encoder already at hand, used instead of loading one.
        part: which share of the cases to compute, from 0.
        num_parts: number of shares.
        verify: read every entry of the share completely; damaged ones are computed again.
        views: augmented views per slice beside the plain one.
        transform: the augmentation of the views.
        probe: decoder for ``auto``; None: :func:`nnunet_dgplugins.sam.probe.fixed_probe`.
        field: what the canvas shows at least, see :func:`nnunet_dgplugins.sam.preprocess.to_canvas`.
        say: receives lines of text.

    Raises:
        UserError: bad arguments, no preprocessed data, missing weights, or a full disk.
    """
    folder = Path(folder)
    _check_arguments(folder, cases, mode, part, num_parts, views, transform)
    model = sam if isinstance(sam, SamModel) else get_model(sam)
    encoder = encoder or FrozenEncoder(model, dtype)
    known = encoder.hash or weights_hash(model)
    source = _Slices(folder, cases, tuple(channels), views, transform, field)
    work = _Work(source, encoder, torch.device(device))
    if mode == AUTO:
        mode = _remembered_mode(work, known, probe or fixed_probe(model), say)
    target = store_folder(folder, model, known, mode, channels, field)
    if encoder.dtype is not None and torch.device(device).type != "cuda":
        target = target.with_name(f"{target.name}__{str(encoder.dtype).removeprefix('torch.')}")
    name = transform.name if transform and views else ""
    store = EmbeddingStore(target, model, mode, known, tuple(channels), name, field)
    work.store = store
    store.repair = work.repair
    remove_leftovers(target, alone=num_parts == 1)
    work.run(list(cases)[part::num_parts], verify, say)
    return store


def preprocessed_cases(folder: str | Path) -> list[str]:
    """Return all cases of a preprocessed data folder.

    Raises:
        UserError: there is no such folder.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    if not Path(folder).is_dir():
        raise UserError(f"No preprocessed data in {folder}. Run `nnUNetv2_preprocess` first.")
    return sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder)))


def _check_arguments(
    folder: Path,
    cases: Sequence[str],
    mode: str,
    part: int,
    num_parts: int,
    views: int,
    transform: ViewTransform | None,
) -> None:
    if mode not in MODES:
        raise UserError(f"mode={mode}: expected one of {', '.join(MODES)}.")
    if not 0 <= part < num_parts:
        raise UserError(f"Part {part} of {num_parts} does not exist: parts count from 0 to {num_parts - 1}.")
    if views and transform is None:
        raise UserError(f"{views} augmented views need an augmentation.")
    if not folder.is_dir():
        raise UserError(f"No preprocessed data in {folder}. Run `nnUNetv2_plan_and_preprocess` first.")
    if not cases:
        raise UserError(f"No cases to embed in {folder}.")


class _Slices:
    """Slices of preprocessed cases, as nnU-Net's own dataset class reads them."""

    def __init__(
        self,
        folder: Path,
        cases: Sequence[str],
        channels: tuple[int, ...],
        views: int,
        transform: ViewTransform | None,
        field: Field | None,
    ):
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        kind = infer_dataset_class(str(folder))
        self.everything = preprocessed_cases(folder)
        absent = sorted(set(cases) - set(self.everything))
        if absent:
            shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
            raise UserError(
                f"{len(absent)} cases are not preprocessed in {folder}: {shown}. Run `nnUNetv2_preprocess`."
            )
        self.folder = folder
        self.channels = channels
        self.views = views
        self.transform = transform
        self.field = field
        self._dataset = kind(str(folder), list(self.everything))

    def load(self, case: str) -> torch.Tensor:
        """Return (C, Z, Y, X) float32."""
        data = torch.from_numpy(np.asarray(self._dataset.load_case(case)[0][:], dtype=np.float32))
        check_channels(self.channels, data.shape[0], f"{self.folder}, {case}")
        return data

    def keys(self, case: str, data: torch.Tensor) -> list[Key]:
        """Return the entries of a case; a slice that is zero everywhere shows nothing and has none."""
        shown = [z for z in range(data.shape[1]) if data[:, z].any()]
        return [Key(case, z, view) for view in range(self.views + 1) for z in shown]

    def canvas(self, data: torch.Tensor, key: Key, model: SamModel) -> torch.Tensor:
        """Return what the encoder sees of a key, augmented if it is a view."""
        image = data[:, key.z]
        if key.view and self.transform:
            image = self.transform(image, key)
        return to_canvas(image, model, self.channels, self.field)


@dataclass
class _Work:
    """Runs the encoder over slices in groups that never change, so that an interruption changes no bit."""

    source: _Slices
    encoder: FrozenEncoder
    device: torch.device
    store: EmbeddingStore = dataclasses.field(init=False)

    @property
    def batch(self) -> int:
        return _CUDA_BATCH if self.device.type == "cuda" else 1

    def groups(self, case: str, data: torch.Tensor) -> list[list[Key]]:
        keys = self.source.keys(case, data)
        return [keys[start : start + self.batch] for start in range(0, len(keys), self.batch)]

    def encode(self, data: torch.Tensor, group: Sequence[Key]) -> Iterator[list[torch.Tensor]]:
        """Yield the features of each key of a group."""
        canvases = [self.source.canvas(data, key, self.encoder.model) for key in group]
        features = [x.cpu() for x in self.encoder(torch.stack(canvases).to(self.device))]
        for index in range(len(group)):
            yield [x[index] for x in features]

    def repair(self, key: Key) -> None:
        """Compute one entry anew (with its group, whose size can matter to the last bit)."""
        data = self.source.load(key.case)
        group = next(group for group in self.groups(key.case, data) if key in group)
        self._store(data, group, {key})

    def _store(self, data: torch.Tensor, group: Sequence[Key], wanted: Iterable[Key]) -> None:
        for key, features in zip(group, self.encode(data, group), strict=True):
            if key in wanted:
                self.store.write(key, features, self.hash(data, key))

    def hash(self, data: torch.Tensor, key: Key) -> str:
        return slice_hash(data[:, key.z], self.source.channels)  # a view's augmentation is named in the header

    def run(self, cases: Sequence[str], verify: bool, say: Callable[[str], None]) -> None:
        """Find what is missing, say what it costs, compute it."""
        missing, total = self._missing(cases, verify, say)
        count = sum(map(len, missing.values()))
        if not count:
            say(f"Embeddings of {total} slices are complete: {self.store.folder}")
            return
        model = self.store.model
        size = count * model.raw_bytes * SIZE_BOUND[self.store.mode]
        say(
            f"Embedding {count} of {total} slices with {model.described}, mode {self.store.mode}, on {self.device}: "
            f"at most {human_bytes(size)} in {self.store.folder}"
        )
        require_disk(self.store.folder, size, "the embeddings")
        progress = _Progress(count, say)
        for case, keys in missing.items():
            data = self.source.load(case)
            for group in self.groups(case, data):
                wanted = keys.intersection(group)
                # another process may have been here since
                still = {key for key in wanted if verify or not self.store.has(key, self.hash(data, key))}
                if still:
                    self._store(data, group, still)
                progress.advance(len(wanted))
        progress.close()

    def _missing(
        self, cases: Sequence[str], verify: bool, say: Callable[[str], None]
    ) -> tuple[dict[str, set[Key]], int]:
        """Return what has to be computed by case, and the number of entries there should be."""
        missing: dict[str, set[Key]] = {}
        total = damaged = absent = 0
        for case in cases:
            data = self.source.load(case)
            keys = self.source.keys(case, data)
            total += len(keys)
            for key in keys:
                content = self.hash(data, key)
                if not self.store.has(key, content):
                    absent += 1
                elif verify and self.store.verify(key, content):
                    damaged += 1
                else:
                    continue
                missing.setdefault(case, set()).add(key)
        if verify:
            say(f"Read {total - absent} entries: {damaged} damaged, {absent} missing or of other content.")
        return missing, total


class _Progress:
    """A bar on a terminal, a line per tenth elsewhere; the estimate comes after the first slice."""

    def __init__(self, total: int, say: Callable[[str], None]):
        self.total, self.say, self.done = total, say, 0
        self.start = time.monotonic()
        self.bar = tqdm(total=total, unit="slice", desc="embedding") if sys.stderr.isatty() else None

    def advance(self, count: int) -> None:
        if not count:
            return
        before, self.done = self.done, self.done + count
        if self.bar is not None:
            self.bar.update(count)
        elif not before or self.done * 10 // self.total > before * 10 // self.total:
            seconds = time.monotonic() - self.start
            left = seconds / self.done * (self.total - self.done)
            self.say(f"  {self.done} of {self.total} slices, {seconds:.0f} s so far, about {_duration(left)} to go")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def remove_leftovers(folder: Path, alone: bool = True) -> None:
    """Remove temporary files of killed processes.

    Args:
        folder: the store.
        alone: whether no other machine works on it; else only files untouched for an hour are removed.
    """
    for path in folder.glob("*/.tmp-*"):
        match = _LEFTOVER.match(path.name)
        try:
            old = time.time() - path.stat().st_mtime > 3600
            if match and (old or (alone and not _running(int(match.group(1))))):
                path.unlink()
        except FileNotFoundError:
            continue  # its owner has just finished it


def _running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remembered_mode(work: _Work, known: str, probe: Probe, say: Callable[[str], None]) -> str:
    """Return auto's choice, measured on a sample of the whole data folder and written down beside the store."""
    record = store_folder(work.source.folder, work.encoder.model, known, AUTO, work.source.channels).with_suffix(
        ".json"
    )
    if record.is_file():
        return str(read_json(record)["mode"])
    say(f"auto: measuring on {SAMPLE_SLICES} slices how much rounding to 8 bits would show")
    size, worst = measure_compact(work, probe)
    mode = "compact" if size <= SIZE_BOUND["compact"] and worst.logits < LOGITS_BOUND else "half"
    say(
        f"auto: {mode}. Compact would take {size:.3f} of the float32 size and change a fixed decoder's logits by "
        f"{100 * worst.logits:.2f} % of their range (bounds {SIZE_BOUND['compact']} and {100 * LOGITS_BOUND:.1f} %)."
    )
    write_json(record, {"mode": mode, "size": size, "logits": worst.logits, "masks": worst.masks})
    return mode


def measure_compact(work: _Work, probe: Probe) -> tuple[float, Change]:
    """Return compact's size as a share of float32 and its worst change over a sample of slices."""
    cases = work.source.everything
    places = np.unique(np.linspace(0, len(cases) - 1, SAMPLE_SLICES).round().astype(int))
    sizes, changes = [], []
    for place in places:
        data = work.source.load(cases[place])
        # the middle slice has content in any volume
        (features,) = work.encode(data, [Key(cases[place], data.shape[1] // 2)])
        packed = [pack(x, BITS["compact"]) for x in features]
        sizes.append(sum(len(p.values) + len(p.scales) for p in packed) / work.encoder.model.raw_bytes)
        changes.append(change(probe, [x[None] for x in features], [unpack(p)[None] for p in packed]))
    worst = Change(max(c.logits for c in changes), max(c.masks for c in changes))
    return max(sizes), worst
