"""launch/slurm.sh starts a run, and resumes it in the same job after the time limit; commands of SLURM are stand-ins."""

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.conftest import ROOT

STAND_INS = {
    "srun": 'shift; SLURM_NODEID=0 "$@" & trap "kill -TERM $!" TERM; wait $!; wait $!',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; if [ "$1" = show ]; then echo node-0; fi',
    "accelerate": 'echo "accelerate $*" >> "$CALLS"; mkdir -p "$RUN/checkpoints/step-00000001"; '
    'touch "$RUN/experiment.json"; trap "echo saved >> $CALLS; exit 0" TERM; '
    "for i in 1 2 3 4 5 6 7 8; do sleep 0.2; done",
}


def submit(folder: Path, engine: str | None = None, signal_after: float | None = None) -> tuple[int, list[str]]:
    """Run the script with stand-ins; return its exit code and the calls."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "RUN": str(folder / "run"),
        "SLURM_JOB_NODELIST": "node-[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "77",
    }
    environment |= {"ENGINE": engine} if engine else {}
    job = subprocess.Popen(["bash", "launch/slurm.sh", "CONFIG", "seed=1"], cwd=ROOT, env=environment)
    if signal_after is not None:
        while "accelerate" not in calls.read_text():
            time.sleep(0.05)
        time.sleep(signal_after)
        job.send_signal(signal.SIGUSR1)
    return job.wait(30), calls.read_text().splitlines()


def test_job_saves_at_the_time_limit_and_resumes_after_requeueing(tmp_path):
    code, calls = submit(tmp_path, signal_after=0.3)
    options = "--num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip node-0 --main_process_port 29500"
    assert code == 0
    assert calls == [
        "scontrol show hostnames node-[0-1]",
        f"accelerate launch --config_file launch/ddp_gpu8.yaml {options} -m vlp.train "
        f"CONFIG seed=1 output={tmp_path} name=run",
        "saved",
        "scontrol requeue 77",
    ]
    code, calls = submit(tmp_path, engine="fsdp2")
    assert code == 0
    assert calls[1:] == [
        f"accelerate launch --config_file launch/fsdp2_gpu8.yaml {options} -m vlp.train --resume {tmp_path}/run"
    ]
