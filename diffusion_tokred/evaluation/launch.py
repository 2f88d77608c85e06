"""The processes of a run: one, or many that a launcher started, each with its share. Nothing else here knows of them.

    accelerate launch scripts/generate.py ...                    # several GPUs, several nodes
    torchrun --nproc-per-node 2 scripts/generate.py ...          # two processes on the CPU

`accelerate launch --cpu` starts a single process, and two processes that do not know of each other would do all the
work twice: both are refused, with the right command.
"""

from __future__ import annotations

import atexit
import datetime
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ..errors import ConfigError

_T = TypeVar("_T")
# How launchers say how many processes they started: torchrun and accelerate, MPIs, srun.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_LONGEST = datetime.timedelta(days=30)  # that one process may wait for another, which draws its share


class SharedError(ConfigError):
    """An error that all processes raise: one of them says it."""


@dataclass
class Processes:
    """This process among the others.

    Attributes:
        rank, world: its number, and how many there are.
        device: the accelerator that it was given; None for a single process, which may choose.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    group: Any = field(default=None, repr=False)

    def share(self, make: Callable[[], _T]) -> _T:
        """What `make` returns in the first process, in all of them. An error there is raised in all."""
        if self.group is None:
            return make()
        box: list[Any] = [None, None]
        failed: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:  # whatever it is: the others wait
                box[1], failed = str(error) or type(error).__name__, error
        torch.distributed.broadcast_object_list(box, src=0, group=self.group)
        if failed is not None and not isinstance(failed, ConfigError):
            raise failed
        if box[1] is not None:
            raise SharedError(box[1]) from failed
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """The value of every process, by rank. Waits for all."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def leave(self, others: bool = False) -> None:
        """Destroy the group, and with `others` every group of this process, while the interpreter is still whole.

        Gloo's threads may hold tensors after the last message; if these are let go when the interpreter is being taken
        down, the process aborts ("terminate called without an active exception"). The last reference must go too.
        """
        group, self.group = self.group, None
        if group is not None and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(None if others else group)


def start(device: torch.device | str = "cpu") -> Processes:
    """Join the other processes that the launcher started, through accelerate.

    Args:
        device: what the pipeline is to run on; only its type matters.

    Raises:
        ConfigError: the launcher started several, and they would not know of each other.
    """
    from accelerate import PartialState

    cpu = torch.device(device).type == "cpu"
    asked = max(_number(name) or 1 for name in _COUNTS)
    script = os.path.basename(sys.argv[0]) or "generate.py"
    command = f"torchrun --nproc-per-node {asked} {script} ..." if cpu else f"accelerate launch {script} ..."
    first = PartialState._shared_state == {}
    if first:
        if _only_one():
            raise ConfigError(
                "`accelerate launch --cpu` starts one process, whatever --num_processes says: several on the CPU are"
                f" started with torchrun --nproc-per-node N {script} ..."
            )
        if asked == 1:
            return Processes()
        if all(_number(name) is None for name in _RANKS):
            raise ConfigError(
                f"{_source()} says that there are {asked} processes, but not which of them this is: each would do all"
                f" of the work; start them with {command}"
            )
        state = PartialState(cpu=cpu)
    else:
        state = PartialState()  # made before, by someone else
    if state.num_processes < asked:
        raise ConfigError(
            f"{_source()} says that there are {asked} processes, accelerate knows of {state.num_processes}: each would"
            f" do all of the work; start them with {command}"
            + (" and make no PartialState() without cpu=True" if cpu else "")
        )
    if state.num_processes == 1:
        return Processes()
    # Accelerate's own group may be NCCL's, and gives up after minutes: this one moves plain objects, and waits.
    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST)
    processes = Processes(state.process_index, state.num_processes, None if cpu else state.device, group)
    atexit.register(processes.leave, others=first)
    return processes


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _source() -> str:
    """The variable that says how many there are."""
    return max(_COUNTS, key=lambda name: _number(name) or 0)


def _only_one() -> bool:
    """Whether this is what `accelerate launch --cpu --num_processes 2` starts: it sets the meeting place, no count."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return on_cpu and "MASTER_ADDR" in os.environ and all(_number(name) is None for name in (*_COUNTS, *_RANKS))
