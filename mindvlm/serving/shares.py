"""The share of the machine that each of several processes uses: CPU threads, and cards of Ascend."""

import os

from mindvlm.core.errors import UserError
from mindvlm.core.host_cpus import num_threads

CARDS = "ASCEND_RT_VISIBLE_DEVICES"
"""Environment variable of CANN with the cards that a process sees, such as "0,1"."""


def machine_shares(num_processes: int) -> list[dict[str, str]]:
    """Returns the environment variables of each process.

    Threads are divided evenly unless the user has set `OMP_NUM_THREADS`. Each process sees one card: the next of those
    in `ASCEND_RT_VISIBLE_DEVICES`, in which a card may occur several times, or else of all.

    Raises:
        UserError: the user names fewer cards than there are processes.
    """
    cards = [card.strip() for card in os.environ.get(CARDS, "").split(",") if card.strip()]
    if cards and len(cards) < num_processes:
        raise UserError(
            f"{CARDS} is {os.environ[CARDS]} for {num_processes} processes; name a card for each, perhaps one several "
            "times, or start fewer --replicas"
        )
    cards = cards or [str(number) for number in range(num_processes)]
    share = os.environ.get("OMP_NUM_THREADS") or str(max(1, num_threads() // num_processes))
    return [{CARDS: card, "OMP_NUM_THREADS": share} for card in cards[:num_processes]]
