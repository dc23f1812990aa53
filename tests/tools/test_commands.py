"""Command lines: words in any order, and wrong values in one sentence."""

import subprocess
from pathlib import Path

import pytest

from bocage.tools.main import COMMANDS, main


# Imports torch and the fine-tuning room: some seconds the first time.
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_print_config_may_stand_anywhere(place: int, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=finetune_cosia", "shards=here", "batch_size=17"]
    words.insert(place, "--print-config")
    assert main(["finetune", *words]) == 0
    printed = capsys.readouterr().out
    assert "batch_size: 17" in printed
    assert "shards: here" in printed


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
    assert "cannot be made: Not a directory" in errors


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
