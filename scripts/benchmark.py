"""Measures what the documentation claims and writes docs/benchmarks.md.

    python scripts/benchmark.py                 everything this machine can do (vit_b on the CPU takes minutes)
    python scripts/benchmark.py --only startup  one section: startup, steps, encoder, store, grid, epl, equivariant,
                                                dcam, samsdg, gpu
    python scripts/benchmark.py --only gpu --json rows.json     where only the numbers can be carried away

Every number is a median; what is compared runs in turn, in one process, with the same threads. Sections replace their
part of the page and leave the others.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
from measure import Row, in_turn

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
TITLES = {
    "startup": "Start-up file (`python -c pass` without and with it) and quick commands",
    "steps": "Training step of the decoder on the CPU: allocator and bfloat16",
    "encoder": "Image encoder on the CPU",
    "store": "Embedding store",
    "grid": "Grid inference",
    "epl": "EPL: Fourier mixing and training step on the CPU",
    "equivariant": "Equivariant CAMs: training step and export of maps on the CPU",
    "dcam": "D-CAM: training steps and pseudo masks on the CPU",
    "samsdg": "SAM-SDG: search of components, training step and inference of the decoder on the CPU",
    "gpu": "GPU",
}


def startup_rows(repeats: int = 20) -> list[Row]:
    """Start Python with and without our start-up file, in turn, in a throw-away environment."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = Path(folder) / "bin" / "python"
        site = next((Path(folder) / "lib").glob("python*/site-packages"))
        files = {name: (ROOT / "startup" / name).read_bytes() for name in _STARTUP_FILES}
        for name, content in files.items():
            (site / name).write_bytes(content)
        start_up = site / _STARTUP_FILES[0]
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(repeats + 2):
            for present in (False, True):
                if present:
                    start_up.write_bytes(files[start_up.name])
                else:
                    start_up.unlink(missing_ok=True)
                begun = time.perf_counter()
                subprocess.run([python, "-c", "pass"], check=True)
                if number >= 2:  # the first starts fill caches
                    times[present].append(time.perf_counter() - begun)
    without, with_file = (1000 * statistics.median(times[present]) for present in (False, True))
    note = f"{with_file - without:+.2f} ms; bound 3 ms; median of {repeats} each, in turn"
    rows = [("python -c pass", f"{without:.2f} ms", f"{with_file:.2f} ms", f"{with_file / without:.2f}x", note)]
    command = Path(sys.executable).parent / "dgplugins"
    for arguments in (["list"], ["describe", "DeSAMTrainer"], ["--help"], ["convert", "prostate-saml", "--help"]):
        took = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([command, *arguments], check=True, capture_output=True)
            took.append(1000 * (time.perf_counter() - begun))
        shown = f"{statistics.median(took):.0f} ms"
        rows.append(
            (f"dgplugins {' '.join(arguments)}", "-", shown, "-", "bound 300 ms; median of 5; torch is not imported")
        )
    return rows


_STARTUP_FILES = ("nnunet_dgplugins_autoload.pth", "nnunet_dgplugins_boot.py")


def steps_rows(repeats: int = 7, batch: int = 8) -> list[Row]:
    """One DeSAM training step (vit_tiny, box and points): glibc's defaults, freed memory kept, bfloat16 besides."""
    import torch

    from nnunet_dgplugins.system import keep_freed_memory

    rows = []
    for prompt in ("box", "points"):
        step = training_step("vit_tiny", prompt, batch, torch.device("cpu"))
        variants: dict[str, Callable[[], None]] = {
            "defaults": lambda step=step: (keep_freed_memory(False), step(None))[1],
            "kept": lambda step=step: (keep_freed_memory(True), step(None))[1],
            "kept, bfloat16": lambda step=step: (keep_freed_memory(True), step(torch.bfloat16))[1],
        }
        times = in_turn(variants, repeats)
        keep_freed_memory(True)
        for name in ("kept", "kept, bfloat16"):
            rows.append((
                f"DeSAM step, vit_tiny, batch {batch}, {prompt}, allocator: glibc, freed memory {name}",
                f"{times['defaults']:.3f} s (glibc defaults)", f"{times[name]:.3f} s",
                f"{times['defaults'] / times[name]:.2f}x", f"{torch.get_num_threads()} threads, median of {repeats}",
            ))  # fmt: skip
    return rows


def training_step(model_name: str, prompt: str, batch: int, device):
    """Return a function that makes one optimiser step of the decoder on random features."""
    import torch

    from nnunet_dgplugins.methods.desam.head import DeSAMHead
    from nnunet_dgplugins.methods.desam.losses import desam_loss
    from nnunet_dgplugins.methods.desam.network import build_decoder, trainable_parameters
    from nnunet_dgplugins.methods.sam_parts import build_prompt_encoder
    from nnunet_dgplugins.sam.models import MODELS

    torch.manual_seed(0)
    model = MODELS[model_name]
    head = DeSAMHead(build_decoder(model), build_prompt_encoder(model.prompt_dim, model.grid, model.image_size))
    head.to(device)
    optimizer = torch.optim.Adam(trainable_parameters(head.mask_decoder, prompt), 1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")
    features = [torch.randn(batch, *shape, device=device) for shape in model.feature_shapes]
    target = (torch.rand(batch, 1, model.mask_size, model.mask_size, device=device) > 0.8).float()
    xy = torch.rand(batch, 1, 2, device=device) * model.image_size
    flags = torch.ones(batch, 1, device=device)

    def step(dtype):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            if prompt == "box":
                loss = desam_loss(head.box(features), target)["total"]
            else:
                logits, iou = head.points(features, xy)
                loss = desam_loss(logits, target, iou=iou, iou_target=flags, speaks=flags)["total"]
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def gpu_rows(models: tuple[str, ...] = ("vit_b", "vit_h"), batch: int = 8, repeats: int = 10) -> list[Row]:
    """Embedding throughput and the decoder's training step with AMP, on the CUDA device, random weights."""
    import torch

    from nnunet_dgplugins.sam.encoder import TappedEncoder
    from nnunet_dgplugins.sam.models import MODELS
    from nnunet_dgplugins.sam.seeded import fill_from_seed
    from nnunet_dgplugins.sam.weights import build_parts

    device = torch.device("cuda")

    def median_ms(work: Callable[[], object]) -> float:
        times = []
        for number in range(repeats + 3):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if number >= 3:
                times.append(1000 * (time.perf_counter() - begun))
        return statistics.median(times)

    rows = []
    for name in models:
        model = MODELS[name]
        encoder = build_parts(model).image_encoder
        encoder.load_state_dict(fill_from_seed(encoder.state_dict(), 0), assign=True)
        encoder.requires_grad_(False).eval().to(device)
        canvases = torch.randn(batch, 3, model.image_size, model.image_size, device=device)
        with torch.no_grad():
            plain = median_ms(lambda encoder=encoder, canvases=canvases: encoder(canvases[:1]))
            torch.cuda.reset_peak_memory_stats()
            tapped = TappedEncoder(encoder, model.taps, torch.float16)
            ours = median_ms(lambda tapped=tapped, canvases=canvases: tapped(canvases)) / batch
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.append((
            f"embed, {name}", f"{1000 / plain:.1f} slices/s (float32, one by one, as published)",
            f"{1000 / ours:.1f} slices/s (float16, batch {batch})", f"{plain / ours:.1f}x",
            f"peak {peak:.1f} GiB allocated",
        ))  # fmt: skip
        del encoder, tapped, canvases
        torch.cuda.empty_cache()
        for prompt in ("box", "points"):
            torch.cuda.reset_peak_memory_stats()
            step = training_step(name, prompt, batch, device)
            half, full = (median_ms(lambda step=step, dtype=dtype: step(dtype)) for dtype in (torch.float16, None))
            torch.cuda.reset_peak_memory_stats()
            step(torch.float16)
            peak, reserved = torch.cuda.max_memory_allocated() / 2**30, torch.cuda.memory_reserved() / 2**30
            rows.append((
                f"train step, {name}, batch {batch}, {prompt}", f"{full:.1f} ms (float32)", f"{half:.1f} ms (AMP)",
                f"{full / half:.2f}x",
                f"peak {peak:.1f} GiB allocated with AMP (published for vit_h: 7.8 GB), {reserved:.1f} GiB reserved",
            ))  # fmt: skip
            del step
            torch.cuda.empty_cache()
    return rows


def sections() -> dict[str, Callable[[], list[Row]]]:
    """Return the sections and what measures them; each imports what it needs."""

    def encoder() -> list[Row]:
        import benchmark_sam

        return benchmark_sam.encoder_rows()

    def store() -> list[Row]:
        import benchmark_sam

        return benchmark_sam.store_rows()

    def grid() -> list[Row]:
        import benchmark_desam

        return benchmark_desam.grid_rows() + benchmark_desam.grid_rows("vit_b", repeats=1)

    def epl() -> list[Row]:
        import benchmark_epl

        return benchmark_epl.rows_on_the_cpu()

    def equivariant() -> list[Row]:
        import benchmark_equivariant

        return benchmark_equivariant.rows_on_the_cpu()

    def dcam() -> list[Row]:
        import benchmark_dcam

        return benchmark_dcam.rows_on_the_cpu()

    def samsdg() -> list[Row]:
        import benchmark_samsdg

        return benchmark_samsdg.rows_on_the_cpu()

    def gpu() -> list[Row]:
        import benchmark_dcam
        import benchmark_epl
        import benchmark_equivariant

        others = (benchmark_epl, benchmark_equivariant, benchmark_dcam)
        return gpu_rows() + [row for module in others for row in module.rows_on_the_gpu()]

    return {
        "startup": startup_rows,
        "steps": steps_rows,
        "encoder": encoder,
        "store": store,
        "grid": grid,
        "epl": epl,
        "equivariant": equivariant,
        "dcam": dcam,
        "samsdg": samsdg,
        "gpu": gpu,
    }


def machine(section: str) -> str:
    """Say what was measured on."""
    import torch

    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if section == "gpu":
        return f"{torch.cuda.get_device_name()}, {versions}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {versions}"


def write_section(name: str, rows: list[Row], where: str) -> None:
    """Replace one section of the page."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else _HEAD
    lines = [
        f"<!-- {name} -->",
        f"## {TITLES[name]}",
        "",
        f"On {where}. `python scripts/benchmark.py --only {name}`",
        "",
    ]
    lines += ["| what | published, or without | ours, or with | ratio | note |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    part = "\n".join([*lines, f"<!-- end {name} -->"])
    start, end = text.find(f"<!-- {name} -->"), text.find(f"<!-- end {name} -->")
    if start >= 0:
        text = text[:start] + part + text[end + len(f"<!-- end {name} -->") :]
    else:
        text = text.rstrip() + "\n\n" + part + "\n"
    PAGE.write_text(text, encoding="utf-8")


_HEAD = (
    "# Benchmarks\n\nWritten by `python scripts/benchmark.py`. Medians; what is compared ran in turn in one process, "
    "with the same threads.\nCPU numbers name the allocator setting. Weights are random: they do not change the work.\n"
)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(TITLES)), help="Section; repeat for several.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the rows here and leave the page alone."
)
@click.option(
    "--from-json", type=click.Path(exists=True, path_type=Path), help="Put rows measured elsewhere into the page."
)
def main(only: tuple[str, ...], json_file: Path | None, from_json: Path | None) -> None:
    """Measure and write docs/benchmarks.md."""
    if from_json:
        for name, content in json.loads(from_json.read_text()).items():
            write_section(name, content["rows"], content["where"])
        return
    import torch

    found = {}
    for name, measure in sections().items():
        if (only and name not in only) or (name == "gpu" and not torch.cuda.is_available()):
            continue
        click.echo(f"== {TITLES[name]}")
        rows = measure()
        for row in rows:
            click.echo("  " + " | ".join(row))
        found[name] = {"rows": rows, "where": machine(name)}
        if not json_file:
            write_section(name, rows, machine(name))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
