"""Penumbra serves trained segmentation checkpoints and says, per pixel, how sure it is.

This folder is the import name. `models`, `serving`, `export` and `training` inside it are links to the folders of those
names at the root of the repository, so that a wheel installs `penumbra` and nothing else, and editors, type checkers
and tests see the same modules. `penumbra.__main__` is the command.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent
if not (_FOLDER / "models").exists():  # a Bento, and a checkout without symbolic links, have the folders beside it only
    __path__.append(str(_FOLDER.parent))
