"""Finds Ray's strategy, and the strategy of this package that is of the same family."""

import sys
from importlib import import_module

from lightning_adpsgd.families import ROOMS, family_of, room_of_the_family_in_use


def find_bases() -> tuple[type, type]:
    """Ray's ``RayDDPStrategy`` and the ``ADPSGDStrategy`` of its family.

    Raises:
        ModuleNotFoundError: if Ray Train or Lightning is not installed.
        ImportError: if the script uses another family than Ray.
    """
    room_of_the_family_in_use()  # one of them must be there
    try:
        version = import_module("ray").__version__
        import_module("ray.train")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"lightning_adpsgd.ray needs Ray Train, which could not be imported ({error}). Install it:"
            " pip install 'lightning-adpsgd[ray]'.",
            name="ray",
        ) from error
    used = [family for family in ROOMS if family in sys.modules]
    theirs: type = import_module("ray.train.lightning").RayDDPStrategy
    family = family_of(theirs)
    if used and family not in used:
        raise ImportError(
            f"Ray Train {version} uses `{family}`, since it is installed, and this script has imported `{used[0]}`. A"
            f" Trainer of one refuses a strategy of the other. Either take the Trainer from `{family}` and import that"
            f" before lightning_adpsgd.ray, or uninstall `{family.partition('.')[0]}`: Ray Train then uses `{used[0]}`."
        )
    return theirs, import_module(f"{ROOMS[family]}.strategy").ADPSGDStrategy
