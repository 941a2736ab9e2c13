"""The recorded choices that studies of people read: train tickets, and cars."""

from collections.abc import Sequence
from pathlib import Path

from jax_klrlhf.bandit import human
from jax_klrlhf.errors import InputError

DATASETS = ("train_tickets", "cars")


def check(folder: Path, datasets: Sequence[str]) -> None:
    """Refuse what is no data set or no folder.

    Raises:
        InputError: naming the flag.
    """
    unknown = sorted(set(datasets) - set(DATASETS))
    if unknown or not datasets:
        raise InputError(f"--datasets {' '.join(unknown)}: choose from {', '.join(DATASETS)}.")
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; --choices-dir takes the folder with "
            "train_tickets.npz and cars.npz."
        )


def read(folder: Path, name: str) -> human.RecordedChoices:
    """One of them.

    Raises:
        InputError: where the file is missing or not what it should be.
    """
    path = folder / f"{name}.npz"
    return human.cars(path) if name == "cars" else human.train_tickets(path)
