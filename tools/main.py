"""The ``bocage`` command: parse arguments, run a sub-command, and print wrong input as one sentence."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import os
import signal
import sys
from collections.abc import Callable, Iterable

from bocage.shards.errors import InputError
from bocage.tools.cli.examples import add_examples
from bocage.tools.cli.logging_setup import configure_logging

COMMANDS = {
    "get": "download FLAIR-HUB from the Hugging Face hub, all or a part of it",
    "sample": "write simulated patches in the format of FLAIR-HUB",
    "describe": "draft the description of a dataset that is not FLAIR-HUB",
    "shard": "write FLAIR-HUB, or a described dataset, as WebDataset shards with a manifest",
    "verify": "check shards against their manifest and name broken files",
    "inspect": "summarise shards, and draw a patch in all its modalities",
    "pretrain": "pretrain one encoder per modality on unlabelled shards",
    "finetune": "fine-tune a segmentation model on labels, from pretrained encoders or from scratch",
    "evaluate": "score a fine-tuned model on any patches, also with sensors missing",
    "predict": "write label maps of a fine-tuned model as GeoTIFFs",
    "map": "map a whole area by tiled inference on rasters of any size",
    "study": "study label efficiency: subsets, a grid of runs, a report, probes",
    "publish": "publish pretrained encoders with a model card, locally or on the Hugging Face hub",
    "attention": "draw the temporal attention of a series encoder",
    "convert": "convert checkpoints of the official FLAIR-HUB code, in both directions",
    "replay": "repeat a training step with a non-finite loss, and name its cause",
    "doctor": "check this machine and shards for training",
    "completion": "print a script for shell completion",
    "demo": "run everything on a simulated sample and compare pretraining with scratch",
}
"""Sub-commands: modules of that name in this package, with ``add_arguments(parser)`` and ``run(arguments)``."""


def run_guarded(action: Callable[[], int | None]) -> int:
    """Run ``action`` and return its exit status.

    Wrong user input prints one sentence and gives status 2; Ctrl-C gives 130. Other exceptions keep their traceback.
    """
    try:
        return action() or 0
    except InputError as error:
        print(f"bocage: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in commands with nothing to save
        print("bocage: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output has closed it, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser(loaded: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """Build the parser of the console script.

    Args:
        loaded: sub-commands to import and add with their arguments; the others appear in the help only.
    """
    parser = argparse.ArgumentParser(
        prog="bocage",
        description="Self-supervised pretraining of Earth-observation encoders on FLAIR-HUB.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("bocage"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in loaded:
            module = importlib.import_module(f"bocage.tools.{name}")
            module.add_arguments(command)
            add_examples(command, name)
            command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the console script and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # Import only the chosen command's module, so that `bocage sample` does not wait for torch.
    chosen = next((argument for argument in arguments if argument in COMMANDS), None)
    if chosen is None and arguments and not arguments[0].startswith("-"):
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        build_parser([]).error(
            f"no command {arguments[0]!r}; {f'did you mean {near[0]}?' if near else 'see bocage --help'}"
        )
    parser = build_parser([chosen] if chosen else [])
    # argparse takes positional arguments in one piece only and returns those after an option as unknown, e.g. in
    # `recipe=X --print-config key=value`.
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [argument for argument in rest if argument.startswith("-") or "overrides" not in parsed]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.overrides += rest
    configure_logging()
    return run_guarded(lambda: parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
