"""Average metrics between two records, count FLOPs, measure feature spread, and warn of silent training problems."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from bocage.ssl.engine.parallel.distributed import Precision, all_gather_object, broadcast_object, is_main

MAX_VECTORS, MIN_VECTORS = 512, 16
"""Feature vectors of an encoder per record: number to keep, and number without which nothing is measured."""

# Metrics that the engine records itself. Other names without a slash are terms of the task's loss.
_ENGINE_METRICS = {
    "loss",
    "gradient_norm",
    "learning_rate",
    "skipped_steps",
    "samples_per_second",
    "step_seconds",
    "data_wait",
    "memory_gb",
    "tflops",
    "mfu",
}

_UNEXPLAINED_STEPS = 500  # steps of low records before a warning
_COLLAPSE_RECORDS, _COLLAPSE_STEPS = 3, 100  # consecutive low records before a warning, and the steps they must span
_MAX_DATA_WAIT = 0.2  # fraction of a step
_MIN_WAIT_SECONDS = 0.01  # seconds of waiting per step below which there is no warning
_STARVED_WINDOWS = 2  # consecutive windows; the first one contains the start of the DataLoader workers

# Dense TFLOP/s in 16 bits and in float32 (without TF32, which torch by default uses for convolutions alone), by a part
# of the device name, from the vendors' data sheets. More specific names come first.
_PEAK_TFLOPS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A40": (149.7, 37.4),
    "A30": (165.0, 10.3),
    "A10": (125.0, 31.2),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "MI300X": (1307.0, 163.4),
    "MI250X": (191.5, 47.9),  # torch shows its two dies as two devices
}


class MetricWindow:
    """Sum what a task logs between two records. The sums stay on the device, so that adding never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._ratios: dict[str, torch.Tensor] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._seconds = self._waited = 0.0
        self._samples = self._steps = 0

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add one-element tensors, ratios and feature vectors by name.

        A name may be missing on some steps or ranks; its average is over the others. A ratio is a numerator and a
        denominator, (2,); the window divides their sums. Of feature vectors (N, C), it keeps the first ``MAX_VECTORS``,
        or a few more.
        """
        for name, value in values.items():
            if value.ndim == 2:
                vectors = self._vectors.get(name, value[:0].detach())
                if len(vectors) < MAX_VECTORS:
                    self._vectors[name] = torch.cat([vectors, value.detach()])
                continue
            if value.numel() == 2:
                value = value.detach().float()
                self._ratios[name] = self._ratios[name] + value if name in self._ratios else value
                continue
            value = value.detach().float().reshape(())
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_step(self, samples: int, seconds: float, waited: float) -> None:
        """Count one step of this rank: its samples, its wall time, and the seconds it waited for data."""
        self._steps += 1
        self._samples += samples
        self._seconds += seconds
        self._waited += waited

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; ``from_state`` reads it."""
        return {
            "vectors": {name: value.cpu() for name, value in self._vectors.items()} if is_main() else {},
            "sums": {name: value.cpu() for name, value in self._sums.items()},
            "counts": dict(self._counts),
            "ratios": {name: value.cpu() for name, value in self._ratios.items()},
            "times": [self._seconds, self._waited],
            "steps": [self._samples, self._steps],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> MetricWindow:
        """Build a window on ``device`` from a state."""
        window = cls()
        window._sums = {name: value.to(device) for name, value in state["sums"].items()}
        window._vectors = {name: value.to(device) for name, value in state.get("vectors", {}).items()}
        window._counts = dict(state["counts"])
        window._ratios = {name: value.to(device) for name, value in state["ratios"].items()}
        window._seconds, window._waited = state["times"]
        window._samples, window._steps = state["steps"]
        return window

    def averages(self) -> dict[str, float]:
        """Average over the window and all ranks (a collective), and measure throughput; empty without any step.

        ``feature_std`` and ``rankme`` come from rank 0's vectors of encoders with at least ``MIN_VECTORS``.
        """
        sums, ratios = _to_lists(self._sums), _to_lists(self._ratios)
        times = self._seconds, self._waited
        ranks = all_gather_object((sums, self._counts, self._samples, ratios, memory_in_use(), *times))
        averages = {}
        all_ratios = [rank_ratios for _, _, _, rank_ratios, *_ in ranks]
        for name in sorted({name for rank_ratios in all_ratios for name in rank_ratios}):
            pairs = [rank_ratios[name] for rank_ratios in all_ratios if name in rank_ratios]
            numerator, denominator = (sum(pair[part] for pair in pairs) for part in (0, 1))
            if denominator:
                averages[name] = numerator / denominator
        for name in sorted({name for rank_sums, *_ in ranks for name in rank_sums}):
            total = sum(rank_sums.get(name, 0.0) for rank_sums, *_ in ranks)
            averages[name] = total / sum(counts.get(name, 0) for _, counts, *_ in ranks)
        if self._steps:
            seconds = max(1e-9, *(rank_seconds for *_, rank_seconds, _ in ranks))
            averages["samples_per_second"] = sum(samples for _, _, samples, *_ in ranks) / seconds
            averages["step_seconds"] = seconds / self._steps
            averages["data_wait"] = max(waited for *_, waited in ranks) / seconds
            averages["memory_gb"] = max(memory for *_, memory, _, _ in ranks)
        spread: dict[str, float] = {}
        for name, vectors in self._vectors.items() if is_main() else ():
            if len(vectors) >= MIN_VECTORS:
                spread |= {f"feature_std/{name}": feature_std(vectors), f"rankme/{name}": rankme(vectors)}
        averages.update(broadcast_object(spread))
        return averages


def _to_lists(values: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Numbers of tensors of one shape, by name, in a single transfer to the host."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}


def memory_in_use() -> float:
    """GB of this rank: the peak that CUDA allocated, or without CUDA the present memory of the process."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def loss_terms(values: Mapping[str, float | None]) -> list[str]:
    """Names of the recorded values that are terms of the task's loss."""
    return [name for name in values if "/" not in name and name not in _ENGINE_METRICS]


class FlopCounter:
    """Count the FLOPs of a process's first forward pass; the backward pass counts as twice that.

    Matrix products, convolutions and attention count, as usual for MFU (Chowdhery et al., arXiv 2204.02311). Activation
    checkpointing adds nothing. The count is good to some per cent, because passes differ with the content of samples.

    Args:
        device: device of the model.
        precision: precision of the forward pass.
        compiled: whether blocks are compiled. Then their operations are invisible, and nothing is reported.
    """

    def __init__(self, device: torch.device, precision: Precision, *, compiled: bool) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name, precision)
        self._flops = 0
        self._done = compiled

    @contextmanager
    def count(self) -> Iterator[None]:
        """Context of a forward pass."""
        if self._done:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops, self._done = 3 * counter.get_total_flops(), True

    def metrics(self, passes: int, seconds: float) -> dict[str, float]:
        """Metrics of a step of ``passes`` forward passes in ``seconds``.

        ``tflops`` is this rank's TFLOP/s. ``mfu`` is its fraction of the device's peak, where that is known.
        """
        if not self._flops:
            return {}
        rate = self._flops * passes / seconds
        return {"tflops": rate / 1e12} | ({"mfu": rate / self._peak} if self._peak is not None else {})


def peak_flops(device: str, precision: Precision) -> float | None:
    """Dense FLOP/s of a device by its name, e.g. ``NVIDIA A100-SXM4-80GB``; None for unknown devices."""
    for name, (half, single) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device, re.IGNORECASE):
            return 1e12 * (single if precision == "fp32" else half)
    return None


def sample_vectors(features: torch.Tensor) -> torch.Tensor:
    """Take at most ``MAX_VECTORS`` evenly spaced feature vectors (N, C) from a map (B, C, H, W), without gradient."""
    vectors = features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    count = min(len(vectors), MAX_VECTORS)
    rows = torch.arange(count, device=vectors.device) * len(vectors) // max(1, count)
    return vectors[rows].float()


def feature_std(vectors: torch.Tensor) -> float:
    """Standard deviation of the L2-normalised ``vectors`` (N, C), averaged over channels, times sqrt(C).

    1 when directions are spread evenly, near 0 when all are alike (Chen & He, arXiv 2011.10566).
    """
    unit = torch.nn.functional.normalize(vectors, dim=1)
    return float(unit.std(dim=0, correction=0).mean()) * vectors.shape[1] ** 0.5


def rankme(vectors: torch.Tensor) -> float:
    """Effective rank of ``vectors`` (N, C), from 1 to min(N, C): exp of the entropy of their singular values.

    RankMe (Garrido et al., arXiv 2210.02885). A small N lowers it too.
    """
    rows, columns = vectors.shape
    wide = vectors.double()
    gram = wide @ wide.T if rows < columns else wide.T @ wide
    values = torch.linalg.eigvalsh(gram.cpu()).clamp_min(0).sqrt()
    probabilities = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(probabilities).sum().exp())


class CollapseMonitor:
    """Warn once per encoder whose features are nearly the same everywhere.

    Args:
        min_feature_std: smallest healthy ``feature_std``; 0: no warning.
        min_rankme: smallest healthy ``rankme``; 0: no warning.
    """

    def __init__(self, min_feature_std: float, min_rankme: float) -> None:
        self._minima = {"feature_std": min_feature_std, "rankme": min_rankme}
        self._low_steps: dict[str, list[int]] = {}  # steps of the latest consecutive low records
        self._reported: set[str] = set()

    def warnings(self, values: Mapping[str, float], step: int) -> list[str]:
        """Warnings after the record of ``step``, whose values have ``feature_std/NAME`` and ``rankme/NAME``."""
        warnings = []
        for name in {key.partition("/")[2] for key in values if key.startswith("feature_std/")} - self._reported:
            low = [
                f"{metric} {values[f'{metric}/{name}']:.3g}"
                for metric, minimum in self._minima.items()
                if values.get(f"{metric}/{name}", minimum) < minimum
            ]
            if not low:
                self._low_steps[name] = []
                continue
            steps = self._low_steps.setdefault(name, [])
            steps.append(step)
            if len(steps) >= _COLLAPSE_RECORDS and step - steps[0] >= _COLLAPSE_STEPS:
                self._reported.add(name)
                warnings.append(
                    f"features of {name} may be collapsing: {', '.join(low)}, low in every record since step "
                    f"{steps[0]} (engine.min_feature_std, engine.min_rankme); try a lower "
                    "engine.optimizer.learning_rate or a longer warm-up"
                )
        return sorted(warnings)


def explained_ratios(values: Mapping[str, object]) -> list[str]:
    """Names of the ratios 1 - loss / loss of the best constant by modality, without those of single targets."""
    return [name for name in values if name.split("/")[-2:-1] == ["explained"]]


class ExplainedMonitor:
    """Warn once per ratio ``.../explained/MODALITY`` that stays low: the loss hardly beats a constant prediction.

    Args:
        min_explained: smallest healthy ratio; 0: no warning.
    """

    def __init__(self, min_explained: float) -> None:
        self._minimum = min_explained
        self._low_since: dict[str, int] = {}
        self._reported: set[str] = set()

    def warnings(self, values: Mapping[str, float], step: int) -> list[str]:
        """Warnings after the record of ``step``."""
        warnings = []
        for name in set(explained_ratios(values)) - self._reported:
            if values[name] >= self._minimum:
                self._low_since.pop(name, None)
                continue
            since = self._low_since.setdefault(name, step)
            if step - since >= _UNEXPLAINED_STEPS:
                self._reported.add(name)
                warnings.append(
                    f"{name} is {values[name]:.1%}, and below {self._minimum:.0%} in every record since step {since}: "
                    "the loss hardly beats that of a constant (engine.min_explained); train longer, or choose targets "
                    "that the visible part can predict"
                )
        return sorted(warnings)


class ZeroLossMonitor:
    """Warn once per loss term, or of the gradient, that is exactly 0 in two consecutive records."""

    def __init__(self) -> None:
        self._zero_since: dict[str, int] = {}
        self._reported: set[str] = set()

    def warnings(self, values: Mapping[str, float], step: int) -> list[str]:
        """Warnings after the record of ``step``, whose gradient norm and loss terms are ``values``."""
        warnings = []
        for name, value in values.items():
            if value != 0:
                self._zero_since.pop(name, None)
            elif name not in self._zero_since:
                self._zero_since[name] = step
            elif name not in self._reported:
                self._reported.add(name)
                what = "the gradient is" if name == "gradient_norm" else f"the loss term {name} is"
                warnings.append(
                    f"{what} exactly 0 in every record since step {self._zero_since[name]}, so nothing is learned from "
                    "it: check the masking, the batch size and the sensors that samples have"
                )
        return warnings


class DataStarvationMonitor:
    """Warn once that training waits for data."""

    def __init__(self) -> None:
        self._starved_windows = 0

    def warnings(self, averages: Mapping[str, float]) -> list[str]:
        """Warnings after a window with these ``MetricWindow.averages``."""
        if "data_wait" not in averages or self._starved_windows >= _STARVED_WINDOWS:
            return []
        seconds = averages["data_wait"] * averages["step_seconds"]
        starved = averages["data_wait"] > _MAX_DATA_WAIT and seconds > _MIN_WAIT_SECONDS
        self._starved_windows = self._starved_windows + 1 if starved else 0
        if self._starved_windows < _STARVED_WINDOWS:
            return []
        return [
            f"training waits for data {averages['data_wait']:.0%} of the time: try more DataLoader workers per rank "
            "(workers=), a local copy or a larger cache of the shards (cache.size=), or a smaller window"
        ]
