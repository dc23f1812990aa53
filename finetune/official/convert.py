"""Convert checkpoints of the official FLAIR-HUB code to bocage's folders and back, reporting every key."""

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
from bocage.finetune.models.upernet import UPerNetConfig
from bocage.finetune.official.infer_model import infer_model
from bocage.finetune.official.official_model import DEFAULT_ARCH, OfficialModel, baseline_input, build_official
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write, check_new_folder, fsync
from bocage.shards.modality import FLAIR_HUB
from bocage.shards.preprocess.inputs import quality_masks
from bocage.shards.preprocess.normalize import MIN_STD, InputSpec
from bocage.ssl.encoders.base import Encoder
from bocage.ssl.encoders.build import build_encoder
from bocage.ssl.encoders.export import save_encoder
from bocage.ssl.encoders.initialization import architecture_settings
from bocage.ssl.encoders.swin import SwinEncoder, resize_bias_tables
from bocage.ssl.encoders.utae import UTAE
from bocage.ssl.encoders.weights import KeyReport, compare_weights, read_tensors

PREFIX = "model."
"""Prefix of all parameters in official checkpoints. Without it the official code silently loads nothing."""

_MODEL_PREFIXES = ("encoders.", "fusion_handler.", "main_decoders.", "aux_decoders.")
_TRAINER_KEY = re.compile(r"(criterion|train_metrics|val_metrics|val_iou|train_loss|val_loss)\.")


def load_official(
    path: Path,
    *,
    arch: str | None = None,
    image_sizes: Mapping[str, int] | None = None,
    channels: Mapping[str, Sequence[str]] | None = None,
    auxiliary: bool = True,
) -> tuple[OfficialModel, KeyReport]:
    """Load an official checkpoint as a model in evaluation mode, and report what happened to each key.

    Modalities, number of channels, tasks, classes, the Swin and the image sizes are inferred from names and shapes.

    Args:
        path: ``.safetensors``, ``.ckpt`` or ``.pth`` file; names may have the prefix ``model.`` or not.
        arch: encoder and decoder, see ``build_official``. Needed for Swin v2, and where every map is smaller than the
            window: the file then does not identify the Swin.
        image_sizes: image sides by modality that the Swins are built for. Where they differ from the checkpoint's,
            relative position bias tables are resized. Default: the checkpoint's sizes.
        channels: names of the channels by modality, in order, which a checkpoint does not contain. Default: inferred
            from their number, see ``baseline_input``.
        auxiliary: whether to keep the auxiliary decoders.

    Raises:
        InputError: the file is not an official checkpoint, or bocage cannot build its model.
    """
    stored = read_tensors(path)
    if any(name.startswith(PREFIX) for name in stored):
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items() if name.startswith(PREFIX)}
        dropped = [name for name in stored if not name.startswith(PREFIX)]
    else:
        weights = {name: tensor for name, tensor in stored.items() if not _TRAINER_KEY.match(name)}
        dropped = [name for name in stored if _TRAINER_KEY.match(name)]
    if without_prefix := [name for name in dropped if not _TRAINER_KEY.match(name)]:
        raise InputError(f"{path} mixes names with and without the prefix {PREFIX!r}: {', '.join(without_prefix[:3])}")
    if not any(name.startswith(_MODEL_PREFIXES) for name in weights):
        raise InputError(f"{path} has no parameter of an official FLAIR-HUB model (encoders.*, main_decoders.*)")
    try:
        model = infer_model(weights, arch, image_sizes, channels or {}, auxiliary)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not auxiliary:
        dropped += [name for name in weights if name.startswith("aux_decoders.")]
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("aux_decoders.")}
    fitted = _resize_tables(model, weights)
    adapted = {name: "table resized" for name in fitted if fitted[name].shape != weights[name].shape}
    report = compare_weights(model.state_dict(), fitted, adapted=adapted, dropped=tuple(dropped), cast=True)
    if not report.complete:
        raise InputError(f"{path} is not an official model of this architecture: {report}")
    model.load_state_dict(fitted)
    return model.eval(), report


def save_official(model: OfficialModel, path: Path) -> None:
    """Write an official checkpoint, with the prefix that the official code expects.

    Raises:
        InputError: ``path`` does not end in ``.safetensors``.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: official checkpoints are written as .safetensors; give a name with this ending")
    weights = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})


def extract_encoder(model: OfficialModel, name: str, *, any_size: bool = True) -> Encoder:
    """Extract the encoder of a modality: a U-TAE without the official head, or a Swin for any image size.

    A U-TAE keeps ``masked_norm=False``, as it was trained. A Swin for any size has full windows and bias tables, so
    features change where a map of the official Swin was smaller than the window (the last stages of SPOT).

    Args:
        model: official model.
        name: modality of the model.
        any_size: whether to build a Swin for any image size; False keeps the size it was trained for.

    Raises:
        InputError: the model has no encoder of this modality.
    """
    if name not in model.uperfuse.encoders:
        raise InputError(f"the model has no encoder of {name}; its encoders are {', '.join(model.uperfuse.encoders)}")
    source = model.uperfuse.encoder(name)
    options = {key: value for key, value in source.config.options.items() if key not in ("head", "out_conv")}
    size = None if any_size else source.config.fixed_size
    encoder = build_encoder(source.spec, replace(source.config, options=options, fixed_size=size))
    weights = source.state_dict()
    if isinstance(encoder, SwinEncoder):
        weights = resize_bias_tables(weights, encoder)
    encoder.load_state_dict({key: weights[key] for key in encoder.state_dict()})
    return encoder.eval()


def extract_segmentations(model: OfficialModel) -> dict[str, Segmentation]:
    """Extract one fine-tuned model per task, with ``official=True``; the models share their encoders.

    Tasks whose number of classes differs from every scheme of the label are left out, because their classes are
    unknown.
    """
    inner = model.uperfuse
    encoders = {name: inner.encoder(name) for name in inner.encoders}
    by_task = {}
    for task, classes in inner.tasks.items():
        sizes = [len(scheme) for scheme in FLAIR_HUB[task].schemes]
        if classes not in sizes:
            continue
        segmentation = Segmentation(
            encoders,
            [Target(label=FLAIR_HUB[task], band=sizes.index(classes))],
            UPerNetConfig(),
            quality_masks(FLAIR_HUB, list(encoders)),
            auxiliary=list(inner.auxiliary),
            official=True,
        )
        weights = inner.state_dict()
        segmentation.model.load_state_dict({name: weights[name] for name in segmentation.model.state_dict()})
        by_task[task] = segmentation.eval()
    return by_task


def from_official(model: OfficialModel, folder: Path, *, any_size: bool = True) -> list[Path]:
    """Write ``encoders/MODALITY`` for each encoder and ``TASK/model`` for each task of ``extract_segmentations``.

    Args:
        model: official model.
        folder: output folder; it must not exist, or be empty.
        any_size: see ``extract_encoder``.

    Returns:
        Folders of the encoders and of the tasks; ``bocage predict`` takes the latter.

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
        for task, segmentation in extract_segmentations(model).items():
            save_segmentation(segmentation, new / task / "model")
            written.append(folder / task)
        new.rename(folder)
        fsync(folder.parent)
    return written


def to_official(task: Segmentation) -> tuple[OfficialModel, KeyReport]:
    """Convert a fine-tuned model to the official architecture, with a value for every official name.

    Weights are copied; relative position bias tables are resized to those of the official code. Parameters that only
    the official architecture has (heads of series, unused layers) keep their initial values and are ``missing`` in the
    report. Parameters that only bocage has (tokens of absent modalities, auxiliary decoders of series, heads that also
    served other tasks) are ``dropped``.

    The official code does not standardise series, so their standardisation is folded into the first convolution,
    exactly. Channels and statistics of images are not part of a checkpoint: the official configuration must name them.

    A model trained with ``official=False`` gives other outputs in the official code, which aligns the corners of logits
    and includes padded dates in the batch statistics of the U-TAE. Many predictions can change when series differ in
    length.

    Raises:
        InputError: the official architecture cannot express the model.
    """
    ours = task.model
    encoders = {name: ours.encoder(name) for name in ours.encoders}
    images = [encoder for encoder in encoders.values() if not encoder.spec.series]
    if not images and not ours.official:
        raise InputError(
            "the official architecture decodes series alone with the head of the U-TAE, and this model with UPerNet, "
            "so it cannot be converted: fine-tune an official checkpoint instead, or add an image"
        )
    if task.decoder_config != UPerNetConfig():
        theirs, own = asdict(UPerNetConfig()), asdict(task.decoder_config)
        keys = ", ".join(f"decoder.{key}={theirs[key]} (here {own[key]})" for key in own if own[key] != theirs[key])
        raise InputError(f"the decoder differs from the official one: fine-tune with {keys} to convert")
    for name in (*encoders, *task.targets):
        if name not in FLAIR_HUB:
            raise InputError(
                f"official checkpoints are for FLAIR-HUB, which has no {name}: models of other datasets cannot be "
                "converted"
            )
    for name, encoder in encoders.items():
        official = baseline_input(FLAIR_HUB[name])
        if encoder.spec.representation != official.representation:
            raise InputError(
                f"the encoder of {name} reads {encoder.spec.representation} values, which the official code does not "
                f"compute (it computes {official.representation}), so the model cannot be converted: fine-tune without "
                f"{name}, or from an official encoder"
            )
    tasks = {name: len(target.scheme) for name, target in task.targets.items()}
    classes = sum(tasks.values())  # the head of an official series has the classes of all tasks
    other_heads = [n for n, e in encoders.items() if isinstance(e, UTAE) and e.head_classes not in (None, classes)]
    if other_heads and ours.series_only:
        raise InputError(
            f"the head of {other_heads[0]} also serves tasks that this folder does not have, and the official "
            "architecture needs all of them: keep the original checkpoint"
        )
    model = build_official(
        {name: encoder.spec.channels for name, encoder in encoders.items()},
        tasks,
        f"{_common_swin_name(images)}-upernet" if images else DEFAULT_ARCH,
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
            weights = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            fitted |= {prefix + key: tensor for key, tensor in resize_bias_tables(weights, inner).items()}
        elif encoder.spec.mean != baseline_input(FLAIR_HUB[name]).mean:
            fitted |= _fold_standardization(f"encoders.{name}.in_conv.conv.conv.0", fitted, encoder.spec)
    adapted = {name: "table resized" for name in fitted if fitted[name].shape != stored[name].shape}
    replaced = [name for name in fitted if name not in adapted and fitted[name] is not stored[name]]
    adapted |= {name: "standardisation folded in" for name in replaced if "in_conv" in name}
    report = compare_weights(
        target.state_dict(),
        fitted,
        adapted=adapted,
        dropped=tuple(name for name in ours.state_dict() if name.startswith(only_ours)),
    )
    if report.mismatched or report.unexpected:
        raise InputError(f"the model does not fit the official architecture: {report}")
    target.load_state_dict(fitted, strict=False)
    return model.eval(), report


def _fold_standardization(name: str, weights: Mapping[str, torch.Tensor], spec: InputSpec) -> dict[str, torch.Tensor]:
    """Fold standardisation into the convolution ``name``. This is exact, because its padding reflects the values."""
    weight, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
    mean, std = (torch.tensor(numbers, dtype=torch.float64, device=weight.device) for numbers in (spec.mean, spec.std))
    scaled = weight / std.clamp_min(MIN_STD)[:, None, None]
    shifted = bias - (scaled * mean[:, None, None]).sum(dim=(1, 2, 3))
    dtype = weights[f"{name}.weight"].dtype
    return {f"{name}.weight": scaled.to(dtype), f"{name}.bias": shifted.to(dtype)}


def _common_swin_name(images: list[Encoder]) -> str:
    names = {encoder.config.name.partition(".")[0] for encoder in images}
    if len(names) > 1:
        raise InputError(
            f"the official architecture has the same Swin for all images, and this model has {', '.join(sorted(names))}"
        )
    return names.pop()


def _check_encoders(encoders: Mapping[str, Encoder], target: UPerFuse) -> None:
    """Raise ``InputError`` if an encoder computes something else than the official one, even with the same shapes."""
    for name, encoder in encoders.items():
        theirs, ours = architecture_settings(target.encoder(name).config), architecture_settings(encoder.config)
        for options in (theirs, ours):
            for key in ("head", "out_conv", "masked_norm", "fixed_size"):
                options.pop(key, None)
        if encoder.spec.series:
            defaults = {key: item.default for key, item in inspect.signature(UTAE).parameters.items()}
            theirs, ours = ({**defaults, **options} for options in (theirs, ours))
        if differing := [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]:
            values = "; ".join(f"{key} = {ours.get(key)}, official {theirs.get(key)}" for key in differing)
            raise InputError(f"the encoder of {name} differs from the official one: {values}")


def _resize_tables(model: OfficialModel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Resize the relative position bias tables of every image encoder to those of the model."""
    fitted = dict(stored)
    for name in model.uperfuse.encoders:
        encoder = model.uperfuse.encoder(name)
        if isinstance(encoder, SwinEncoder):
            prefix = f"encoders.{name}.seg_model."
            weights = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
            fitted |= {prefix + key: tensor for key, tensor in resize_bias_tables(weights, encoder).items()}
    return fitted
