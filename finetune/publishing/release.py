"""A pretrained encoder as others get it: a folder with weights, card, and the facts that the card is written from.

Every fact comes from the files of the run, the shards and the probes, or from the person who publishes (licences, name
of the dataset); one that is missing is an error, not a blank. ``metrics.json`` has them all, and the card is a function
of the folder's other files (``card.py``), so that they cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from omegaconf import OmegaConf

from bocage.finetune.evaluation.evaluate import region_matrices
from bocage.finetune.evaluation.statistics import BootstrapEstimate, mean_iou, region_weights, strict_counts
from bocage.finetune.models.targets import label_scheme
from bocage.finetune.publishing.card import CARD_FILE, FACTS_FILE, PREPROCESSING_FILE, RECIPE_FILE, render_card
from bocage.shards.errors import InputError
from bocage.shards.files import folder_written_whole, sha256
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest, dated
from bocage.shards.modality import PATCH_SIZE
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.export import CONFIG_FILE, WEIGHTS_FILE, load_encoder
from bocage.ssl.encoders.hub import PREFIX
from bocage.ssl.encoders.initialization import IMAGENET, SCRATCH, weights_digest
from bocage.ssl.engine.checkpoint.files import TrainingState, last_complete, read_state
from bocage.ssl.evaluation.confusion import ConfusionMatrix

SUMS_FILE = "SHA256SUMS"
_FORMAT = 1
_REPLICATES = 2000
_LEAST_REGIONS = 5  # of fewer, replicates lack classes, and say little
_EPOCH = date(1970, 1, 1)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_OF_THE_PLACE = ("recipe", "shards", "output")
_OF_WATCHING = ("tracker", "project", "resume", "resume_allow")
_OF_A_PROBE = {"probe", "weights", "shards", "split", "taught", "modalities", "labels", "patches"}
# The rule of ``shards.inputs.cloudy_dates``.
_UNCLEAR = (
    "those of which less than 95 % of the pixels have cloud and snow probabilities of at most 1 %; where that would "
    "leave none, those with snow alone, or none"
)
_REPRESENTATIONS = {
    "linear": "stored values as they are",
    "decibel": "10 log10 of the stored values, which are clipped to at least 0.0001",
    "relief": (
        "relief: the surface model less its mean over the patch, holes left out; height: the surface model less the "
        "terrain model"
    ),
    "elevation": "elevation: the surface model; height: the surface model less the terrain model",
}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What only the person who publishes can say.

    Attributes:
        dataset: the data pretrained on, e.g. ``IGNF/FLAIR-HUB``; of the form ``org/name`` it is taken for a dataset of
            the hub.
        license: of the weights, as the hub writes licences, e.g. ``apache-2.0``.
        data_license: of the data, e.g. ``etalab-2.0``.

    Raises:
        ValueError: no dataset, or a licence that is not written as on the hub.
    """

    dataset: str
    license: str
    data_license: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w][\w ./()-]*[\w)]", self.dataset):
            raise ValueError(f"dataset={self.dataset!r}: name the data that was pretrained on, e.g. IGNF/FLAIR-HUB")
        for key in ("license", "data_license"):
            if not _LICENCE.fullmatch(getattr(self, key)):
                raise ValueError(f"{key}={getattr(self, key)!r} is not how the hub writes licences, e.g. etalab-2.0")
            if getattr(self, key) in ("other", "unknown"):
                raise ValueError(f"{key}={getattr(self, key)} names none: say which, e.g. etalab-2.0")


class PretrainedRun:
    """A finished pretraining, as its files tell it.

    Args:
        folder: its output.
        manifest: the shards it was trained on.

    Raises:
        InputError: not such a folder, the run is not finished, learned nothing or was of other shards.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.checkpoint = last_complete(folder / "checkpoints")
        self.state: TrainingState
        self.state, self.description = read_state(self.checkpoint)
        self.config: dict[str, Any] = self.description["config"]
        if "weights" not in self.config or "masking" not in self.config:
            raise InputError(f"{folder} is not a pretraining: its encoders are those it was given")
        if self.state.step < (steps := self.config["engine"]["steps"]):
            raise InputError(f"{folder} is at step {self.state.step} of {steps}: finish it before it is published")
        if self.state.skipped >= self.state.step:
            raise InputError(f"{folder}: no step of it was finite, so nothing was learned: look at its loss")
        if self.config["shards"] != manifest.digest:
            raise InputError(f"{manifest.path} are not the shards that {folder} was trained on: dataset.json differs")
        self.rows = manifest.split(self.config["split"], self.config["train"])

    @property
    def modalities(self) -> list[str]:
        """Sensors with an encoder."""
        return sorted(path.parent.name for path in (self.folder / "encoders").glob(f"*/{WEIGHTS_FILE}"))

    def encoder_folder(self, modality: str) -> Path:
        """The folder of an encoder, proven to be that of the last checkpoint.

        Raises:
            InputError: the run has no such encoder, or another one lies there.
        """
        folder = self.folder / "encoders" / modality
        if modality not in self.modalities:
            raise InputError(
                f"{self.folder} has no encoder of {modality}; it has {', '.join(self.modalities) or 'none'}"
            )
        kept = self.checkpoint / "export" / modality
        if weights_digest(str(folder)) != weights_digest(str(kept)):
            raise InputError(f"{folder} does not hold the weights of {self.checkpoint}: it was replaced since")
        if (folder / CONFIG_FILE).read_bytes() != (kept / CONFIG_FILE).read_bytes():
            raise InputError(f"{folder / CONFIG_FILE} is not that of {self.checkpoint}: it was changed since")
        return folder


def publish_encoder(
    run: PretrainedRun, modality: str, scores: Sequence[Path], terms: Terms, place: str | None, folder: Path
) -> None:
    """Write the folder of one encoder, whole or not at all.

    Args:
        run: that trained it.
        modality: its sensor.
        scores: folders that ``bocage study probe`` left, of this encoder; others are an error.
        terms: what files cannot tell.
        place: ``hf:org/name`` or ``hf:org/name@revision`` where it will be found; None: in the folder.
        folder: new, or an earlier publication as it was written, which is replaced.

    Raises:
        InputError: a fact is missing or contradicts another; ``folder`` holds something else, or was changed by hand.
    """
    earlier = (folder / FACTS_FILE).is_file() and (folder / SUMS_FILE).is_file()
    if folder.exists() and not earlier and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a published encoder: choose another folder")
    if earlier:
        _check_files(folder)
    source = run.encoder_folder(modality)
    encoder = load_encoder(source)
    facts = {
        "format": _FORMAT,
        "modality": modality,
        "place": place,
        "weights": {
            "sha256": weights_digest(str(source)),
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        },
        "maps": [{"stride": s, "width": w} for s, w in zip(encoder.strides, encoder.widths, strict=True)],
        "terms": asdict(terms),
        "pretraining": _pretraining(run, modality),
        "data": _data(run, modality),
        "scores": [score for path in scores for score in _scores(run, modality, encoder, path)],
    }
    registry = run.manifest.registry
    with folder_written_whole(folder) as new:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (new / name).write_bytes((source / name).read_bytes())
        _write_json(facts, new / FACTS_FILE)
        reading = _preprocessing(
            encoder.spec, registry[modality].dtype, quality_masks(registry, [modality]).get(modality)
        )
        _write_json(reading, new / PREPROCESSING_FILE)
        (new / RECIPE_FILE).write_text(_recipe(run), encoding="utf-8")
        (new / CARD_FILE).write_text(render_card(new), encoding="utf-8")
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(new.iterdir())]
        (new / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def has_scores(folder: Path) -> bool:
    """Whether there is an earlier publication whose card has scores."""
    try:
        return bool(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["scores"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_publication(folder: Path) -> None:
    """Check that files are those that were published, and that the card agrees with the facts.

    Raises:
        InputError: a file is another one, or the card disagrees.
    """
    _check_files(folder)
    if (folder / CARD_FILE).read_text(encoding="utf-8") != render_card(folder):
        raise InputError(f"{folder / CARD_FILE} does not say what {FACTS_FILE} says: publish again")


def _check_files(folder: Path) -> None:
    listed = {SUMS_FILE}
    for line in (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed.add(name)
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise InputError(
                f"{folder / name} is not the file that was published: move {folder} away, then publish again"
            )
    if others := sorted(path.name for path in folder.iterdir() if path.name not in listed):
        raise InputError(f"{folder / others[0]} was not published: move it away, then publish again")


def _pretraining(run: PretrainedRun, modality: str) -> dict[str, Any]:
    config = run.config
    return {
        "recipe": run.description["recipe"],
        "objectives": {name: weight for name, weight in config["weights"].items() if weight > 0},
        "with": [name for name in run.modalities if name != modality],
        "started_from": _told(config["encoders"].get(modality, SCRATCH)),
        "steps": run.state.step,
        "steps_left_out": run.state.skipped,
        "samples": run.state.position,
        "window": config["window"],
        "run": run.state.run,
        "bocage": run.description["versions"]["bocage"],
        "libraries": {name: version for name, version in run.description["versions"].items() if name != "bocage"},
        "git": run.description["git"],
        "last": {
            name.rpartition("/")[0]: value
            for name, value in sorted(run.state.metrics.items())
            if name.endswith(f"/{modality}") and not name.startswith("evaluation/") and value is not None
        },
    }


def _data(run: PretrainedRun, modality: str) -> dict[str, Any]:
    """What the encoder has seen: the patches of the pretraining that hold its sensor."""
    manifest, config = run.manifest, run.config
    rows = run.rows[ShardPatches(manifest).held(modality)[run.rows]]
    regions, domains, crs = (manifest.column(name).take(rows).unique().to_pylist() for name in ("roi", "domain", "crs"))
    first = last = None
    if dated(manifest.registry[modality]):
        bounds = pc.min_max(pc.list_flatten(manifest.column(f"dates.{modality}").take(rows))).as_py()
        if bounds["min"] is None:
            raise InputError(f"{manifest.path} has no dates of {modality}: shard again with the tables of dates")
        first, last = ((_EPOCH + timedelta(days=bounds[key])).isoformat() for key in ("min", "max"))
    every = config["split"] == EVERY_SAMPLE
    return {
        "shards": manifest.digest,
        "split": EVERY_SAMPLE if every else f"{config['split']}={config['train']}",
        "patches": len(rows),
        "patch": PATCH_SIZE,
        "regions": len(regions),
        "domains": sorted(domains),
        "crs": sorted(crs),
        "first_date": first,
        "last_date": last,
    }


def _scores(run: PretrainedRun, modality: str, encoder: Encoder, folder: Path) -> list[dict[str, Any]]:
    """What one probe of the encoder measured, a score a label, with the interval that the regions alone give."""
    metrics = read_scores(folder)
    digest = weights_digest(str(run.folder / "encoders" / modality))
    if metrics["weights"] != {modality: digest}:
        raise InputError(f"{folder} was measured with other weights than {run.folder / 'encoders' / modality}")
    if metrics["split"] == EVERY_SAMPLE:
        raise InputError(f"{folder} was measured on the patches that taught it: run `bocage study probe` with a split")
    if metrics["shards"] != run.manifest.digest:
        raise InputError(f"{folder} was measured on other shards than {run.manifest.path}")
    part = "test" if "test" in metrics else "valid"
    held = ShardPatches(run.manifest).held
    seen = np.intersect1d(run.manifest.split(metrics["split"], part), run.rows)
    seen = seen[held(modality)[seen]]
    found = []
    for label, facts in metrics["labels"].items():
        scheme = label_scheme(label, facts)
        strict = metrics[part][label]["strict"]
        matrices = region_matrices(folder, part, label, scheme)
        names = sorted(matrices)
        if not names:
            raise InputError(f"{folder}: no cell of {label} was measured on the {part} patches")
        counts = strict_counts(np.stack([matrices[name] for name in names]), scheme)
        value = float(mean_iou(counts.sum(axis=0), scheme, background=True))
        if abs(value - strict["miou"]) > 1e-6:
            raise InputError(f"{folder}: confusions.parquet and metrics.json disagree about {label}: probe again")
        interval = None
        if len(names) >= _LEAST_REGIONS:
            domains = [ConfusionMatrix.domain(name) for name in names]
            weights = region_weights(domains, _REPLICATES, np.random.default_rng(0))
            resampled = mean_iou(np.einsum("br,rkc->bkc", weights, counts), scheme, background=True)
            interval = BootstrapEstimate(value, resampled, 1).interval
        found.append(
            {
                "label": label,
                "probe": metrics["probe"],
                "split": metrics["split"],
                "part": part,
                "regions": len(names),
                "patches": metrics["patches"][part],
                "seen_in_pretraining": int(held(label)[seen].sum()),
                "taught_patches": metrics["patches"]["train"],
                "taught_cells": metrics["taught"][label]["cells"],
                "miou": value,
                "interval": interval,
                "miou_without_background": strict["miou_without_background"],
                "oa": strict["oa"],
                "iou": strict["iou"],
            }
        )
    return found


def read_scores(folder: Path) -> dict[str, Any]:
    """``metrics.json`` of a probe.

    Raises:
        InputError: ``folder`` is not what ``bocage study probe`` leaves.
    """
    path = folder / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = ", ".join(sorted(str(found.parent) for found in folder.glob("*/metrics.json"))[:4])
        which = f"one that is in it, e.g. {inside}" if inside else "a folder of scores that `bocage study probe` wrote"
        raise InputError(f"{path} cannot be read: give {which}") from error
    if not isinstance(metrics, dict) or not metrics.keys() >= _OF_A_PROBE:
        raise InputError(f"{path} is not of a probe: give a folder of scores that `bocage study probe` wrote")
    return metrics


def _preprocessing(spec: InputSpec, dtype: str, mask: str | None) -> dict[str, Any]:
    """How stored values become input, for programs that know nothing of bocage."""
    return {
        "modality": spec.modality,
        "bands": list(spec.bands),
        "dtype": dtype,
        "representation": _REPRESENTATIONS[spec.representation],
        "channels": list(spec.channels),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "input": "(value of the representation - mean) / std, by channel; holes are 0",
        "holes": (
            "NaN and infinities" if spec.nodata_below is None else f"values under {spec.nodata_below:g}, and infinities"
        ),
        "gsd": spec.gsd,
        "dates": "days since 15 May of the date's own year" if spec.series else None,
        "dates_left_out": None if mask is None else f"{_UNCLEAR}, by {mask}",
    }


def _recipe(run: PretrainedRun) -> str:
    """The resolved configuration as a recipe that others can run on their shards, without what is only of the place."""
    kept: dict[str, Any] = {key: value for key, value in run.config.items() if key not in _OF_THE_PLACE}
    kept["engine"] = {key: value for key, value in kept["engine"].items() if key not in _OF_WATCHING}
    head = "# What this encoder was pretrained with: accelerate launch pretrain.py recipe=recipe.yaml shards=PATH\n"
    sources = kept["encoders"]
    kept["encoders"] = {name: source for name, source in sources.items() if _told(source) == source}
    for name in sorted(sources.keys() - kept["encoders"].keys()):
        head += f"# {name} was started from a local encoder, {_told(sources[name])}: give yours as encoders.{name}=\n"
    return head + OmegaConf.to_yaml(OmegaConf.create(kept))


def _told(source: str) -> str:
    """A source without the place of local files."""
    kind, _, rest = source.partition(":")
    if source in (SCRATCH, IMAGENET) or source.startswith(PREFIX):
        return source
    return f"{IMAGENET}:{Path(rest).name}" if kind == IMAGENET else Path(source).name


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
