"""``bocage convert SRC DST``: convert checkpoints of the official FLAIR-HUB code to bocage's format, or back."""

from __future__ import annotations

import argparse
from pathlib import Path

from bocage.finetune.models.segmentation import Segmentation, load_segmentation
from bocage.finetune.official.convert import (
    extract_segmentations,
    from_official,
    load_official,
    save_official,
    to_official,
)
from bocage.shards.errors import InputError
from bocage.shards.files import atomic_write, check_new_folder
from bocage.ssl.encoders.weights import KeyReport
from bocage.tools.cli.arguments import parse_pairs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="an official checkpoint (.safetensors, .ckpt, .pth), or the output folder of `bocage finetune`",
    )
    parser.add_argument(
        "destination",
        metavar="DST",
        type=Path,
        help="for a checkpoint: new folder for its encoders and models; for a folder: .safetensors file to write",
    )
    parser.add_argument(
        "--key-report",
        metavar="FILE",
        type=Path,
        help="write for every key whether it was loaded, adapted, dropped or missing",
    )
    official = parser.add_argument_group("from an official checkpoint")
    official.add_argument(
        "--arch",
        help="Swin and decoder, e.g. swin_base_patch4_window12_384-upernet (default: inferred from the weights)",
    )
    official.add_argument(
        "--channels",
        nargs="+",
        default=[],
        metavar="MODALITY=NAMES",
        help="channels of a modality, e.g. SPOT_RGBI=R,G,B (default: those of the published models)",
    )
    official.add_argument(
        "--image-size",
        nargs="+",
        default=[],
        metavar="MODALITY=PIXELS",
        help="image size to build the model for, e.g. AERIAL_RGBI=512 (default: the size it was trained on)",
    )
    official.add_argument(
        "--fixed-size", action="store_true", help="keep extracted Swins at the image size they were trained on"
    )
    official.add_argument("--drop-auxiliary", action="store_true", help="drop auxiliary decoders")


def run(arguments: argparse.Namespace) -> int:
    """Convert; print the written paths and a summary of the keys."""
    if arguments.key_report is not None:
        _check_new_file(arguments.key_report)
    report = _to_official(arguments) if arguments.source.is_dir() else _from_official(arguments)
    print(f"keys: {report}")
    if arguments.key_report is not None:
        _write_key_report(report, arguments.key_report)
    return 0


def _to_official(arguments: argparse.Namespace) -> KeyReport:
    if any((arguments.arch, arguments.channels, arguments.image_size, arguments.fixed_size, arguments.drop_auxiliary)):
        raise InputError("SRC is a folder: options for official checkpoints do not apply")
    _check_new_file(arguments.destination)
    model_folder = arguments.source / "model"
    task = load_segmentation(model_folder if model_folder.is_dir() else arguments.source)
    model, report = to_official(task)
    save_official(model, arguments.destination)
    print(f"{arguments.destination}: an official checkpoint of a model with the inputs")
    _print_inputs(task)
    return report


def _from_official(arguments: argparse.Namespace) -> KeyReport:
    check_new_folder(arguments.destination)
    model, report = load_official(
        arguments.source,
        arch=arguments.arch,
        image_sizes={
            name: _pixels(name, text) for name, text in parse_pairs("--image-size", arguments.image_size).items()
        },
        channels={name: text.split(",") for name, text in parse_pairs("--channels", arguments.channels).items()},
        auxiliary=not arguments.drop_auxiliary,
    )
    for folder in from_official(model, arguments.destination, any_size=not arguments.fixed_size):
        print(folder)
    print("inputs, assumed from the number of channels")
    _print_inputs(next(iter(extract_segmentations(model).values())))
    return report


def _pixels(name: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--image-size {name}={text}: {text!r} is not a number of pixels")
    return int(text)


def _check_new_file(path: Path) -> None:
    """Create the parent folder; raise ``InputError`` if the file exists or the folder cannot be created."""
    if path.exists():
        raise InputError(f"{path} exists: choose another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error


def _print_inputs(task: Segmentation) -> None:
    """Print the input of each encoder: channels, representation, mean and std, which a checkpoint does not store."""
    for name in task.modalities:
        spec = task.model.encoder(name).spec
        if spec.series:
            print(f"  {name}: {', '.join(spec.channels)} as stored")
            continue
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (spec.mean, spec.std))
        print(f"  {name}: {', '.join(spec.channels)} ({spec.representation}); mean {mean}; std {std}")


def _write_key_report(report: KeyReport, path: Path) -> None:
    lines = [f"loaded\t{name}" for name in report.loaded]
    lines += [f"{what}\t{name}" for name, what in report.adapted.items()]
    lines += [f"dropped\t{name}" for name in report.dropped]
    lines += [f"missing\t{name}" for name in report.missing]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
