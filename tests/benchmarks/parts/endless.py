"""A part that starts a process, says so, and does not end."""

import subprocess
import time


def started():
    return {"pid": subprocess.Popen(["sleep", "600"]).pid}


def checks(small):
    return {"started": started, "endless": lambda: time.sleep(600)}
