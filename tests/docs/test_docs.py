"""The commands and code of README.md, of docs/ and of the docstrings of configs do what they say."""

import importlib
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TOY, draw_pairs
from tests.docs.blocks import check_command, inline_commands, lines_of, read_blocks
from vlp.cli import main
from vlp.commands.configs import read_entries

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_parse(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [line for block in read_blocks(page) if block.language == "bash" for line in lines_of(block.text)]
    for line in commands + inline_commands(page):
        check_command(line)


@pytest.mark.parametrize("path", CONFIGS, ids=page_name)
def test_commands_of_config_docstrings_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for entry in read_entries(path):
        for line in lines_of("\n".join(entry.sections["Command"])):
            check_command(line)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_names_in_backticks_exist(page):
    text = page.read_text()
    for name in re.findall(r"`(vlp\.[\w.]+)`", text):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, attribute = name.rpartition(".")
            assert attribute in vars(importlib.import_module(module)), name
    for path in re.findall(r"`((?:configs|docs|examples|launch|notebooks|tests|vlp)/[\w./-]*)[:\w]*`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_files_of_examples_are_shown_as_they_are(page):
    for block in read_blocks(page):
        if block.title and (ROOT / "examples" / block.title).exists():
            assert block.text == (ROOT / "examples" / block.title).read_text()


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder as a reader has it: the configs, some images with captions, their shards and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("configs", "launch", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    pairs = draw_pairs(tmp_path / "photos", 30)
    for name, part in {"captions.csv": pairs[:20], "held_out.csv": pairs[20:]}.items():
        lines = [f"{Path(pair.image).name},{caption}" for pair in part for caption in pair.captions]
        (tmp_path / name).write_text("\n".join(["image,caption", *lines]))
    return tmp_path


def run_page(page: Path) -> int:
    """Run the Python blocks and the marked shell blocks of a page in order. Return how many there were."""
    namespace: dict = {}
    count = 0
    for block in read_blocks(page):
        if block.language == "python" and block.title:
            Path(block.title).write_text(block.text)
            runpy.run_path(block.title)
        elif block.language == "python":
            exec(compile(block.text, page_name(page), "exec"), namespace)
        elif block.run:
            for line in lines_of(block.text):
                run_line(line, block.extra)
        count += block.language == "python" or block.run
    return count


def run_line(line: str, extra: tuple[str, ...]) -> None:
    program, *arguments = line.split()
    if program == "cp":
        shutil.copy(*arguments)
        return
    assert program == "vlp", line
    assert main([*arguments, *(extra if arguments[0] == "train" else ())]) == 0, line


RUN = [page for page in PAGES if any(block.run or block.language == "python" for block in read_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=page_name)
def test_code_runs(page, workplace):
    before = set(sys.modules)
    prepare_data()
    try:
        assert run_page(page) > 0
    finally:
        for name in set(sys.modules) - before:  # modules that the page wrote
            if str(workplace) in str(vars(sys.modules[name]).get("__file__")):
                del sys.modules[name]


def prepare_data() -> None:
    main(["data", "pack", "captions.csv", "shards/train", "--image-root", "photos"])
    main(["data", "pack", "held_out.csv", "shards/val", "--image-root", "photos"])
    main(["data", "tokenizer", "shards/train", "tokenizer", "--vocab-size", "200"])
    small = ["data.train=shards/train", "data.val=shards/val", "data.tokenizer=tokenizer", "train.steps=2"]
    assert main(["train", str(TOY), "name=demo", *small]) == 0


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="extra docs")
    import subprocess

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "reference" / "settings" / "index.html").is_file()
