"""The command line in processes of its own, several at once too, at the price of one that imports everything."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

LAUNCHER = """
import json, os, pathlib, runpy, signal, socket, sys, time, warnings
import torch
torch.set_num_threads(1)
import accelerate, diffusers.loaders.peft, peft, torch.distributed, transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetModel
import driftrl.evaluation.evaluate, driftrl.evaluation.report, driftrl.run  # once, before the forks
import driftrl.diversity.encoders, driftrl.rewards.clip
from driftrl.cli import main as command_line


def child(rank, job, port):
    log = os.open(f"{job['log']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["folder"])
    if job["processes"] > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]), OMP_NUM_THREADS="1",
            LOCAL_WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )
    sys.path.insert(0, job["folder"])
    sys.argv = ["driftrl", *job["arguments"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["arguments"][0].endswith(".py"):
        sys.argv = job["arguments"]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        command_line.main()
    sys.exit(0)


for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(job["processes"]):
        pid = os.fork()
        if pid == 0:
            child(rank, job, port)
        children[pid] = rank
    if job["signals"]:
        while not pathlib.Path(job["until"]).exists():
            time.sleep(0.02)
        target = next(pid for pid, rank in children.items() if rank == job["whom"])
        for number in job["signals"]:
            if len(job["signals"]) > 1:
                time.sleep(0.5)
                assert os.waitpid(target, os.WNOHANG) == (0, 0), "ended before all signals were sent"
            os.kill(target, number)
    status = {}
    while len(status) < len(children):
        pid, code = os.wait()
        status[children[pid]] = os.waitstatus_to_exitcode(code)
        if code:  # as torchrun does
            for other, rank in children.items():
                if rank not in status:
                    os.kill(other, signal.SIGTERM)
    print(json.dumps([status[rank] for rank in sorted(status)]), flush=True)
"""


class Launcher:
    """Runs the command line in several processes, which are forked from one that has imported everything."""

    def __init__(self, folder):
        self.folder, self.jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, folder, processes, *arguments, send=(), whom=1, until=""):
        """Exit statuses by rank, and what was said by the command line, or by a script where the first argument is one. A signal goes to one of them when a file is there; several
        half a second later and apart.

        Where glibc ends a process with this very word of a spoilt heap, once more: seen once in some hundred runs over gloo, never
        in one process, and nothing in it is native code of ours (docs/log.md).
        """
        statuses, said = self._once(folder, processes, arguments, send, whom, until)
        if processes > 1 and -signal.SIGABRT in statuses and "tcache chunk detected" in said:
            if "--out" in arguments:
                shutil.rmtree(folder / arguments[arguments.index("--out") + 1])
            statuses, said = self._once(folder, processes, arguments, send, whom, until)
        return statuses, said

    def _once(self, folder, processes, arguments, send, whom, until):
        self.jobs += 1
        log = str(self.folder / f"job{self.jobs}")
        job = {
            "processes": processes, "arguments": list(map(str, arguments)), "folder": str(folder), "log": log,
            "signals": list(map(int, send)), "whom": whom, "until": str(until),
        }  # fmt: skip
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        statuses = json.loads(self.process.stdout.readline())
        return statuses, "".join(Path(f"{log}.{rank}").read_text() for rank in range(processes))

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
