"""``python -m benchmarks.gpu.warm``: compile the steps of `fast_clip` once, so that the part itself finds them in torch's cache.

It runs beside the parts that measure no time, on cores that these leave idle.
"""

from benchmarks.gpu.fast_clip import NAMES, ours, pairs, theirs


def main() -> None:
    for name in NAMES:
        theirs(name, *pairs(name, True), "inductor")()
        for real in (False, True):
            step = ours(name, *pairs(name, real), "inductor")
            step(), step()


if __name__ == "__main__":
    main()
