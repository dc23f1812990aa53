"""The ``bocage`` console script: finds the sub-command's module and turns wrong user input into one sentence."""

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
    "sample": "write simulated patches in FLAIR-HUB's own format",
    "shard": "turn a FLAIR-HUB tree into WebDataset shards with a manifest",
    "verify": "check shards against their manifest and name what is broken",
    "inspect": "print what shards hold, and draw a patch in all its modalities",
    "pretrain": "pretrain one encoder per modality on unlabelled shards",
    "finetune": "train UPerFuse on labels, from pretrained encoders or from scratch",
    "evaluate": "measure a fine-tuned model on any patches, also without each of its sensors",
    "predict": "write label maps of a fine-tuned model as GeoTIFFs",
    "map": "write one map of a zone of any size from rasters of any size",
    "study": "measure how few labels encoders need: subsets, a grid of runs, a report, probes",
    "publish": "write pretrained encoders with a card, and upload them to the Hugging Face hub",
    "attention": "draw which dates of a series an encoder looks at",
    "convert": "turn official FLAIR-HUB checkpoints into bocage's folders, and back",
    "replay": "run a bad step of a training again and name what is not finite in it",
    "doctor": "look at this machine, and at shards, for what training will need",
    "completion": "print what lets a shell complete commands and options",
    "demo": "run the whole path on a simulated sample and print pretrained against scratch",
}
"""Sub-commands: each is the module of the same name here, with ``add_arguments(parser)`` and ``run(arguments)``."""


def guarded(action: Callable[[], int | None]) -> int:
    """Run ``action``; wrong user input becomes one sentence and status 2, Ctrl-C 130; the rest keeps its traceback."""
    try:
        return action() or 0
    except InputError as error:
        print(f"bocage: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # in commands that have nothing to save
        print("bocage: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output went away, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser(whole: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of the console script.

    Args:
        whole: sub-commands whose arguments it knows; it imports their modules.
    """
    parser = argparse.ArgumentParser(
        prog="bocage",
        description="Self-supervised pretraining of Earth-observation encoders on FLAIR-HUB.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("bocage"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name in whole:
            module = importlib.import_module(f"bocage.tools.{name}")
            module.add_arguments(command)
            add_examples(command, name)
            command.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    # Only the chosen command's module is imported: `bocage sample` need not wait for torch.
    chosen = next((word for word in words if word in COMMANDS), None)
    if chosen is None and words and not words[0].startswith("-"):
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        build_parser([]).error(
            f"no command {words[0]!r}; {f'did you mean {near[0]}?' if near else 'see bocage --help'}"
        )
    parser = build_parser([chosen] if chosen else [])
    # argparse takes a list of words in one piece only; those after an option, `recipe=X --print-config key=value`,
    # come back as unknown.
    parsed, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-") or "words" not in parsed]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        parsed.words += rest
    configure_logging()
    return guarded(lambda: parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
