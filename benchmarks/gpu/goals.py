"""What is wanted of an H100, and where in the results it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.parts import failed

Checks = dict[str, dict]  # of a part, by name


@dataclass(frozen=True)
class Goal:
    """One goal.

    Args:
        part: whose checks have it.
        find: the measured value among these; a KeyError or ValueError means that it was not measured.
        least: the value is to be at least this; else it is to be at most ``most``.
    """

    text: str
    part: str
    find: Callable[[Checks], float]
    least: float | None = None
    most: float | None = None

    def measured(self, parts: dict[str, dict]) -> dict:
        """The goal, what was measured, and "met", "not met" or "not run"."""
        wanted = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        row = {"goal": self.text, "wanted": wanted, "measured": None, "verdict": "not run"}
        checks = {check["check"]: check for check in parts.get(self.part, {}).get("checks", [])}
        try:
            value = self.find(checks)
        except (KeyError, ValueError, TypeError):
            return row
        if value is None:
            return row
        met = value >= self.least if self.least is not None else value <= self.most
        return row | {"measured": round(value, 4), "verdict": "met" if met else "not met"}


def of(check: str, key: str) -> Callable[[Checks], float]:
    return lambda checks: checks[check][key]


def worst_clip(key: str) -> Callable[[Checks], float]:
    """Of both models, compiled or not."""
    return lambda checks: min(check[key] for name, check in checks.items() if "," in name and key in check)


def utilisation_of_b16(checks: Checks) -> float:
    """The better of compiled and not."""
    found = (check for name, check in checks.items() if name.startswith("ViT-B-16") and "utilisation" in check)
    return max(check["utilisation"]["of_datasheet"] for check in found)


def waits(checks: Checks) -> float:
    return sum(checks[name]["in_micro_batch"] for name in ("CLIP", "ALBEF", "VLMo"))


def failures(checks: Checks) -> float:
    if not checks:
        raise ValueError("nothing was checked")
    return sum(map(failed, checks.values()))


GOALS = (
    Goal("steps outside their bounds", "right-steps", failures, most=0),
    Goal("runs that are not right", "right-runs", failures, most=0),
    Goal("ALBEF, times faster than published + bf16 + fused attention", "fast-passes", of("ALBEF", "times_faster_than_bf16"), 1.5),
    Goal("ALBEF, times faster than published float32", "fast-passes", of("ALBEF", "times_faster_than_float32"), 4),
    Goal("ALBEF, share of published + bf16's memory", "fast-passes", of("ALBEF", "memory_share"), most=0.6),
    Goal("VLMo, times faster than published + bf16 + fused attention", "fast-passes", of("VLMo", "times_faster_than_bf16"), 1.5),
    Goal("VLMo, times faster than published float32", "fast-passes", of("VLMo", "times_faster_than_float32"), 4),
    Goal("VLMo, share of published + bf16's memory", "fast-passes", of("VLMo", "memory_share"), most=0.6),
    Goal("CLIP, times faster than open_clip at 77 tokens", "fast-clip", worst_clip("times_faster_at_77"), 1.15),
    Goal("CLIP, times faster than open_clip at real lengths", "fast-clip", worst_clip("times_faster_at_real_lengths"), 1.4),
    Goal("CLIP B/16, share of the datasheet's bf16 rate", "fast-clip", utilisation_of_b16, 0.5),
    Goal("waits for the device in a micro-batch, of CLIP, ALBEF and VLMo together", "fast-syncs", waits, most=0),
    Goal("loader, images a second", "fast-loader", lambda checks: checks["images a second"]["images_a_second"]["ours"], 6000),
)  # fmt: skip


def measured(parts: dict[str, dict], small: bool) -> list[dict]:
    """Every goal with its verdict; at small sizes only what is right is judged, not what is fast."""
    rows = [(goal, goal.measured(parts)) for goal in GOALS]
    return [row | {"verdict": "not run"} if small and goal.part.startswith("fast") else row for goal, row in rows]
