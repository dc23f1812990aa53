"""The model card of a published encoder, a function of the other files in its folder and of nothing else."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from bocage.ssl.encoders.export import CONFIG_FILE, WEIGHTS_FILE
from bocage.ssl.encoders.hub import PREFIX

CARD_FILE = "README.md"
FACTS_FILE = "metrics.json"
PREPROCESSING_FILE = "preprocessing.json"
RECIPE_FILE = "recipe.yaml"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PROBES = {"knn": "20 nearest neighbours", "linear": "logistic regression"}


def render_card(folder: Path) -> str:
    """The card of a folder with ``metrics.json``, ``config.json`` and ``preprocessing.json``, in Markdown.

    Its code is meant to be executed as it stands. Metrics in its header are those of its tables
    (https://huggingface.co/docs/hub/model-cards#evaluation-results).
    """
    facts, config, reading = (
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in (FACTS_FILE, CONFIG_FILE, PREPROCESSING_FILE)
    )
    template = resources.files("bocage.finetune").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["interval"] = _interval
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["plain"] = lambda value: f"{value:g}"
    description = config["bocage"]
    place = facts["place"]
    return environment.from_string(template).render(
        header=_header(facts, description).to_yaml(),
        facts=facts,
        description=description,
        spec=description["input"],
        reading=reading,
        swin=description["architecture"] == "swin",
        timm_source=f"hf-hub:{place.removeprefix(PREFIX)}" if place else "local-dir:.",
        source=place or ".",
        side=round(facts["data"]["patch"] / description["input"]["gsd"]),
        probes=_PROBES,
        files={"weights": WEIGHTS_FILE, "facts": FACTS_FILE, "reading": PREPROCESSING_FILE, "recipe": RECIPE_FILE},
        years=_years(facts["data"]),
    )


def _header(facts: dict[str, Any], description: dict[str, Any]) -> ModelCardData:
    """What the hub reads of a card."""
    terms, modality = facts["terms"], facts["modality"]
    on_hub = bool(_HUB_NAME.fullmatch(terms["dataset"]))
    results = [
        EvalResult(
            task_type="image-segmentation",
            task_name=f"{score['label']} from frozen features of cells of 12.8 m",
            dataset_type=terms["dataset"],
            dataset_name=terms["dataset"],
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
        datasets=[terms["dataset"]] if on_hub else None,
        tags=["earth-observation", "remote-sensing", "self-supervised", modality],
        model_name=f"{description['architecture']} of {modality}" if results else None,
        eval_results=results or None,
    )


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
