"""What `msrun` (or a rank table) tells a process, read without importing MindSpore."""

import os


def is_launched() -> bool:
    """Whether this process is one of several: started by `msrun`, or with a rank table on Ascend."""
    return "MS_ROLE" in os.environ or ("RANK_TABLE_FILE" in os.environ and "RANK_ID" in os.environ)


def world_size() -> int:
    """Number of processes that train together; 1 outside a launched job."""
    if not is_launched():
        return 1
    return int(os.environ.get("MS_WORKER_NUM") or os.environ.get("RANK_SIZE") or 1)


def is_scheduler() -> bool:
    """Whether this process is the one that `msrun` starts beside the ranks, to bring them together."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def rank_name() -> str:
    """ "rank 1", as far as the environment knows it before the processes have met."""
    return f"rank {os.environ.get('RANK_ID', '?')}"


def limit_threads() -> None:
    """Divides the cores of this machine among the processes of the job; a user's own OMP_NUM_THREADS stays.

    `msrun` does not tell how many of them are on this machine: where there are several machines, set it.
    Has an effect only before MindSpore is imported.
    """
    if is_launched():
        num_cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores // world_size())))


def wait_for_slow_ranks() -> None:
    """Lets a rank wait half an hour in a collective instead of 30 seconds; a user's own limit stays.

    One rank may compile, save or evaluate while the others wait for it. A rank that has died is no matter of this
    limit: `msrun` ends the others.
    """
    os.environ.setdefault("MS_CPU_COMM_OP_TIMEOUT", "1800")
    os.environ.setdefault("HCCL_EXEC_TIMEOUT", "1800")
