"""Speed and memory of the networks against plain implementations: ``python tests/bench/models.py``.

One thread, process CPU time, interleaved runs, medians; peak memory is what torch's CPU allocator holds at most during
a pass beyond what it held before, by the profiler's allocation events. The peer of U-TAE is

- by default ``references.ReferenceUTAE``, written from the papers: padded dates go through the convolutions, keys and
  values of every pixel and date are built, but no block runs twice to learn a shape;
- with ``--official-like`` the same with the extra work of the official code, dummy passes included;
- the official code itself when BOCAGE_OFFICIAL is the folder of a checkout of IGNF/FLAIR-HUB.

The peer of UPerFuse's fusion resizes every map to the first image's grid, concatenates and convolves, which is what the
official code does; with BOCAGE_OFFICIAL it is that code.

Weights are shared, so the column of differences shows that both compute the same. Both sides run in training mode.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory would write between the lines

import torch
from references import OfficialFusion, OfficialUTAE, ReferenceFusion, ReferenceUTAE
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bocage.finetune.models.uperfuse import Encoded
from bocage.finetune.official.model import build_official
from bocage.ssl.encoders.utae import UTAE

OFFICIAL = "BOCAGE_OFFICIAL"
_CHANNELS, _CLASSES, _SIDE = 10, 19, 10
_MEBIBYTE = 2**20


def median_times(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median process CPU time of each run, seconds; runs take turns, and the first turn only warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if repeat:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(run: Callable[[], None]) -> int:
    """Most bytes that torch's CPU allocator held during the run beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    # The public tables add allocations up by operator; only the raw events keep their order.
    events: Any = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def report(
    case: str, passes: dict[str, tuple[Callable[[], None], Callable[[], None]]], difference: float, repeats: int
) -> None:
    """A line for each pass; a pass is the peer's run and ours."""
    for name, (peer, ours) in passes.items():
        times = median_times({"peer": peer, "ours": ours}, repeats)
        memory = {"peer": peak_memory(peer) / _MEBIBYTE, "ours": peak_memory(ours) / _MEBIBYTE}
        print(
            f"{case:<24}{name:<18}{1e3 * times['peer']:>9.1f}{1e3 * times['ours']:>9.1f}"
            f"{times['peer'] / times['ours']:>7.2f}{memory['peer']:>9.1f}{memory['ours']:>9.1f}"
            f"{memory['peer'] / memory['ours']:>7.2f}{difference:>12.1e}",
            flush=True,
        )


def header(model: str, peer: str, shape: str, repeats: int) -> None:
    """The lines above the table of one network."""
    print(f"{model} against {peer}\n{shape}, 1 thread, medians of {repeats}")
    print(
        f"{'case':<24}{'pass':<18}{'peer ms':>9}{'ours ms':>9}{'ratio':>7}"
        f"{'peer MiB':>9}{'ours MiB':>9}{'ratio':>7}{'difference':>12}"
    )


def series_cases(batch: int, length: int) -> dict[str, torch.Tensor | None]:
    """(B, T) padding of each case: True where there is no date."""
    drawn = torch.rand(batch, length).argsort(dim=1)
    return {
        "no padding": None,
        "padded, 50-100 % valid": torch.arange(length) >= torch.linspace(0.5 * length, length, batch).long()[:, None],
        "40 % of dates kept": drawn >= 0.4 * length,
        "25 % of dates kept": drawn >= 0.25 * length,
    }


def utae(batch: int, length: int, repeats: int, official_like: bool) -> None:
    """The table of U-TAE with its head, at the sizes of FLAIR-HUB's Sentinel-2 series."""
    checkout = os.environ.get(OFFICIAL)
    peer: nn.Module
    if checkout:
        peer, name = OfficialUTAE(Path(checkout), _CHANNELS, _CLASSES), "the official code"
    else:
        peer = ReferenceUTAE(_CHANNELS, _CLASSES, official_like)
        name = "the papers' equations" + " with the official extra work" * official_like
    # The official code counts padded dates in a norm's statistics: so do we, to compare the same computation.
    as_official = official_like or bool(checkout)
    ours = UTAE(_CHANNELS, out_conv=(32, _CLASSES), masked_norm=not as_official, head=True)
    weights = {key: value.clone() for key, value in ours.state_dict().items()}
    values = torch.randn(batch, length, _CHANNELS, _SIDE, _SIDE)
    dates = torch.arange(length).float().mul(365 / length).expand(batch, -1).contiguous()
    header("U-TAE", name, f"{batch} series of {length} dates, {_SIDE} x {_SIDE} px", repeats)
    for case, padding in series_cases(batch, length).items():
        given = values if padding is None else values.masked_fill(padding[:, :, None, None, None], 0.0)
        for network in (ours, peer):
            network.load_state_dict(weights)  # the timed runs moved the running statistics
            network.eval()
        with torch.no_grad():
            difference = float((ours(given, dates, padding).logits - peer(given, dates, padding)[0]).abs().max())
        ours.train(), peer.train()

        def step(network: nn.Module, backward: bool, x: torch.Tensor, mask: torch.Tensor | None) -> None:
            with torch.set_grad_enabled(backward):
                output = network(x, dates, mask)
                maps, logits = (output.maps, output.logits) if network is ours else (output[1], output[0])
                loss = logits.square().mean() + sum(m.square().mean() for m in maps)
            if backward:
                loss.backward()
                network.zero_grad()

        passes = {}
        for label, backward in (("forward", False), ("forward+backward", True)):
            passes[label] = (
                lambda b=backward, x=given, m=padding: step(peer, b, x, m),
                lambda b=backward, x=given, m=padding: step(ours, b, x, m),
            )
        report(case, passes, difference, repeats)


def fusion(batch: int, repeats: int) -> None:
    """The table of UPerFuse's fusion on whole patches, Swin-T and U-TAE widths."""
    checkout = os.environ.get(OFFICIAL)
    images = {"AERIAL_RGBI": 512, "DEM_ELEV": 512, "SPOT_RGBI": 64}
    series = ["SENTINEL2_TS", "SENTINEL1-ASC_TS", "SENTINEL1-DESC_TS"]
    name = "the official code" if checkout else "resizing, concatenating, convolving"
    header("Fusion", name, f"{batch} patches of 512 px, forward with gradients to all maps", repeats)
    for case, names in (
        ("aerial + S2", ["AERIAL_RGBI", "SENTINEL2_TS"]),
        ("aerial + DEM", ["AERIAL_RGBI", "DEM_ELEV"]),
        ("three images, three series", [*images, *series]),
    ):
        model = build_official(names, ["AERIAL_LABEL-COSIA"], "swin_tiny_patch4_window7_224-upernet").uperfuse
        assert model.fusion is not None
        convolutions = model.fusion.conv_f
        peer = (
            OfficialFusion(Path(checkout), convolutions, list(images), series)
            if checkout
            else ReferenceFusion(convolutions)
        )
        maps = {}
        for key in names:
            encoder = model.encoder(key)
            sides = [images[key] // stride for stride in encoder.strides] if key in images else [_SIDE] * 4
            widths = encoder.widths if key in images else encoder.widths[::-1]  # series go deepest first
            maps[key] = [
                torch.randn(batch, width, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
                for width, side in zip(widths, sides, strict=True)
            ]
        encoded = {key: Encoded(torch.arange(batch), pyramid, None) for key, pyramid in maps.items()}
        grids = [(values.shape[-2], values.shape[-1]) for values in maps[names[0]]]

        def ours(encoded: dict[str, Encoded] = encoded, model: Any = model, grids: Any = grids) -> list[torch.Tensor]:
            return model.fuse(encoded, batch, grids)

        def theirs(maps: Any = maps, peer: nn.Module = peer) -> list[torch.Tensor]:
            return peer(maps)

        with torch.no_grad():
            difference = max(float((a - b).abs().max()) for a, b in zip(ours(), theirs(), strict=True))

        def step(fuse: Callable[[], list[torch.Tensor]], backward: bool) -> None:
            with torch.set_grad_enabled(backward):
                loss = sum(values.square().mean() for values in fuse())
            if backward:
                loss.backward()  # type: ignore[union-attr]

        passes = {
            label: (lambda b=backward, f=theirs: step(f, b), lambda b=backward, f=ours: step(f, b))
            for label, backward in (("forward", False), ("forward+backward", True))
        }
        report(case, passes, difference, repeats)


def main() -> None:
    """Print a table for each network asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("utae", "uperfuse", "all"), default="all")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dates", type=int, default=40)
    parser.add_argument("--official-like", action="store_true", help="let the peer do the official code's extra work")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if arguments.model in ("utae", "all"):
        utae(arguments.batch, arguments.dates, arguments.repeats, arguments.official_like)
    if arguments.model in ("uperfuse", "all"):
        fusion(arguments.batch, arguments.repeats)


if __name__ == "__main__":
    main()
