"""Other distributions with this import name: an older package and its forks are imported as ``grouped_gemm``, too.

pip lets them write into one folder, where whatever was installed last has its files.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

OWN = "grouped-gemm-dispatch"


def others() -> list[str]:
    """Each other distribution that has written into this package's folder, as "name version". Takes 0.1 s."""
    folder = Path(__file__).resolve().parent.parent
    found = []
    for name in sorted(set(metadata.packages_distributions().get(folder.name, ()))):
        distribution = metadata.distribution(name)
        is_here = Path(str(distribution.locate_file(folder.name))).resolve() == folder
        if is_here and name.replace("_", "-").lower() != OWN:
            found.append(f"{name} {distribution.version}")
    return found


def message(names: list[str]) -> str:
    """What is wrong where there are ``names``, and what to do."""
    return (
        f"expected no other distribution in the folder of {OWN}; found {', '.join(names)}. Each has overwritten files "
        f"of the other: uninstall all of them, then install {OWN} alone, whose grouped_gemm.ops has the same calls."
    )


def warn_of_others() -> None:
    """Warns where there are others."""
    names = others()
    if names:
        warnings.warn(f"grouped_gemm: {message(names)}", stacklevel=3)
