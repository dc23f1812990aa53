"""Render the model card of a published encoder from the other files of its folder."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from bocage.ssl.encoders.export import CONFIG_FILE, WEIGHTS_FILE
from bocage.ssl.encoders.hub import HUB_PREFIX

CARD_FILE = "README.md"
FACTS_FILE = "metrics.json"
PREPROCESSING_FILE = "preprocessing.json"
RECIPE_FILE = "recipe.yaml"

HUB_DATASET = re.compile(r"[\w.-]+/[\w.-]+")
"""Form of the id of a dataset on the hub."""

_HUB_DATASETS = "https://huggingface.co/datasets/"
_SWIN_PATCH = 4  # pixels; timm's Swins read sides that are multiples of this
_MAX_DOMAINS = 60  # names of domains in a card
_PROBES = {"knn": "20 nearest neighbours", "linear": "logistic regression"}


def render_card(folder: Path) -> str:
    """Render the card, in Markdown, from ``metrics.json``, ``config.json`` and ``preprocessing.json`` of a folder.

    The code in the card runs unchanged. The metrics in its header equal those in its tables
    (https://huggingface.co/docs/hub/model-cards#evaluation-results).
    """
    facts, config, preprocessing = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in (FACTS_FILE, CONFIG_FILE, PREPROCESSING_FILE)
    )
    template = resources.files("bocage.finetune.publishing").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["interval"] = _interval
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["plain"] = lambda value: f"{value:g}"
    description = config["bocage"]
    address, dataset = facts["address"], facts["terms"]["dataset"]
    domains, side = facts["data"]["domains"], round(facts["data"]["patch"] / description["input"]["gsd"])
    return environment.from_string(template).render(
        header=_header(facts, description).to_yaml(),
        facts=facts,
        description=description,
        spec=description["input"],
        preprocessing=preprocessing,
        swin=description["architecture"] == "swin",
        timm_source=f"hf-hub:{address.removeprefix(HUB_PREFIX)}" if address else "local-dir:.",
        source=address or ".",
        side=side,
        example_side=side if description["input"]["series"] else -(-side // _SWIN_PATCH) * _SWIN_PATCH,
        probes=_PROBES,
        files={
            "weights": WEIGHTS_FILE,
            "facts": FACTS_FILE,
            "preprocessing": PREPROCESSING_FILE,
            "recipe": RECIPE_FILE,
        },
        years=_years(facts["data"]),
        dataset=dataset,
        dataset_link=_link(dataset),
        citation=dataset["citation"],
        domains=", ".join(domains[:_MAX_DOMAINS]) + (", ..." if len(domains) > _MAX_DOMAINS else ""),
    )


def _header(facts: dict[str, Any], description: dict[str, Any]) -> ModelCardData:
    """Build the metadata header that the hub reads."""
    terms, modality = facts["terms"], facts["modality"]
    dataset = terms["dataset"]
    is_hub_dataset = bool(HUB_DATASET.fullmatch(dataset["source"]))
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name=f"{score['label']} from frozen features of cells of {score['cell']:g} m",
            dataset_type=dataset["source"] if is_hub_dataset else dataset["name"],
            dataset_name=dataset["name"],
            dataset_split=score["part"],
            metric_type="mean_iou",
            metric_name=f"strict mIoU (percent), {_PROBES[score['probe']]}",
            metric_value=score["miou"],
        )
        for score in facts["scores"]
    ]
    return ModelCardData(
        license=terms["license"],
        library_name="timm" if description["architecture"] == "swin" else "bocage",
        pipeline_tag="image-feature-extraction",
        datasets=[dataset["source"]] if is_hub_dataset else None,
        tags=["earth-observation", "remote-sensing", "self-supervised", modality],
        model_name=f"{description['architecture']} of {modality}" if results else None,
        eval_results=results or None,
    )


def _link(dataset: dict[str, str]) -> str:
    """Name of a dataset, in Markdown, with a link to its source if that is an address or a hub id."""
    name, source = dataset["name"], dataset["source"]
    if HUB_DATASET.fullmatch(source):
        return f"[{name}]({_HUB_DATASETS}{source})"
    return f"[{name}]({source})" if source.startswith(("https://", "http://")) else name


def _interval(score: dict[str, Any]) -> str:
    if score["interval"] is None:
        return "too few regions"
    low, high = score["interval"]
    return f"{low:.1f} to {high:.1f}"


def _years(data: dict[str, Any]) -> str:
    if data["first_date"] is None:
        return ""
    first, last = data["first_date"][:4], data["last_date"][:4]
    return first if first == last else f"{first} to {last}"
