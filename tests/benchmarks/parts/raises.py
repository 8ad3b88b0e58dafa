"""A part of which one check raises, one is out of its bounds, and one succeeds."""


def broken():
    print("on the way")
    raise ValueError("a kernel is missing")


def checks(small):
    return {"broken": broken, "out of its bounds": lambda: {"ok": False}, "fine": lambda: {"value": 1}}
