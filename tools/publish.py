"""``bocage publish RUN OUT``: pretrained encoders as folders with a card, and on to the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bocage.shards.errors import InputError

if TYPE_CHECKING:
    from bocage.finetune.publishing.release import PretrainedRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.epilog = "--to uploads with a token (HF_TOKEN, or `hf auth login`), and without tells what it would."
    parser.add_argument("pretraining", metavar="RUN", type=Path, help="folder of a finished pretraining")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder for a folder an encoder")
    parser.add_argument("--shards", required=True, metavar="SHARDS", help="what it was pretrained on, or its address")
    parser.add_argument("--modalities", nargs="+", metavar="MODALITY", help="encoders to publish (default: all)")
    measured = parser.add_mutually_exclusive_group(required=True)
    measured.add_argument(
        "--scores", nargs="+", type=Path, metavar="FOLDER", help="scores of `bocage study probe`, of each encoder"
    )
    measured.add_argument("--without-scores", action="store_true", help="the card says that nothing was measured")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="pretrained on, e.g. IGNF/FLAIR-HUB")
    parser.add_argument("--data-license", required=True, metavar="ID", help="of the data, e.g. etalab-2.0")
    parser.add_argument("--license", required=True, metavar="ID", help="of the weights, as the hub writes it")
    parser.add_argument(
        "--to", metavar="hf:ORG/NAME", help="repository; of several encoders, each has -MODALITY behind its name"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="with --to: the branch (default: main)")
    parser.add_argument("--public", action="store_true", help="with --to: a new repository is public, not private")
    parser.add_argument("--collection", metavar="TITLE", help="with --to: put the repositories into this collection")
    parser.add_argument("--dry-run", action="store_true", help="with --to: write the folders, upload nothing")


def run(arguments: argparse.Namespace) -> int:
    """Write the folders and upload them; the exit status."""
    from bocage.finetune.publishing.release import (
        PretrainedRun,
        ReleaseTerms,
        check_publication,
        has_scores,
        publish_encoder,
        read_probe_scores,
    )
    from bocage.shards.read.open import open_shards
    from bocage.ssl.encoders.hub import parse_hub_address

    for option in ("revision", "public", "collection", "dry_run"):
        if getattr(arguments, option) and not arguments.to:
            raise InputError(f"--{option.replace('_', '-')} needs --to hf:org/name")
    if arguments.to and parse_hub_address(arguments.to)[1] is not None:
        raise InputError(f"--to {arguments.to}: give the branch as --revision")
    try:
        terms = ReleaseTerms(dataset=arguments.dataset, license=arguments.license, data_license=arguments.data_license)
    except ValueError as error:
        raise InputError(f"--{str(error).replace('data_license', 'data-license')}") from error
    pretrained = PretrainedRun(arguments.pretraining, open_shards(arguments.shards))
    modalities = arguments.modalities or pretrained.modalities
    if not modalities or len(set(modalities)) < len(modalities):
        raise InputError(f"--modalities: name each encoder of {arguments.pretraining} once")
    scores: dict[str, list[Path]] = {modality: [] for modality in modalities}
    for path in arguments.scores or []:
        (modality, *others) = read_probe_scores(path)["modalities"]
        if others or modality not in scores:
            raise InputError(f"--scores {path}: of {', '.join([modality, *others])}, which is not what is published")
        if path.resolve() in {other.resolve() for other in scores[modality]}:
            raise InputError(f"--scores {path}: given twice")
        scores[modality].append(path)
    if arguments.scores and (without := [modality for modality in modalities if not scores[modality]]):
        raise InputError(f"--scores: none of {without[0]}: run `bocage study probe` with it, or leave it out")
    places = {modality: _place(arguments, modality, len(modalities)) for modality in modalities}
    for modality in modalities:
        folder = arguments.out / modality
        if not scores[modality] and has_scores(folder):
            print(f"bocage: note: the card in {folder} had scores, the new one has none", file=sys.stderr)
        try:
            publish_encoder(pretrained, modality, scores[modality], terms, places[modality], folder)
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror}") from error
        check_publication(folder)
        print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        if not arguments.to:
            _link(pretrained, f"published_folder/{modality}", str(folder.resolve()))
    if arguments.to:
        _upload(arguments, pretrained, places)
    return 0


def _upload(arguments: argparse.Namespace, run: PretrainedRun, places: Mapping[str, str | None]) -> None:
    """Upload each folder and print the address of its commit; without a token print what it would do."""
    from bocage.ssl.encoders.hub import add_to_collection, has_token, upload

    visibility = "public" if arguments.public else "private"
    if arguments.dry_run or not has_token():
        for modality, place in places.items():
            size = sum(path.stat().st_size for path in (arguments.out / modality).iterdir())
            print(
                f"would upload {arguments.out / modality} to {place}, {visibility} if it is new ({size / 1e6:.1f} MB)"
            )
        if not arguments.dry_run:
            print("there is no token: set HF_TOKEN or run `hf auth login`, then the same command uploads")
        return
    for modality, place in places.items():
        assert place is not None
        message = f"{modality} encoder, {run.state.step:,} steps of {run.description['recipe']}"
        address = upload(arguments.out / modality, place, private=not arguments.public, message=message)
        print(address)
        _link(run, f"published/{modality}", address)
    if arguments.collection:
        chosen = [place for place in places.values() if place is not None]
        print(add_to_collection(arguments.collection, chosen, private=not arguments.public))


def _link(run: PretrainedRun, name: str, place: str) -> None:
    """Say in the run's W&B or TensorBoard where an encoder was published, which is not worth failing for."""
    from bocage.ssl.engine.logging.trackers import link_afterwards

    engine, state = run.config["engine"], run.state
    try:
        link_afterwards(engine["tracker"], run.folder, engine["project"], state.run, state.step, {name: place})
    except InputError as error:
        print(f"bocage: {error}; the encoder is published all the same", file=sys.stderr)


def _place(arguments: argparse.Namespace, modality: str, count: int) -> str | None:
    if not arguments.to:
        return None
    name = arguments.to if count == 1 else f"{arguments.to}-{modality.lower().replace('_', '-')}"
    return f"{name}@{arguments.revision}" if arguments.revision else name
