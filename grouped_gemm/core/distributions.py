"""Other distributions of the same import name: an older package and its forks are also imported as ``grouped_gemm``.

pip lets several distributions write to the same folder; the last one to be installed overwrites files of the others.
"""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

OWN = "grouped-gemm-dispatch"


def others() -> list[str]:
    """Other distributions that have written to this package's folder, as "name version". Takes 0.1 s."""
    folder = Path(__file__).resolve().parent.parent
    found = []
    for name in sorted(set(metadata.packages_distributions().get(folder.name, ()))):
        distribution = metadata.distribution(name)
        is_here = Path(str(distribution.locate_file(folder.name))).resolve() == folder
        if is_here and name.replace("_", "-").lower() != OWN:
            found.append(f"{name} {distribution.version}")
    return found


def message(names: list[str]) -> str:
    """The error for other distributions ``names``, and what to do."""
    return (
        f"expected no other distribution in the folder of {OWN}; found {', '.join(names)}. They have overwritten each "
        f"other's files: uninstall all of them, then install {OWN} alone. Its grouped_gemm.ops has the same functions."
    )


def warn_of_others() -> None:
    """Warns if there are other distributions."""
    names = others()
    if names:
        warnings.warn(f"grouped_gemm: {message(names)}", stacklevel=3)
