"""Checkpoints of the official FLAIR-HUB code to bocage's folders and back, with an account of every key."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from bocage.finetune.models.segmentation import Segmentation, save_segmentation
from bocage.finetune.models.targets import Target
from bocage.finetune.models.uperfuse import UPerFuse
from bocage.finetune.models.upernet import DecoderConfig
from bocage.finetune.official.infer_model import model_of
from bocage.finetune.official.model import DEFAULT_ARCH, OfficialModel, baseline_input, build_official
from bocage.shards.errors import InputError
from bocage.shards.files import check_new_folder, flush, written_atomically
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.preprocess.normalize import LEAST_STD, InputSpec
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.bias_tables import resize_bias_tables
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.encoders.initialization import built_with
from bocage.ssl.encoders.key_report import KeyReport, compare
from bocage.ssl.encoders.swin import SwinEncoder
from bocage.ssl.encoders.utae import UTAE
from bocage.ssl.encoders.weights import read_tensors

PREFIX = "model."
"""Before every parameter of an official checkpoint: without it the official code loads nothing, and says nothing."""

_PARTS = ("encoders.", "fusion_handler.", "main_decoders.", "aux_decoders.")
_TRAINER = re.compile(r"(criterion|train_metrics|val_metrics|val_iou|train_loss|val_loss)\.")


def load_official(
    path: Path,
    *,
    arch: str | None = None,
    image_sizes: Mapping[str, int] | None = None,
    channels: Mapping[str, Sequence[str]] | None = None,
    auxiliary: bool = True,
) -> tuple[OfficialModel, KeyReport]:
    """The model of an official checkpoint, in evaluation mode.

    Modalities, channels, tasks, classes, the Swin and the image sizes are read off the names and shapes.

    Args:
        path: ``.safetensors``, ``.ckpt`` or ``.pth``, names with or without the prefix ``model.``.
        arch: see ``build_official``; needed for Swin v2 and where every map is smaller than the window, since then
            the file does not tell.
        image_sizes: sides that the Swins are built for; where they differ from the checkpoint's, tables of relative
            positions are resized. Default: the checkpoint's own.
        channels: by modality, the channels that it reads, in order, which a checkpoint does not tell. Default: by their
            number, see ``baseline_input``.
        auxiliary: whether to keep the auxiliary decoders.

    Raises:
        InputError: a file that is not such a checkpoint, or a model that cannot be built here.
    """
    stored = read_tensors(path)
    if any(name.startswith(PREFIX) for name in stored):
        prefixed = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
        aside = [name for name in stored if not name.startswith(PREFIX)]
    else:
        prefixed = {name: tensor for name, tensor in stored.items() if not _TRAINER.match(name)}
        aside = [name for name in stored if _TRAINER.match(name)]
    if strange := [name for name in aside if not _TRAINER.match(name)]:
        raise InputError(f"{path} mixes names with and without the prefix {PREFIX!r}: {', '.join(strange[:3])}")
    if not any(name.startswith(_PARTS) for name in prefixed):
        raise InputError(f"{path} holds no parameter of an official FLAIR-HUB model (encoders.*, main_decoders.*)")
    try:
        model = model_of(prefixed, arch, image_sizes, channels or {}, auxiliary)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not auxiliary:
        dropped = [name for name in prefixed if name.startswith("aux_decoders.")]
        prefixed = {name: tensor for name, tensor in prefixed.items() if name not in set(dropped)}
        aside += dropped
    fitted = _with_tables_for(model, prefixed)
    adapted = {name: "table resized" for name in fitted if fitted[name].shape != prefixed[name].shape}
    report = compare(model.state_dict(), fitted, adapted=adapted, dropped=tuple(aside), cast=True)
    if not report.complete:
        raise InputError(f"{path} is not an official model of this architecture: {report}")
    model.load_state_dict(fitted)
    return model.eval(), report


def save_official(model: OfficialModel, path: Path) -> None:
    """Write an official checkpoint, every name under the prefix that the official code expects.

    Raises:
        InputError: ``path`` does not end in ``.safetensors``.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: official checkpoints are written as .safetensors; give such a name")
    weights = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})


def extract_encoder(model: OfficialModel, name: str, *, any_size: bool = True) -> Encoder:
    """The encoder of a modality as ours: a U-TAE without the official head, a Swin for any image size.

    A U-TAE keeps ``masked_norm`` off, as it was trained. A Swin for any size has whole windows and tables; where a map
    of the official one was smaller than the window, its features change with that (the last stages of SPOT).

    Args:
        model: an official model.
        name: one of its modalities.
        any_size: False keeps a Swin as it was trained, for its one image size.

    Raises:
        InputError: a modality that the model does not read.
    """
    if name not in model.uperfuse.encoders:
        raise InputError(f"the model has no encoder of {name}; there are {', '.join(model.uperfuse.encoders)}")
    theirs = model.uperfuse.encoder(name)
    options = {key: value for key, value in theirs.config.options.items() if key not in ("head", "out_conv")}
    size = None if any_size else theirs.config.fixed_size
    encoder = build_encoder(theirs.spec, replace(theirs.config, options=options, fixed_size=size))
    weights = theirs.state_dict()
    if isinstance(encoder, SwinEncoder):
        weights = resize_bias_tables(weights, encoder)
    wanted = encoder.state_dict()
    encoder.load_state_dict({key: weights[key] for key in wanted})
    return encoder.eval()


def segmentations(model: OfficialModel) -> dict[str, Segmentation]:
    """The fine-tuned model of each task, computing as the official code does; they share their encoders.

    Tasks whose number of classes is not that of one of the label's schemes have no model here: their classes are
    unknown.
    """
    inner = model.uperfuse
    encoders = {name: inner.encoder(name) for name in inner.encoders}
    found = {}
    for task, classes in inner.tasks.items():
        sizes = [len(scheme) for scheme in FLAIR_HUB[task].schemes]
        if classes not in sizes:
            continue
        segmentation = Segmentation(
            encoders,
            [Target(label=FLAIR_HUB[task], band=sizes.index(classes))],
            DecoderConfig(),
            quality_masks(FLAIR_HUB, list(encoders)),
            auxiliary=list(inner.auxiliary),
            official=True,
        )
        own = inner.state_dict()
        segmentation.model.load_state_dict({name: own[name] for name in segmentation.model.state_dict()})
        found[task] = segmentation.eval()
    return found


def from_official(model: OfficialModel, folder: Path, *, any_size: bool = True) -> list[Path]:
    """Write ``encoders/MODALITY`` for each encoder and ``TASK/model`` for each task that ``segmentations`` knows.

    Returns:
        The folders of the encoders and of the tasks; the latter are what ``bocage predict`` takes.

    Raises:
        InputError: ``folder`` exists and is not empty.
    """
    check_new_folder(folder)
    written = []
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "new"
        for name in model.uperfuse.encoders:
            save_encoder(extract_encoder(model, name, any_size=any_size), new / "encoders" / name)
            written.append(folder / "encoders" / name)
        for task, segmentation in segmentations(model).items():
            save_segmentation(segmentation, new / task / "model")
            written.append(folder / task)
        new.rename(folder)
        flush(folder.parent)
    return written


def to_official(task: Segmentation) -> tuple[OfficialModel, KeyReport]:
    """A fine-tuned model in the official architecture, every official name filled.

    Weights move as they are, tables of relative positions to the size the official code builds. What the official
    architecture has and ours lacks (heads of series, unread layers) keeps its initial value and is ``missing`` in the
    report; what only ours has (tokens of absent sensors, auxiliary decoders of series, heads that served other tasks
    too) is ``dropped``.

    The official code feeds series as they are stored, so their standardisation moves into the first convolution,
    exactly. Channels and statistics of images do not travel: the official configuration has to name them.

    A model of bocage's own face gives other outputs there: the official code moves the corners of the logits, and lets
    padded dates into the statistics of U-TAE, which can change many predictions when series differ in length.

    Raises:
        InputError: a model that the official architecture cannot express.
    """
    ours = task.model
    encoders = {name: ours.encoder(name) for name in ours.encoders}
    images = [encoder for encoder in encoders.values() if not encoder.spec.series]
    if not images and not ours.official:
        raise InputError(
            "the official architecture decodes series alone by the head of U-TAE, bocage's own by UPerNet: this model "
            "has no official form; fine-tune an official checkpoint instead, or add an image"
        )
    if task.decoder_config != DecoderConfig():
        theirs, own = asdict(DecoderConfig()), asdict(task.decoder_config)
        keys = ", ".join(f"decoder.{key}={theirs[key]} (here {own[key]})" for key in own if own[key] != theirs[key])
        raise InputError(f"the official decoder differs from this model's: fine-tune with {keys} to convert")
    for name, encoder in encoders.items():
        official = baseline_input(FLAIR_HUB[name]) if name in FLAIR_HUB else None
        if official is None or encoder.spec.representation != official.representation:
            raise InputError(
                f"the encoder of {name} reads {encoder.spec.representation} values, which the official code does not "
                f"feed it{f' (it feeds {official.representation} ones)' if official else ''}: this model has no "
                f"official form; fine-tune without {name}, or from an official encoder"
            )
    tasks = {name: len(target.scheme) for name, target in task.targets.items()}
    classes = sum(tasks.values())  # the head of an official series has those of all tasks
    other_heads = [n for n, e in encoders.items() if isinstance(e, UTAE) and e.head_classes not in (None, classes)]
    if other_heads and ours.series_alone:
        raise InputError(
            f"the head of {other_heads[0]} serves other tasks than those of this folder: the official architecture "
            "needs them together; keep the checkpoint that they came from"
        )
    model = build_official(
        {name: encoder.spec.channels for name, encoder in encoders.items()},
        tasks,
        f"{_common_name(images)}-upernet" if images else DEFAULT_ARCH,
        {name: encoder.config.fixed_size for name, encoder in encoders.items() if encoder.config.fixed_size},
        auxiliary=[
            name
            for name in ours.auxiliary
            if not encoders[name].spec.series or (ours.official and name not in other_heads)
        ],
    )
    target = model.uperfuse
    if not ours.official:
        _check_encoders(encoders, target)
    only_ours = (
        "absent.",
        *(f"auxiliary.{name}." for name in ours.auxiliary if name not in target.auxiliary),
        *(f"encoders.{name}.out_conv." for name in other_heads),
    )
    stored = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith(only_ours)}
    fitted = dict(stored)
    for name, encoder in encoders.items():
        if isinstance(encoder, SwinEncoder):
            inner = target.encoder(name)
            assert isinstance(inner, SwinEncoder)
            prefix = f"encoders.{name}."
            own = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            fitted |= {prefix + key: tensor for key, tensor in resize_bias_tables(own, inner).items()}
        elif encoder.spec.mean != baseline_input(FLAIR_HUB[name]).mean:
            fitted |= _on_raw_values(f"encoders.{name}.in_conv.conv.conv.0", fitted, encoder.spec)
    adapted = {name: "table resized" for name in fitted if fitted[name].shape != stored[name].shape}
    moved = [name for name in fitted if name not in adapted and fitted[name] is not stored[name]]
    adapted |= {name: "standardisation moved in" for name in moved if "in_conv" in name}
    report = compare(
        target.state_dict(),
        fitted,
        adapted=adapted,
        dropped=tuple(name for name in ours.state_dict() if name.startswith(only_ours)),
    )
    if report.unfit or report.unknown:
        raise InputError(f"the official architecture differs from this model's: {report}")
    target.load_state_dict(fitted, strict=False)
    return model.eval(), report


def _on_raw_values(name: str, weights: Mapping[str, torch.Tensor], spec: InputSpec) -> dict[str, torch.Tensor]:
    """The convolution ``name`` on stored values in place of standardised ones; exact, its border being reflected."""
    weight, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
    mean, std = (torch.tensor(numbers, dtype=torch.float64, device=weight.device) for numbers in (spec.mean, spec.std))
    scaled = weight / std.clamp_min(LEAST_STD)[:, None, None]
    shifted = bias - (scaled * mean[:, None, None]).sum(dim=(1, 2, 3))
    kind = weights[f"{name}.weight"].dtype
    return {f"{name}.weight": scaled.to(kind), f"{name}.bias": shifted.to(kind)}


def _common_name(images: list[Encoder]) -> str:
    names = {encoder.config.name.partition(".")[0] for encoder in images}
    if len(names) > 1:
        raise InputError(
            f"the official architecture has one Swin for all images, this model {', '.join(sorted(names))}"
        )
    return names.pop()


def _check_encoders(encoders: Mapping[str, Encoder], target: UPerFuse) -> None:
    """Raises ``InputError`` where an encoder computes otherwise than the official one, though shapes may agree."""
    for name, encoder in encoders.items():
        theirs, ours = built_with(target.encoder(name).config), built_with(encoder.config)
        for options in (theirs, ours):
            for key in ("head", "out_conv", "masked_norm", "fixed_size"):
                options.pop(key, None)
        if encoder.spec.series:
            defaults = {key: item.default for key, item in inspect.signature(UTAE).parameters.items()}
            theirs, ours = ({**defaults, **options} for options in (theirs, ours))
        if differing := [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]:
            values = "; ".join(f"{key} = {ours.get(key)}, official {theirs.get(key)}" for key in differing)
            raise InputError(f"the encoder of {name} is built otherwise than the official one: {values}")


def _with_tables_for(model: OfficialModel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with the tables of every image at the size that the model has."""
    fitted = dict(stored)
    for name in model.uperfuse.encoders:
        encoder = model.uperfuse.encoder(name)
        if isinstance(encoder, SwinEncoder):
            prefix = f"encoders.{name}.seg_model."
            own = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            fitted |= {prefix + key: tensor for key, tensor in resize_bias_tables(own, encoder).items()}
    return fitted
