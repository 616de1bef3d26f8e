"""SAM on the CPU and the embedding store, against the plain encoder call and the published way of storing features.

    python scripts/benchmark_sam.py encoder    vit_b, random weights: seconds per slice, memory, equality (minutes)
    python scripts/benchmark_sam.py store      size, speed and error of what is stored
    python scripts/benchmark_sam.py formats    the ways of storing that were considered
    python scripts/benchmark_sam.py masks      what rounding does to masks of a trained decoder, real slices

Published (DeSAM's precompute_embeddings.py): four float32 arrays per slice through ``np.savez_compressed``. Real slices
are read from the folder named by DGPLUGINS_SAMPLE_DATA; without it a made-up slice takes their place.
"""

from __future__ import annotations

import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from measure import own_peak, peak_of_process

from nnunet_dgplugins.sam.codec import BITS, pack, unpack
from nnunet_dgplugins.sam.encoder import TappedEncoder
from nnunet_dgplugins.sam.models import MODELS, SamModel
from nnunet_dgplugins.sam.preprocess import to_canvas
from nnunet_dgplugins.sam.probe import change, fixed_probe
from nnunet_dgplugins.sam.seeded import fill_from_seed
from nnunet_dgplugins.sam.store import EmbeddingStore, Key
from nnunet_dgplugins.sam.weights import build_parts
from nnunet_dgplugins.system import keep_freed_memory

#: what, published order of work, ours, ratio, note
Row = tuple[str, str, str, str, str]
_PLAIN = "plain"


def random_encoder(model: SamModel) -> torch.nn.Module:
    """Return SAM's encoder with seeded random weights."""
    encoder = build_parts(model).image_encoder
    encoder.load_state_dict(fill_from_seed(encoder.state_dict(), 0), assign=True)
    return encoder.requires_grad_(False).eval()


def real_volume() -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """Return a prostate volume (Z, Y, X), its whole-gland mask (None for the made-up one), and what it is."""
    folder = Path(os.environ.get("DGPLUGINS_SAMPLE_DATA", "tests/sample_data")) / "prostate"
    paths = sorted(folder.glob("ProstateX/*-0000/*/*_t2w.nii.gz"))
    masks = sorted(folder.glob("picai_labels/anatomical_delineations/whole_gland/AI/Bosma22b/*.nii.gz"))
    if not paths or not masks:
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 320), torch.linspace(-1, 1, 384), indexing="ij")
        noise = torch.randn(320, 384, generator=torch.Generator().manual_seed(0))
        return (torch.exp(-2 * (rows**2 + columns**2)) + 0.1 * noise)[None], None, "made-up slice"
    import SimpleITK as sitk

    read = [
        torch.from_numpy(sitk.GetArrayFromImage(sitk.ReadImage(str(p))).astype(np.float32))
        for p in (paths[0], masks[0])
    ]
    return read[0], read[1], "real prostate T2 slice"


# ---------------------------------------------------------------- encoder


def _encoder_variants(model: SamModel) -> dict[str, Callable[[torch.Tensor], list[torch.Tensor]]]:
    encoder = random_encoder(model)
    tapped = TappedEncoder(encoder, model.taps)
    half = TappedEncoder(encoder, model.taps, torch.bfloat16)

    @torch.no_grad()
    def plain(canvas: torch.Tensor) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        hooks = [
            encoder.blocks[index].register_forward_hook(lambda _m, _i, out: found.append(out.permute(0, 3, 1, 2)))
            for index in model.taps
        ]
        found.append(encoder(canvas))
        for hook in hooks:
            hook.remove()
        return found

    return {_PLAIN: plain, "float32": tapped, "bfloat16": half}


def encoder_rows(model_name: str = "vit_b", repeats: int = 3) -> list[Row]:
    """Measure the encoder: time in turn in this process, memory of one call in a process of its own each.

    Keeping freed memory helps the plain encoder too, so both are timed with and without.
    """
    model = MODELS[model_name]
    volume, _, what = real_volume()
    canvas = to_canvas(volume[len(volume) // 2][None], model, (0,))[None]
    variants = _encoder_variants(model)
    allocators = {on: keep_freed_memory(on) for on in (False, True)}
    times: dict[tuple[str, bool], list[float]] = {(name, on): [] for on in allocators for name in variants}
    found = {name: work(canvas) for name, work in variants.items()}
    for _ in range(repeats):
        for name, on in times:
            keep_freed_memory(on)
            begun = time.perf_counter()
            variants[name](canvas)
            times[name, on].append(time.perf_counter() - begun)
    keep_freed_memory()
    seconds = {key: statistics.median(values) for key, values in times.items()}
    peaks = {name: peak_of_process(__file__, "peak", model_name, name) for name in variants}
    rows = []
    for name, on in times:
        if name == _PLAIN:
            continue
        pairs = zip(found[name], found[_PLAIN], strict=True)
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        theirs, mine = seconds[_PLAIN, on], seconds[name, on]
        note = (
            f"{allocators[on]}; peak of the process {peaks[name]:.2f} GB, plain {peaks[_PLAIN]:.2f} GB; features "
            f"differ by {off:.0e} of their maximum; bounds {'1.4x, 2.2 GB' if name == 'float32' else '2.2x'}; {what}, "
            f"{torch.get_num_threads()} threads, median of {repeats}"
        )
        label = f"image encoder per slice, {model_name}, {name}"
        rows.append((label, f"{theirs:.2f} s", f"{mine:.2f} s", f"{theirs / mine:.2f}x", note))
    return rows


def _peak(model_name: str, variant: str) -> float:
    """Return the largest resident memory (GB) of this process during one call, weights and libraries included."""
    model = MODELS[model_name]
    work = _encoder_variants(model)[variant]
    canvas = torch.randn(1, 3, model.image_size, model.image_size)
    work(canvas)
    return own_peak()


# ---------------------------------------------------------------- store


def _features(model: SamModel, volume: torch.Tensor, slices: Sequence[int]) -> list[list[torch.Tensor]]:
    encoder = TappedEncoder(random_encoder(model), model.taps)
    return [encoder(to_canvas(volume[z][None], model, (0,))[None]) for z in slices]


def with_outliers(features: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scale 1 % of the channels by 100, as real encoders have such channels."""
    scaled = [x.clone() for x in features]
    for x in scaled:
        x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))[: max(1, x.shape[1] // 100)]] *= 100
    return scaled


def store_rows(models: Sequence[str] = ("vit_b", "vit_tiny"), repeats: int = 5) -> list[Row]:
    """Measure size, speed and error for random vit_b, vit_tiny, and outlier channels; and reading against a step."""
    allocator = keep_freed_memory()
    volume, _, what = real_volume()
    rows: list[Row] = []
    for name in models:
        model = MODELS[name]
        (plain,) = _features(model, volume, [len(volume) // 2])
        said = f"{what}, {torch.get_num_threads()} threads, median of {repeats}, {allocator}"
        rows += _storing(model, plain, f"{name}, random weights", repeats, said)
        rows += _storing(model, with_outliers(plain), f"{name}, 1 % of channels x100", repeats, said)
    return rows + reading_rows() + mask_rows()


def _storing(model: SamModel, features: list[torch.Tensor], label: str, repeats: int, said: str) -> list[Row]:
    key = Key("case", 0)
    arrays = [x[0].numpy() for x in features]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        zipped = Path(folder) / "published.npz"
        stores = {mode: EmbeddingStore(Path(folder) / mode, model, mode, "0" * 64) for mode in BITS}
        taken: dict[str, list[float]] = {}

        def clock(name: str, work: Callable[[], object]) -> None:
            begun = time.perf_counter()
            work()
            taken.setdefault(name, []).append(time.perf_counter() - begun)

        for _ in range(repeats):
            clock("write", partial(_save, zipped, arrays))
            clock("read", partial(_load, zipped))
            for mode, store in stores.items():
                clock(f"write {mode}", partial(store.write, key, [x[0] for x in features], "content"))
                clock(f"read {mode}", partial(store.read, key))
        seconds = {name: statistics.median(values) for name, values in taken.items()}
        zipped_size = zipped.stat().st_size
        share = zipped_size / model.raw_bytes
        for mode, store in stores.items():
            size = store.path(key).stat().st_size
            found = change(fixed_probe(model), features, [x[None] for x in store.read(key)])
            bounds = "0.42 and 0.1 %" if mode == "half" else "0.27 and 1.5 %"
            rows.append((
                f"size per slice, {label}, {mode}", f"{zipped_size / 2**20:.2f} MiB ({share:.3f} of float32)",
                f"{size / 2**20:.2f} MiB ({size / model.raw_bytes:.3f})", f"{zipped_size / size:.1f}x smaller",
                f"a fixed decoder's logits change by {100 * found.logits:.3f} % of their range; bounds {bounds}",
            ))  # fmt: skip
            for verb, bound in (("write", 10), ("read", 5)):
                theirs, mine = seconds[verb], seconds[f"{verb} {mode}"]
                rows.append((
                    f"{verb} one slice, {label}, {mode}", f"{theirs:.3f} s", f"{mine:.4f} s", f"{theirs / mine:.0f}x",
                    f"bound {bound}x; {said}",
                ))  # fmt: skip
    return rows


def format_rows(model_name: str = "vit_b", repeats: int = 5) -> list[Row]:
    """Measure the ways of storing that were considered; the published one is float32, zipped."""
    import blosc2

    model = MODELS[model_name]
    volume, _, _ = real_volume()
    (plain,) = _features(model, volume, [len(volume) // 2])
    scaled, probe = with_outliers(plain), fixed_probe(model)

    def by_float16(level: int) -> Callable[[list[torch.Tensor]], tuple[int, list[torch.Tensor]]]:
        options = {"typesize": 2, "codec": blosc2.Codec.ZSTD, "filters": [blosc2.Filter.SHUFFLE], "nthreads": 1}

        def store(features: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
            halves = [x.half() for x in features]
            size = sum(len(blosc2.compress2(x.numpy(), clevel=level, **options)) for x in halves)
            return size, [x.float() for x in halves]

        return store

    def by_blocks(bits: int, block: int) -> Callable[[list[torch.Tensor]], tuple[int, list[torch.Tensor]]]:
        def store(features: list[torch.Tensor]) -> tuple[int, list[torch.Tensor]]:
            packed = [pack(x[0], bits, block) for x in features]
            return sum(len(p.values) + len(p.scales) for p in packed), [unpack(p)[None] for p in packed]

        return store

    ways = {f"float16, shuffle, zstd {level}": by_float16(level) for level in (1, 3, 5)}
    ways |= {f"{bits} bits in {b}x{b} blocks": by_blocks(bits, b) for bits in (8, 10, 12) for b in (8, 16, model.grid)}
    rows = []
    for name, store in ways.items():
        seconds = []
        for _ in range(repeats):
            begun = time.perf_counter()
            size, found = store(plain)
            seconds.append(time.perf_counter() - begun)
        outliers = change(probe, scaled, store(scaled)[1]).logits
        rows.append((
            name, f"{size / model.raw_bytes:.3f} of float32", f"{100 * change(probe, plain, found).logits:.3f} %",
            f"{100 * outliers:.3f} %", f"{min(seconds):.3f} s to pack and unpack, {torch.get_num_threads()} threads",
        ))  # fmt: skip
    return rows


def _save(path: Path, arrays: list[np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez_compressed(content, **{f"level{index}": array for index, array in enumerate(arrays)})
    path.write_bytes(content.getvalue())


def _load(path: Path) -> list[np.ndarray]:
    with np.load(path) as content:
        return [content[name] for name in content.files]


def reading_rows(model_name: str = "vit_tiny", batch: int = 8, repeats: int = 5) -> list[Row]:
    """Reading a training batch against the decoder's training step at the same batch."""
    from benchmark import training_step

    model = MODELS[model_name]
    volume, _, _ = real_volume()
    (features,) = _features(model, volume, [len(volume) // 2])
    step = training_step(model_name, "box", batch, torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in BITS:
            store = EmbeddingStore(Path(folder), model, mode, "0" * 64)
            keys = [Key("case", z) for z in range(batch)]
            for key in keys:
                store.write(key, [x[0] for x in features], "content")
            works = (partial(step, None), partial(store.read_batch, keys))
            times: tuple[list[float], list[float]] = ([], [])
            for number in range(repeats + 1):
                for place, work in enumerate(works):
                    begun = time.perf_counter()
                    work()
                    if number:
                        times[place].append(time.perf_counter() - begun)
            stepped, read = map(statistics.median, times)
            rows.append((
                f"read a batch of {batch}, {model_name}, {mode}, against the decoder's training step",
                f"{stepped:.3f} s (step)", f"{read:.4f} s (read)", f"{stepped / read:.0f}x",
                "bound 10x; the loader also reads ahead while the step runs",
            ))  # fmt: skip
    return rows


# ---------------------------------------------------------------- masks


def mask_rows(model_name: str = "vit_tiny", steps: int = 120, slices: int = 8) -> list[Row]:
    """Train DeSAM's decoder on real slices and compare its masks from exact and from stored features."""
    from nnunet_dgplugins.content import content_box
    from nnunet_dgplugins.methods.desam.head import DeSAMHead
    from nnunet_dgplugins.methods.desam.losses import desam_loss
    from nnunet_dgplugins.methods.desam.network import build_decoder, trainable_parameters
    from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
    from nnunet_dgplugins.sam.preprocess import resize_target

    keep_freed_memory()
    volume, mask, what = real_volume()
    if mask is None:
        return []
    model = MODELS[model_name]
    organ = [z for z in range(len(mask)) if mask[z].any()][:slices]
    exact = [torch.cat(level) for level in zip(*_features(model, volume, organ), strict=True)]
    truth = torch.stack(
        [resize_target(mask[z][None] > 0, content_box(volume[z][None]), model.mask_size) for z in organ]
    )
    torch.manual_seed(0)
    head = DeSAMHead(build_decoder(model), build_prompt_encoder(model.prompt_dim, model.grid, model.image_size))
    optimizer = torch.optim.Adam(trainable_parameters(head.mask_decoder, "box"), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        desam_loss(head.box(exact), truth.float())["total"].backward()
        optimizer.step()
    reference, logits = _dice(head, exact, truth)
    rows = []
    for mode, bits in BITS.items():
        stored = [torch.stack([unpack(pack(x, bits)) for x in level]) for level in exact]
        found, changed = _dice(head, stored, truth)
        both = 2 * ((logits > 0) & (changed > 0)).sum() / ((logits > 0).sum() + (changed > 0).sum())
        spread = float((changed - logits).abs().max() / (logits.max() - logits.min()))
        rows.append((
            f"masks of a trained decoder, {model_name}, {mode}", f"Dice {100 * reference:.2f} (exact features)",
            f"Dice {100 * found:.2f}", f"{100 * (found - reference):+.3f} points",
            f"bound 0.1 points; the two masks agree to Dice {100 * float(both):.3f}, logits to {100 * spread:.2f} % of "
            f"their range; {len(organ)} {what}s, decoder trained on them for {steps} steps",
        ))  # fmt: skip
    return rows


@torch.no_grad()
def _dice(head: torch.nn.Module, features: list[torch.Tensor], truth: torch.Tensor) -> tuple[float, torch.Tensor]:
    logits = head.box(features)
    predicted = logits > 0
    return float(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum())), logits


@click.group()
def main() -> None:
    """Measure SAM's encoder on the CPU and the embedding store."""


def _show(rows: list[Row]) -> None:
    for row in rows:
        click.echo(" | ".join(row))


@main.command("encoder")
@click.option("--model", default="vit_b", show_default=True)
@click.option("--repeats", default=3, show_default=True)
def _encoder(model: str, repeats: int) -> None:
    _show(encoder_rows(model, repeats))


@main.command("store")
@click.option("--model", "models", multiple=True, default=("vit_b", "vit_tiny"), show_default=True)
@click.option("--repeats", default=5, show_default=True)
def _store(models: tuple[str, ...], repeats: int) -> None:
    _show(store_rows(models, repeats))


@main.command("formats")
@click.option("--model", default="vit_b", show_default=True)
def _formats(model: str) -> None:
    _show(format_rows(model))


@main.command("masks")
@click.option("--model", default="vit_tiny", show_default=True)
@click.option("--steps", default=120, show_default=True)
@click.option("--slices", default=8, show_default=True)
def _masks(model: str, steps: int, slices: int) -> None:
    _show(mask_rows(model, steps, slices))


@main.command("peak", hidden=True)
@click.argument("model")
@click.argument("variant")
def _peak_command(model: str, variant: str) -> None:
    click.echo(_peak(model, variant))


if __name__ == "__main__":
    main()
