"""The Ray cluster a job runs on: the one it is told of, else this machine."""

import logging
import math
import os
import sys

import ray
import ray.data
import torch

from d2l.errors import UserError
from d2l.storage import one_line


def connect(worker_output: bool = True, here: bool = False) -> None:
    """Connect to `$RAY_ADDRESS`, or start Ray on this machine; does nothing when connected already.

    Args:
        worker_output: whether what workers print and log is shown here too.
        here: start Ray on this machine whatever `$RAY_ADDRESS` says: for what ends all that Serve has running.

    Raises:
        UserError: there is no cluster at `$RAY_ADDRESS`.
    """
    if not ray.is_initialized():
        address = "local" if here else os.environ.get("RAY_ADDRESS") or "local"
        local = address == "local"
        # The dashboard stays on: without one, Ray Train's clean-up asks whichever other cluster runs on this machine
        # whether its own controller lives, is told no, and removes the workers. Ray Data's pipelines of several stages
        # need several slots to make progress, whatever the machine's cores.
        slots = {"num_cpus": max(8, os.cpu_count() or 1)} if local else {}
        if local:
            os.environ.setdefault("RAY_worker_niceness", "0")  # the job is what this machine is for
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=worker_output, **slots)
        except (ConnectionError, ValueError) as error:  # nobody answers; no such address
            if local:
                raise
            reason = one_line(error).partition(". ")[0]
            raise UserError(f"RAY_ADDRESS={address}: no cluster there ({reason}); start one, or unset it") from error
    # The jobs have progress bars of their own.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    for name in ("ray.data", "ray.serve", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)


def machines() -> int:
    """Machines of the cluster that processes run on; 1 without Ray."""
    nodes = ray.nodes() if ray.is_initialized() else []
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in nodes))


def on_each_machine(processes: int) -> int:
    """How many of a job's processes one machine has: Ray Data spreads its actors. Without Ray, all."""
    return math.ceil(processes / machines())


def tell_what_is_missing(**needed: float) -> None:
    """Say on standard error what a job waits for that the cluster does not have (`CPU`, `GPU`); Ray only waits."""
    for name, count in needed.items():
        if count > (there := ray.cluster_resources().get(name, 0)):
            print(f"needs {count:g} {name}s, and the cluster has {there:g}: waiting for more", file=sys.stderr)


def share_cores(processes: int) -> None:
    """Give torch, in this thread, the share of the machine's cores that one of so many processes on it has.

    Ray allows as many as CPUs it reserved. The setting is the calling thread's own, and Ray Data calls an actor in
    another thread than it made it in: call this where the work is done.
    """
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
