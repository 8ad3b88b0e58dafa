import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from vlp.cli import main
from vlp.commands import doctor
from vlp.data.preparing.formats import Pair
from vlp.data.preparing.pack import pack


def test_versions_that_are_too_old_or_missing_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=1", "numpy>=999", "nowhere>=2"])
    found = doctor.packages()
    assert found.advice == "pip install 'numpy>=999' 'nowhere>=2'"
    assert f"numpy {np.__version__}" in found.found
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=1", 'wandb>=999; extra == "wandb"'])
    assert "wandb" not in doctor.packages().advice  # an extra may be absent


def test_a_checkout_that_is_not_installed_is_told_how_to_be(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert "pip install -e ." in doctor.packages().advice


def test_disk_that_is_nearly_full_or_read_only_fails(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(100, 99, 1))
    assert "less than 10 GiB" in doctor.free_space("disk", tmp_path, doctor.FREE_DISK, "reason").advice
    assert doctor.free_space("disk", tmp_path, 1, "reason").advice == ""
    monkeypatch.setattr(os, "access", lambda folder, mode: False)
    assert "permissions" in doctor.free_space("disk", tmp_path, 1, "reason").advice
    assert doctor.existing_parent(tmp_path / "runs" / "not yet") == tmp_path


def test_two_processes_sum_their_ranks_and_an_unknown_backend_is_one_line():
    assert doctor.connect("gloo", 2) == ""
    error = doctor.connect("pigeons", 2)
    assert "pigeons" in error and "\n" not in error


def test_process_that_does_not_answer_is_ended_with_its_children(tmp_path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code += f"; open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); time.sleep(60)"
    assert doctor.outcome(doctor.start([sys.executable, "-c", code]), 3) == "no answer within 3 s"
    child = int((tmp_path / "pid").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True).stdout.strip()
    assert state == "" or state.startswith("Z")


def test_reading_speed_of_shards_is_measured_and_missing_shards_fail(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    pack([Pair(str(tmp_path / "a.png"), ("a",), key=str(n)) for n in range(3)], tmp_path / "shards")
    found = doctor.reading(str(tmp_path / "shards"))
    assert found.advice == "" and found.found.startswith("3 samples in 1 shards; ")
    assert "vlp data check" in doctor.reading(str(tmp_path / "nowhere")).advice


def test_damaged_sample_fails_the_check_of_the_data_in_one_line(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    pack([Pair(str(tmp_path / "a.png"), ("a",), key="a")], tmp_path / "shards")
    shard = tmp_path / "shards" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    shard.write_bytes(data)
    found = doctor.reading(str(tmp_path / "shards"))
    assert "vlp data check" in found.advice and "\n" not in found.found


def test_failed_check_is_exit_code_1(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "checks", lambda options: [doctor.Check("disk", "full", "free some"), doctor.Check("a", "b")]
    )
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out == "FAILED  disk: full\n        free some\nok      a: b\n1 of the checks failed\n"


@pytest.mark.slow
def test_engine_trains_a_step_and_one_that_cannot_start_is_named(monkeypatch, tmp_path):
    good = doctor.LAUNCH / "ddp_cpu2.yaml"
    (tmp_path / "ddp_cpu2.yaml").write_text(good.read_text())
    (tmp_path / "odd_cpu2.yaml").write_text(good.read_text().replace("MULTI_GPU", "TELEPATHY"))
    monkeypatch.setattr(doctor, "LAUNCH", tmp_path)
    trained, odd = doctor.engines()
    assert trained.advice == "" and trained.name == "one step, ddp_cpu2"
    assert odd.advice and "\n" not in odd.found


def test_engines_are_not_tried_without_launch_files(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "LAUNCH", tmp_path)
    assert [str(check)[:15] for check in doctor.engines()] == ["ok      engines"]
