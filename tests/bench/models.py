"""Compare speed and memory of the networks with reference implementations: ``python tests/bench/models.py``.

The script measures CPU time of one thread; both sides run in turns, in training mode, and times are medians. Peak
memory is the peak of torch's CPU allocator during a pass minus its value before the pass, from the profiler's
allocation events. The reference of U-TAE is

- by default ``references.ReferenceUTAE``, written from the papers: it convolves padded dates and builds keys and values
  for every pixel and date, but does not run blocks twice to find a shape;
- with ``--official-like``, the same network with the additional work of the official code, dummy passes included;
- the official code itself if BOCAGE_OFFICIAL is the folder of a checkout of IGNF/FLAIR-HUB.

The reference of UPerFuse's fusion resizes every map to the grid of the first image, concatenates and convolves, as the
official code does. With BOCAGE_OFFICIAL it is that code.

Both sides share the weights, and the column of differences shows that their outputs are equal.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints between the lines of the table

import torch
from references import OfficialFusion, OfficialUTAE, ReferenceFusion, ReferenceUTAE
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bocage.finetune.models.uperfuse import EncodedModality
from bocage.finetune.official.official_model import build_official
from bocage.ssl.encoders.utae import UTAE

OFFICIAL = "BOCAGE_OFFICIAL"
_CHANNELS, _CLASSES, _SIDE = 10, 19, 10
_MEBIBYTE = 2**20


def median_times(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each run. The runs take turns; the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(run: Callable[[], None]) -> int:
    """Return the peak of torch's CPU allocator during a run minus its value before, in bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    # The public tables sum allocations by operator; only the raw events have their order.
    events: Any = recorded.profiler.kineto_results.events()
    allocated = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def report(
    case: str, passes: dict[str, tuple[Callable[[], None], Callable[[], None]]], difference: float, repeats: int
) -> None:
    """Print a line for each pass, which is a pair of functions: the reference and bocage."""
    for name, (reference, bocage) in passes.items():
        times = median_times({"reference": reference, "bocage": bocage}, repeats)
        memory = {"reference": peak_memory(reference) / _MEBIBYTE, "bocage": peak_memory(bocage) / _MEBIBYTE}
        print(
            f"{case:<28}{name:<18}{1e3 * times['reference']:>9.1f}{1e3 * times['bocage']:>11.1f}"
            f"{times['reference'] / times['bocage']:>7.2f}{memory['reference']:>9.1f}{memory['bocage']:>12.1f}"
            f"{memory['reference'] / memory['bocage']:>7.2f}{difference:>12.1e}",
            flush=True,
        )


def print_header(model: str, reference: str, shape: str, repeats: int) -> None:
    """Print the lines above the table of one network."""
    print(f"{model} against the reference: {reference}\n{shape}, 1 thread, medians of {repeats}")
    print(
        f"{'case':<28}{'pass':<18}{'ref. ms':>9}{'bocage ms':>11}{'ratio':>7}"
        f"{'ref. MiB':>9}{'bocage MiB':>12}{'ratio':>7}{'difference':>12}"
    )


def series_cases(batch: int, length: int) -> dict[str, torch.Tensor | None]:
    """Return the (B, T) padding mask of each case, True where a date is padded."""
    rank = torch.rand(batch, length).argsort(dim=1)
    return {
        "no padding": None,
        "padded, 50-100 % valid": torch.arange(length) >= torch.linspace(0.5 * length, length, batch).long()[:, None],
        "40 % valid, at random": rank >= 0.4 * length,
        "25 % valid, at random": rank >= 0.25 * length,
    }


def compare_utae(batch: int, length: int, repeats: int, official_like: bool) -> None:
    """Print the table of U-TAE with its head, at the size of FLAIR-HUB's Sentinel-2 series."""
    checkout = os.environ.get(OFFICIAL)
    reference: nn.Module
    if checkout:
        reference, name = OfficialUTAE(Path(checkout), _CHANNELS, _CLASSES), "the official code"
    else:
        reference = ReferenceUTAE(_CHANNELS, _CLASSES, official_like)
        name = "the papers' equations" + " with the additional work of the official code" * official_like
    # The official code includes padded dates in the statistics of a norm; bocage does so here, for equal outputs.
    as_official = official_like or bool(checkout)
    bocage = UTAE(_CHANNELS, out_conv=(32, _CLASSES), masked_norm=not as_official, head=True)
    weights = {key: value.clone() for key, value in bocage.state_dict().items()}
    values = torch.randn(batch, length, _CHANNELS, _SIDE, _SIDE)
    dates = torch.arange(length).float().mul(365 / length).expand(batch, -1).contiguous()
    print_header("U-TAE", name, f"{batch} series of {length} dates, {_SIDE} x {_SIDE} px", repeats)
    for case, padding in series_cases(batch, length).items():
        series = values if padding is None else values.masked_fill(padding[:, :, None, None, None], 0.0)
        for network in (bocage, reference):
            network.load_state_dict(weights)  # the timed runs changed the running statistics
            network.eval()
        with torch.no_grad():
            difference = float(
                (bocage(series, dates, padding).logits - reference(series, dates, padding)[0]).abs().max()
            )
        bocage.train(), reference.train()

        def step(network: nn.Module, backward: bool, x: torch.Tensor, mask: torch.Tensor | None) -> None:
            with torch.set_grad_enabled(backward):
                output = network(x, dates, mask)
                maps, logits = (output.maps, output.logits) if network is bocage else (output[1], output[0])
                loss = logits.square().mean() + sum(m.square().mean() for m in maps)
            if backward:
                loss.backward()
                network.zero_grad()

        passes: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
        for label, backward in (("forward", False), ("forward+backward", True)):
            passes[label] = (
                partial(step, reference, backward, series, padding),
                partial(step, bocage, backward, series, padding),
            )
        report(case, passes, difference, repeats)


def compare_fusion(batch: int, repeats: int) -> None:
    """Print the table of UPerFuse's fusion on whole patches, with the widths of Swin-T and U-TAE."""
    checkout = os.environ.get(OFFICIAL)
    images = {"AERIAL_RGBI": 512, "DEM_ELEV": 512, "SPOT_RGBI": 64}
    series = ["SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"]
    name = "the official code" if checkout else "resize, concatenate, convolve"
    print_header("Fusion", name, f"{batch} patches of 512 px, forward with gradients to all maps", repeats)
    for case, names in (
        ("aerial + S2", ["AERIAL_RGBI", "SENTINEL2_TS"]),
        ("aerial + DEM", ["AERIAL_RGBI", "DEM_ELEV"]),
        ("three images, three series", [*images, *series]),
    ):
        model = build_official(names, ["AERIAL_LABEL-COSIA"], "swin_tiny_patch4_window7_224-upernet").uperfuse
        assert model.fusion is not None
        convolutions = model.fusion.conv_f
        reference = (
            OfficialFusion(Path(checkout), convolutions, list(images), series)
            if checkout
            else ReferenceFusion(convolutions)
        )
        maps = {}
        for key in names:
            encoder = model.encoder(key)
            sides = [images[key] // stride for stride in encoder.strides] if key in images else [_SIDE] * 4
            widths = encoder.widths if key in images else encoder.widths[::-1]  # maps of series are deepest first
            maps[key] = [
                torch.randn(batch, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
                for width, side in zip(widths, sides, strict=True)
            ]
        encoded = {key: EncodedModality(torch.arange(batch), pyramid, None) for key, pyramid in maps.items()}
        grids = [(values.shape[-2], values.shape[-1]) for values in maps[names[0]]]

        def run_bocage(
            encoded: dict[str, EncodedModality] = encoded, model: Any = model, grids: Any = grids
        ) -> list[torch.Tensor]:
            return model.fuse(encoded, batch, grids)

        def run_reference(maps: Any = maps, reference: nn.Module = reference) -> list[torch.Tensor]:
            return reference(maps)

        with torch.no_grad():
            difference = max(float((a - b).abs().max()) for a, b in zip(run_bocage(), run_reference(), strict=True))

        def step(fuse: Callable[[], list[torch.Tensor]], backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                loss = sum(values.square().mean() for values in fuse())
            if backward:
                loss.backward()  # type: ignore[union-attr]

        passes: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            label: (partial(step, run_reference, backward), partial(step, run_bocage, backward))
            for label, backward in (("forward", False), ("forward+backward", True))
        }
        report(case, passes, difference, repeats)


def main() -> None:
    """Print the tables of the chosen networks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", choices=("utae", "uperfuse", "all"), default="all", help="network to measure (default all)"
    )
    parser.add_argument("--repeats", type=int, default=9, help="turns (default 9)")
    parser.add_argument("--batch", type=int, default=4, help="samples per batch (default 4)")
    parser.add_argument("--dates", type=int, default=40, help="dates per series (default 40)")
    parser.add_argument(
        "--official-like", action="store_true", help="add the official code's additional work to the reference"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.model in ("utae", "all"):
        compare_utae(arguments.batch, arguments.dates, arguments.repeats, arguments.official_like)
    if arguments.model in ("uperfuse", "all"):
        compare_fusion(arguments.batch, arguments.repeats)


if __name__ == "__main__":
    main()
