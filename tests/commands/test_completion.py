"""The shells complete commands, options and tasks, and leave other words to the completion of files."""

import shutil
import subprocess

import pytest

from vlp.cli import main
from vlp.tasks.find import shipped_tasks

COMPLETE = """
shopt -u extglob
source /dev/stdin
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_vlp
printf '%s\\n' "${COMPREPLY[@]}"
"""
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def complete(capsys):
    """Return a function that completes the last word of a line in bash."""
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words: str) -> list[str]:
        command = ["bash", "-c", COMPLETE, "bash", "vlp", *words]
        done = subprocess.run(command, input=script, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return completed


@needs_bash
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ru"], ["runs"]),
        (["data", "p"], ["pack", "paraphrase"]),
        (["data", "pack", "--im"], ["--image-root"]),
        (["data", "pack", "captions.csv", "shards", "--im"], ["--image-root"]),
        (["eval", "runs/a", "re"], ["rerank", "retrieval"]),
        (["eval", "runs/a", "retrieval", "--ch"], ["--checkpoint"]),
        (["train", "configs/align/demo.py", "--re"], ["--resume"]),
        (["train", ""], []),  # files
        (["eval", "ret"], []),
        (["nothing", "--re"], []),
        (["trainer", "--re"], []),
    ],
)
def test_word_is_completed(complete, words, expected):
    assert complete(*words) == expected


@needs_bash
def test_all_commands_actions_and_tasks_are_offered(complete):
    assert {"train", "eval", "runs", "data", "completion"} <= set(complete(""))
    assert {"pack", "world", "answers"} <= set(complete("data", ""))
    assert complete("eval", "runs/a", "") == list(shipped_tasks())


def test_script_of_zsh_is_that_of_bash_after_the_emulation_is_loaded(capsys):
    scripts = {}
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        scripts[shell] = capsys.readouterr().out
    first, _, rest = scripts["zsh"].partition("\n")
    assert "bashcompinit" in first and rest == scripts["bash"]
