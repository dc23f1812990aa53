"""Publish a pretrained encoder: a folder with its weights, its facts and a model card.

All facts come from the files of the run, the shards and the probes, or from the publisher (licence of the weights). The
shards say which dataset it was. A missing fact is an error. ``metrics.json`` contains all facts, and the model card is
generated from the other files of the folder (``card.py``), so that they cannot disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from omegaconf import OmegaConf

from bocage.finetune.evaluation.evaluate import read_region_matrices
from bocage.finetune.evaluation.statistics import BootstrapEstimate, mean_iou, region_weights, strict_counts
from bocage.finetune.models.targets import scheme_from_json
from bocage.finetune.publishing.card import (
    CARD_FILE,
    FACTS_FILE,
    HUB_DATASET,
    PREPROCESSING_FILE,
    RECIPE_FILE,
    render_card,
)
from bocage.shards.dataset_info import FLAIR_HUB_INFO, DatasetInfo
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_folder, sha256
from bocage.shards.format.manifest import EVERY_SAMPLE, Manifest, has_acquisition_dates
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.preprocess.normalize import InputSpec
from bocage.shards.read.patches import ShardPatches
from bocage.ssl.encoders.export import CONFIG_FILE, WEIGHTS_FILE, load_encoder
from bocage.ssl.encoders.hub import HUB_PREFIX
from bocage.ssl.encoders.initialization import IMAGENET, SCRATCH, weights_digest
from bocage.ssl.engine.checkpoint.reader import latest_checkpoint, read_state
from bocage.ssl.engine.checkpoint.writer import TrainingState
from bocage.ssl.evaluation.confusion import ConfusionMatrix

SUMS_FILE = "SHA256SUMS"
_FORMAT = 1
_REPLICATES = 2000
_MIN_REGIONS = 5  # with fewer regions, bootstrap replicates lack classes
_EPOCH = date(1970, 1, 1)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_NO_LICENCES = ("other", "unknown")
_LOCAL_KEYS = ("recipe", "shards", "output")
_LOCAL_ENGINE_KEYS = ("tracker", "project", "resume", "resume_allow")
_PROBE_KEYS = {"probe", "weights", "shards", "split", "train_cells", "modalities", "labels", "patches"}
# Describes ``shards.preprocess.inputs.cloudy_dates``.
_CLOUDY_DATES = (
    "dates with a cloud or snow probability above 1 % on more than 5 % of the pixels; a series that would lose all its "
    "dates loses only those with snow, or none"
)
_REPRESENTATIONS = {
    "linear": "stored values, unchanged",
    "decibel": "10 log10 of the stored values, clipped to at least 0.0001",
    "relief": (
        "relief: surface model minus its mean over the valid pixels of the patch; height: surface model minus terrain "
        "model"
    ),
    "elevation": "elevation: surface model; height: surface model minus terrain model",
}


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """What a card says about licences and about the pretraining data.

    Attributes:
        license: licence of the weights, as the hub writes it, e.g. ``apache-2.0``.
        dataset: pretraining data, see ``released_dataset``. Cards name the data only through this object.

    Raises:
        ValueError: the licence is not written as on the hub.
    """

    license: str
    dataset: DatasetInfo

    def __post_init__(self) -> None:
        if not _LICENCE.fullmatch(self.license):
            raise ValueError(f"license={self.license!r} is not how the hub writes licences, e.g. etalab-2.0")
        if self.license in _NO_LICENCES:
            raise ValueError(f"license={self.license} is not a licence: name it, e.g. etalab-2.0")


def released_dataset(stored: DatasetInfo, name: str | None = None, licence: str | None = None) -> DatasetInfo:
    """Return the dataset that a card names: that of the shards, unless the publisher gives another name.

    Args:
        stored: dataset that the shards name.
        name: name or hub id of the data where the shards name others, e.g. for simulated patches in the format of
            FLAIR-HUB.
        licence: licence of the data, where the shards do not name it or the name is another one.

    Raises:
        InputError: the name claims to be FLAIR-HUB and the shards are not, the licence is missing, or it contradicts
            the shards.
    """
    dataset = stored
    if name is not None and name not in (stored.name, stored.source):
        if name in (FLAIR_HUB_INFO.name, FLAIR_HUB_INFO.source):
            raise InputError(f"--dataset {name}: the shards are of {stored.name}; leave --dataset out")
        if not re.fullmatch(r"[\w][\w ./()-]*[\w)]", name):
            raise InputError(f"--dataset {name!r} is not the name of a dataset, e.g. org/name")
        dataset = DatasetInfo(name=name, source=name if HUB_DATASET.fullmatch(name) else "")
    if licence is not None and dataset.licence and licence.lower() != dataset.licence.lower():
        raise InputError(f"--data-license {licence}: the licence of {dataset.name} is {dataset.licence} in the shards")
    chosen = dataset.licence or licence or ""
    if not chosen.strip() or chosen.lower() in _NO_LICENCES:
        raise InputError(f"--data-license: the licence of {dataset.name} is unknown; name it, e.g. cc-by-4.0")
    return replace(dataset, licence=chosen)


class PretrainedRun:
    """A finished pretraining run, read from its files.

    Args:
        folder: output folder of the run.
        manifest: manifest of the shards it was trained on.

    Raises:
        InputError: the folder has no pretraining, the run is unfinished, none of its steps was finite, or it used
            other shards.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.checkpoint = latest_checkpoint(folder / "checkpoints")
        self.state: TrainingState
        self.state, self.description = read_state(self.checkpoint)
        self.config: dict[str, Any] = self.description["config"]
        if "weights" not in self.config or "masking" not in self.config:
            raise InputError(f"{folder} is not a pretraining run: give the output folder of `bocage pretrain`")
        if self.state.step < (steps := self.config["engine"]["steps"]):
            raise InputError(f"{folder} is at step {self.state.step} of {steps}: finish the run before publishing")
        if self.state.skipped >= self.state.step:
            raise InputError(f"{folder}: no step had a finite loss, so nothing was learned: look at its metrics.jsonl")
        if self.config["shards"] != manifest.digest:
            raise InputError(f"{folder} was not trained on {manifest.path}: dataset.json differs")
        self.rows = manifest.split(self.config["split"], self.config["train"])

    @property
    def modalities(self) -> list[str]:
        """Sensors whose encoders the run exported."""
        return sorted(path.parent.name for path in (self.folder / "encoders").glob(f"*/{WEIGHTS_FILE}"))

    def encoder_folder(self, modality: str) -> Path:
        """Return the folder of an encoder, after checking that it is the encoder of the last checkpoint.

        Raises:
            InputError: the run has no such encoder, or its files were replaced.
        """
        folder = self.folder / "encoders" / modality
        if modality not in self.modalities:
            raise InputError(
                f"{self.folder} has no encoder of {modality}; it has {', '.join(self.modalities) or 'none'}"
            )
        exported = self.checkpoint / "export" / modality
        if weights_digest(str(folder)) != weights_digest(str(exported)):
            raise InputError(f"{folder} does not have the weights of {self.checkpoint}: they were replaced")
        if (folder / CONFIG_FILE).read_bytes() != (exported / CONFIG_FILE).read_bytes():
            raise InputError(f"{folder / CONFIG_FILE} differs from that of {self.checkpoint}: it was changed")
        return folder


def publish_encoder(
    run: PretrainedRun, modality: str, scores: Sequence[Path], terms: ReleaseTerms, address: str | None, folder: Path
) -> None:
    """Write the folder of one encoder, atomically.

    Args:
        run: pretraining run of the encoder.
        modality: sensor of the encoder.
        scores: folders of the encoder's scores, from ``bocage study probe``.
        terms: facts from the publisher.
        address: hub address ``hf:org/name`` or ``hf:org/name@revision`` for the code in the card; None for a local
            folder.
        folder: output folder: new, empty, or an unchanged earlier publication, which is replaced.

    Raises:
        InputError: a fact is missing or contradicts another one, or ``folder`` has other or changed files.
    """
    is_republication = (folder / FACTS_FILE).is_file() and (folder / SUMS_FILE).is_file()
    if folder.exists() and not is_republication and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not a published encoder: choose another folder")
    if is_republication:
        _check_files(folder)
    source = run.encoder_folder(modality)
    encoder = load_encoder(source)
    facts = {
        "format": _FORMAT,
        "modality": modality,
        "address": address,
        "weights": {
            "sha256": weights_digest(str(source)),
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        },
        "maps": [{"stride": s, "width": w} for s, w in zip(encoder.strides, encoder.widths, strict=True)],
        "terms": asdict(terms),
        "pretraining": _pretraining_facts(run, modality),
        "data": _data_facts(run, modality),
        "scores": [score for path in scores for score in _score_facts(run, modality, path)],
    }
    registry = run.manifest.registry
    with atomic_folder(folder) as new:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (new / name).write_bytes((source / name).read_bytes())
        _write_json(facts, new / FACTS_FILE)
        preprocessing = _preprocessing(
            encoder.spec, registry[modality].dtype, quality_masks(registry, [modality]).get(modality)
        )
        _write_json(preprocessing, new / PREPROCESSING_FILE)
        (new / RECIPE_FILE).write_text(_shareable_recipe(run), encoding="utf-8")
        (new / CARD_FILE).write_text(render_card(new), encoding="utf-8")
        lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(new.iterdir())]
        (new / SUMS_FILE).write_text("".join(lines), encoding="utf-8")


def has_scores(folder: Path) -> bool:
    """Whether a folder has an earlier publication with scores in its card."""
    try:
        return bool(json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))["scores"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_publication(folder: Path) -> None:
    """Check that the files are unchanged since publication, and that the card agrees with the facts.

    Raises:
        InputError: a file was changed or added, or the card disagrees.
    """
    _check_files(folder)
    if (folder / CARD_FILE).read_text(encoding="utf-8") != render_card(folder):
        raise InputError(f"{folder / CARD_FILE} disagrees with {FACTS_FILE}: publish again")


def _check_files(folder: Path) -> None:
    listed = {SUMS_FILE}
    for line in (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        listed.add(name)
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise InputError(f"{folder / name} was changed since publication: move {folder} away, then publish again")
    if others := sorted(path.name for path in folder.iterdir() if path.name not in listed):
        raise InputError(f"{folder / others[0]} is not part of the publication: move it away, then publish again")


def _pretraining_facts(run: PretrainedRun, modality: str) -> dict[str, Any]:
    config = run.config
    return {
        "recipe": run.description["recipe"],
        "objectives": {name: weight for name, weight in config["weights"].items() if weight > 0},
        "with": [name for name in run.modalities if name != modality],
        "started_from": _without_local_path(config["encoders"].get(modality, SCRATCH)),
        "steps": run.state.step,
        "skipped_steps": run.state.skipped,
        "samples": run.state.position,
        "window": config["window"] or run.manifest.registry.patch_size,
        "run": run.state.run,
        "bocage": run.description["versions"]["bocage"],
        "libraries": {name: version for name, version in run.description["versions"].items() if name != "bocage"},
        "git": run.description["git"],
        "final_metrics": {
            name.rpartition("/")[0]: value
            for name, value in sorted(run.state.metrics.items())
            if name.endswith(f"/{modality}") and not name.startswith("evaluation/") and value is not None
        },
    }


def _data_facts(run: PretrainedRun, modality: str) -> dict[str, Any]:
    """Describe the training patches of the encoder: the patches of the pretraining run that have its sensor."""
    manifest, config = run.manifest, run.config
    rows = run.rows[ShardPatches(manifest).has_modality(modality)[run.rows]]
    regions, domains, crs = (manifest.column(name).take(rows).unique().to_pylist() for name in ("roi", "domain", "crs"))
    first = last = None
    if has_acquisition_dates(manifest.registry[modality]):
        bounds = pc.min_max(pc.list_flatten(manifest.column(f"dates.{modality}").take(rows))).as_py()
        if bounds["min"] is None:
            raise InputError(f"{manifest.path} has no dates of {modality}: shard again with the metadata of the dates")
        first, last = ((_EPOCH + timedelta(days=bounds[key])).isoformat() for key in ("min", "max"))
    split = EVERY_SAMPLE if config["split"] == EVERY_SAMPLE else f"{config['split']}={config['train']}"
    return {
        "shards": manifest.digest,
        "split": split,
        "patches": len(rows),
        "patch": manifest.registry.patch_size,
        "regions": len(regions),
        "domains": sorted(domains),
        "crs": sorted(crs),
        "first_date": first,
        "last_date": last,
    }


def _score_facts(run: PretrainedRun, modality: str, folder: Path) -> list[dict[str, Any]]:
    """Read the scores of one probe, one entry per label, and add bootstrap intervals over regions."""
    metrics = read_probe_scores(folder)
    digest = weights_digest(str(run.folder / "encoders" / modality))
    if metrics["weights"] != {modality: digest}:
        raise InputError(f"{folder} has scores of other weights than {run.folder / 'encoders' / modality}")
    if metrics["split"] == EVERY_SAMPLE:
        raise InputError(f"{folder} has scores on the probe's training patches: run `bocage study probe` with a split")
    if metrics["shards"] != run.manifest.digest:
        raise InputError(f"{folder} has scores on other shards than {run.manifest.path}")
    part = "test" if "test" in metrics else "valid"
    has_modality = ShardPatches(run.manifest).has_modality
    overlap = np.intersect1d(run.manifest.split(metrics["split"], part), run.rows)
    overlap = overlap[has_modality(modality)[overlap]]
    scores = []
    for label, facts in metrics["labels"].items():
        scheme = scheme_from_json(label, facts)
        strict = metrics[part][label]["strict"]
        matrices = read_region_matrices(folder, part, label, scheme)
        names = sorted(matrices)
        if not names:
            raise InputError(f"{folder}: the {part} patches have no scored cell of {label}")
        counts = strict_counts(np.stack([matrices[name] for name in names]), scheme)
        value = float(mean_iou(counts.sum(axis=0), scheme, background=True))
        if abs(value - strict["miou"]) > 1e-6:
            raise InputError(f"{folder}: confusions.parquet and metrics.json disagree on {label}: run the probe again")
        interval = None
        if len(names) >= _MIN_REGIONS:
            domains = [ConfusionMatrix.domain(name) for name in names]
            weights = region_weights(domains, _REPLICATES, np.random.default_rng(0))
            resampled = mean_iou(np.einsum("br,rkc->bkc", weights, counts), scheme, background=True)
            interval = BootstrapEstimate(value, resampled, 1).interval
        scores.append(
            {
                "label": label,
                "probe": metrics["probe"],
                "split": metrics["split"],
                "part": part,
                "regions": len(names),
                "patches": metrics["patches"][part],
                "seen_in_pretraining": int(has_modality(label)[overlap].sum()),
                "train_patches": metrics["patches"]["train"],
                "train_cells": metrics["train_cells"][label]["used"],
                "cell": metrics["train_cells"][label]["side"],
                "miou": value,
                "interval": interval,
                "miou_without_background": strict["miou_without_background"],
                "oa": strict["oa"],
                "iou": strict["iou"],
            }
        )
    return scores


def read_probe_scores(folder: Path) -> dict[str, Any]:
    """Read ``metrics.json`` of a probe.

    Raises:
        InputError: ``folder`` has no scores of ``bocage study probe``.
    """
    path = folder / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        subfolders = ", ".join(sorted(str(item.parent) for item in folder.glob("*/metrics.json"))[:4])
        advice = (
            f"one of its subfolders, e.g. {subfolders}" if subfolders else "a folder that `bocage study probe` wrote"
        )
        raise InputError(f"{path} cannot be read: give {advice}") from error
    if not isinstance(metrics, dict) or not metrics.keys() >= _PROBE_KEYS:
        raise InputError(f"{path} is not of a probe: give a folder that `bocage study probe` wrote")
    return metrics


def _preprocessing(spec: InputSpec, dtype: str, mask: str | None) -> dict[str, Any]:
    """Describe how stored values become the encoder's input, for programs without bocage."""
    return {
        "modality": spec.modality,
        "bands": list(spec.bands),
        "dtype": dtype,
        "representation": _REPRESENTATIONS[spec.representation],
        "channels": list(spec.channels),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "input": "(value of the representation - mean) / std, by channel; nodata is 0",
        "nodata": _describe_nodata(spec),
        "gsd": spec.gsd,
        "dates": "days since 15 May of the same year" if spec.series else None,
        "dates_left_out": None if mask is None else f"{_CLOUDY_DATES}, by {mask}",
    }


def _shareable_recipe(run: PretrainedRun) -> str:
    """Return the resolved configuration as a recipe without local paths and tracker settings."""
    recipe: dict[str, Any] = {key: value for key, value in run.config.items() if key not in _LOCAL_KEYS}
    recipe["engine"] = {key: value for key, value in recipe["engine"].items() if key not in _LOCAL_ENGINE_KEYS}
    header = "# Pretraining of this encoder: accelerate launch pretrain.py recipe=recipe.yaml shards=PATH\n"
    sources = recipe["encoders"]
    recipe["encoders"] = {name: source for name, source in sources.items() if _without_local_path(source) == source}
    for name in sorted(sources.keys() - recipe["encoders"].keys()):
        source = _without_local_path(sources[name])
        header += f"# {name} started from a local encoder, {source}: give yours as encoders.{name}=\n"
    return header + OmegaConf.to_yaml(OmegaConf.create(recipe))


def _without_local_path(source: str) -> str:
    """Reduce the path of a local encoder to its last part; other sources are unchanged."""
    kind, _, rest = source.partition(":")
    if source in (SCRATCH, IMAGENET) or source.startswith(HUB_PREFIX):
        return source
    return f"{IMAGENET}:{Path(rest).name}" if kind == IMAGENET else Path(source).name


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe_nodata(spec: InputSpec) -> str:
    """Which stored values are nodata, for a card."""
    limits = [(spec.nodata_below, "below"), (spec.nodata_above, "above")]
    ranges = [f"values {side} {limit:g}" for limit, side in limits if limit is not None]
    return f"{' or '.join(ranges)}, and infinities" if ranges else "NaN and infinities"
