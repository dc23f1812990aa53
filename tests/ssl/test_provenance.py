"""Provenance: the git commit, marked dirty when code has changed, but not when reports have."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from bocage.ssl.engine.logging import provenance


def test_the_commit_is_dirty_when_code_has_changed(tmp_path: Path) -> None:
    shutil.copy(provenance.__file__, tmp_path / "provenance.py")
    (tmp_path / "report.html").write_text("old")

    def git(*arguments: str) -> str:
        settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        environment = {**os.environ, **settings}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def revision() -> str:
        source = "import provenance; print(provenance.git_revision())"
        done = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert revision() == "None"
    git("init", "-q")
    assert revision() == "None"  # not tracked
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert revision() == commit
    (tmp_path / "report.html").write_text("new")
    assert revision() == commit
    with (tmp_path / "provenance.py").open("a") as file:
        file.write("\n# changed\n")
    assert revision() == f"{commit}-dirty"
