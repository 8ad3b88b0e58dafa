"""`python -m benchmarks.gpu`: every part runs small on a CPU, and one that fails does not stop the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.common import DATA
from benchmarks.gpu.draws import DrawsOnCpu
from benchmarks.gpu.goals import GOALS, measured
from benchmarks.gpu.page import render
from benchmarks.gpu.parts import PARTS, Part, run_parts, selected
from benchmarks.gpu.weights import restored, rounded
from tests.conftest import ROOT, environment

RUN = {"card": "a card", "gpu": True, "torch": "2", "commit": "abc", "date": "2026", "cores": 16, "seconds": 9}
RUN |= {"command": "python -m benchmarks.gpu", "small": False}


def part(name: str, limit: float = 60) -> Part:
    return Part(name, f"tests.benchmarks.parts.{name}", limit, f"is {name}")


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not there: captions and photos to measure with")
def test_every_part_runs_small(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--small"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    results = json.loads((tmp_path / "gpu.json").read_text())
    failures = {name: part for name, part in results["parts"].items() if part["status"] != "ok"}
    assert not failures, json.dumps(failures, indent=1)
    assert done.returncode == 0, done.stderr
    assert list(results["parts"]) == [part.name for part in PARTS]
    assert all(part["checks"] for part in results["parts"].values())
    page = (tmp_path / "gpu.html").read_text()
    assert all(part.name in page for part in PARTS) and "It measures nothing" in page


def test_limits_leave_less_than_eight_minutes():
    assert sum(part.limit for part in PARTS) <= 480


def test_one_part_or_a_family_is_selected():
    assert [part.name for part in selected("learns")] == ["learns"]
    assert {part.name.split("-")[0] for part in selected("fast")} == {"fast"} and len(selected("fast")) > 1
    assert selected(None) == list(PARTS)


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    parts = [part("raises"), part("endless", limit=4), part("nowhere"), part("fine")]
    return run_parts(parts, out, 100, True, environment())


def test_part_that_raises_is_recorded_and_its_other_checks_are_kept(failing):
    found = failing["raises"]
    assert found["status"] == "failed" and "ValueError: a kernel is missing" in found["last_lines"]
    broken, out_of_bounds, fine = found["checks"]
    assert broken["error"] == "ValueError: a kernel is missing"
    assert out_of_bounds["ok"] is False and fine["value"] == 1


def test_part_that_exceeds_its_limit_keeps_what_it_had_and_its_processes_are_ended(failing):
    found = failing["endless"]
    assert found["status"] == "over its limit" and 4 <= found["seconds"] < 20
    assert [check["check"] for check in found["checks"]] == ["started"]
    status = Path(f"/proc/{found['checks'][0]['pid']}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_part_that_cannot_be_imported_is_recorded(failing):
    assert failing["nowhere"]["status"] == "failed" and failing["nowhere"]["checks"] == []
    assert "No module named 'tests.benchmarks.parts.nowhere'" in failing["nowhere"]["last_lines"][-1]


def test_parts_after_failed_ones_run(failing):
    assert failing["fine"]["status"] == "ok" and failing["fine"]["checks"][0]["small"] is True


def test_part_without_time_left_is_not_run(tmp_path):
    found = run_parts([part("fine")], tmp_path, 0, True, environment())
    assert found == {"fine": {"what": "is fine", "status": "not run", "checks": []}}


def test_page_tells_failures_and_goals(failing):
    results = {"run": RUN, "goals": measured(failing, small=False), "parts": failing}
    page = render(results)
    assert "a kernel is missing" in page and "over its limit" in page and "not run" in page
    before = {"run": RUN | {"card": "an older card"}, "goals": [{"goal": GOALS[0].text, "measured": 3}]}
    assert "an older card" in render(results, before)


def test_goals_are_judged():
    clip = {"times_faster_at_77": 1.2, "times_faster_at_real_lengths": 1.3, "utilisation": {"of_datasheet": 0.4}}
    waits = [{"check": name, "in_micro_batch": n} for name, n in (("CLIP", 0), ("ALBEF", 0), ("VLMo", 0))]
    parts = {
        "fast-clip": {"checks": [{"check": "ViT-B-16, eager", **clip}, {"check": "ViT-B-32, eager", "error": "x"}]},
        "fast-syncs": {"checks": waits},
    }
    verdicts = {row["goal"]: row["verdict"] for row in measured(parts, small=False)}
    assert verdicts["CLIP, times faster than open_clip at 77 tokens"] == "met"
    assert verdicts["CLIP, times faster than open_clip at real lengths"] == "not met"
    assert verdicts["CLIP B/16, share of the datasheet's bf16 rate"] == "not met"
    assert verdicts["waits for the device in a micro-batch, of CLIP, ALBEF and VLMo together"] == "met"
    assert verdicts["loader, images a second"] == "not run"


def test_carried_weights_are_close_and_small():
    torch.manual_seed(0)
    state = {"matrix": torch.randn(64, 96), "kernel": torch.randn(32, 16, 3, 3), "bias": torch.randn(64)}
    state["steps"] = torch.tensor(7)
    carried = rounded(state)
    found = restored(carried)
    assert found.keys() == state.keys() and torch.equal(found["steps"], state["steps"])
    for name in ("matrix", "kernel", "bias"):
        error = float((found[name] - state[name]).norm() / state[name].norm())
        assert found[name].dtype == torch.float32 and 0 < error < 0.01, name
    size = sum(x.numel() * x.element_size() for x in carried.values())
    assert size < 0.3 * sum(x.numel() * x.element_size() for x in state.values())


def test_rounded_row_of_zeros_stays_zero():
    assert not restored(rounded({"words": torch.zeros(100, 64)}))["words"].any()


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(3, 4, device="cpu"),
        lambda: torch.randint(9, (5,), device="cpu"),
        lambda: torch.multinomial(torch.tensor([1.0, 2.0, 3.0]), 8, True),
        lambda: torch.empty(6).exponential_(),
    ],
)
def test_draws_on_the_cpu_are_the_cpus(draw):
    torch.manual_seed(3)
    expected = draw()
    torch.manual_seed(3)
    with DrawsOnCpu():
        assert torch.equal(draw(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_draws_for_a_gpu_are_the_cpus():
    torch.manual_seed(3)
    expected = torch.rand(3), torch.empty(3).exponential_(), torch.multinomial(torch.ones(4), 5, True)
    torch.manual_seed(3)
    with DrawsOnCpu():
        weights = torch.ones(4, device="cuda")
        found = (
            torch.rand(3, device="cuda"),
            torch.empty(3, device="cuda").exponential_(),
            torch.multinomial(weights, 5, True),
        )
    assert all(x.is_cuda and torch.equal(x.cpu(), y) for x, y in zip(found, expected))
