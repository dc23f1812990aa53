"""Command lines: words in any order, and wrong values in one sentence."""

import argparse
import shlex
import subprocess
from pathlib import Path

import pytest

from bocage.ssl.engine.trainer import Outcome
from bocage.tools.cli.examples import EXAMPLES
from bocage.tools.main import COMMANDS, build_parser, main, run_guarded


# Imports torch and the fine-tuning package: some seconds the first time.
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_print_config_may_stand_anywhere(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=finetune_cosia", "shards=here", "batch_size=17"]
    words.insert(place, "--print-config")
    assert main(["finetune", *words]) == 0
    printed = capsys.readouterr().out
    assert "batch_size: 17" in printed
    assert "shards: here" in printed


def test_overrides_of_a_study_may_follow_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = "recipe=label_efficiency_crops_quickstart"
    assert main(["study", "run", recipe, "--dry-run", f"shards={tmp_path / 'none'}", f"output={tmp_path / 'out'}"]) == 2
    assert f"{tmp_path / 'none'}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["finetune", "recipe=x", "--nonsense"], ["sample", "out", "more"]])
def test_unknown_words_are_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["predict", "run", "shards", "out", "--batch-size", "0"], "--batch-size: 0 is not at least 1"),
        (["predict", "run", "shards", "out", "--workers", "-1"], "--workers: -1 is not at least 0"),
        (["predict", "run", "shards", "out", "--workers", "x"], "--workers: 'x' is not a whole number"),
        (["shard", "tree", "out", "--workers", "0"], "--workers: 0 is not at least 1"),
        (["shard", "tree", "out", "--max-bad", "2"], "--max-bad: 2.0 is not between 0 and 1"),
        (["shard", "tree", "out", "--max-bad", "few"], "--max-bad: 'few' is not a number"),
    ],
)
def test_wrong_numbers_are_named(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_sample_cannot_be_written_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["sample", str(tmp_path / "file" / "out")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("bocage: error: ")
    assert "cannot be created: Not a directory" in errors


# Some five seconds: every sub-command's module is imported.
def test_a_shell_completes_commands_options_and_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "bocage.sh"
    script.write_text(capsys.readouterr().out)
    for words, wanted in (("bocage pub", "publish"), ("bocage publish --sc", "--scores"), ("bocage study pr", "probe")):
        asked = f"COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _shtab_bocage; echo ${{COMPREPLY[@]}}"
        line = ["bash", "--norc", "-c", f"source {script}; {asked}"]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: bocage {command}" in capsys.readouterr().out


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_help_are_lines_that_the_command_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2]
    lines = shown.replace("\\\n", " ").strip().splitlines()
    assert lines
    for line in lines:
        _, command, *words = shlex.split(line.partition(">")[0])
        if "--help" in words:
            continue
        parsed, rest = build_parser([command]).parse_known_args([command, *words])
        assert not [word for word in rest if word.startswith("-")] and (not rest or "overrides" in parsed)


def test_every_command_and_action_has_examples() -> None:
    assert {name.partition(" ")[0] for name in EXAMPLES} == set(COMMANDS)
    (actions,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    below = [item for item in actions.choices["study"]._actions if isinstance(item, argparse._SubParsersAction)]
    assert {f"study {name}" for item in below for name in item.choices} <= EXAMPLES.keys()


def test_a_misspelt_command_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for word, advice in (("verfy", "did you mean verify?"), ("zzz", "see bocage --help")):
        with pytest.raises(SystemExit) as stopped:
            main([word, "shards"])
        assert stopped.value.code == 2
        assert f"no command '{word}'; {advice}" in capsys.readouterr().err


def test_ctrl_c_in_a_command_with_nothing_to_save_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert run_guarded(interrupted) == 130
    assert capsys.readouterr().err == "bocage: interrupted\n"


@pytest.mark.parametrize("below", ["", "run", "a/run"])
def test_a_run_does_not_write_among_shards(below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=finetune_quickstart", f"shards={tmp_path}", f"output={tmp_path / below}"]
    assert main(["finetune", *words]) == 2
    assert main(["pretrain", "recipe=quickstart", *words[1:]]) == 2
    assert capsys.readouterr().err.count("is inside the folder of the shards: choose another folder") == 2
    assert not list(tmp_path.iterdir())


def test_pretrain_prints_where_the_encoders_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "run" / "reconstructions"
    figures.mkdir(parents=True)
    for step in (2, 4):
        (figures / f"reconstruction_key_step-{step:07d}.png").touch()
    outcome = Outcome(step=4, stopped=False, exit_code=0, last=tmp_path, best=None, metrics={})
    monkeypatch.setattr("bocage.tools.pretrain.pretrain", lambda config: outcome)
    assert main(["pretrain", "recipe=quickstart", f"output={tmp_path / 'run'}"]) == 0
    last = figures / "reconstruction_key_step-0000004.png"
    assert capsys.readouterr().out == f"reconstruction: {last}\nencoders: {tmp_path / 'run' / 'encoders'}\n"
