"""Fonts on this machine: which are plain enough to read, and which split each family belongs to.

Families that descend from one another are in the same split, so that a held-back font is new in shape and not
only in name.
"""

import functools
import re
from pathlib import Path

from PIL import ImageFont

SPLITS = ("train", "validation", "held_back")
FONT_ROOT = "/usr/share/fonts"
BUILT_IN = ""  # Pillow's own Aileron: always there, always held back

VALIDATION_FAMILIES = ("opensans", "vollkorn", "karla", "caladea")
HELD_BACK_FAMILIES = ("dejavu", "hack", "verana", "lato", "carlito", "pt", "gilliusadf")
TOO_FANCY = ("symbol", "math", "d050000l", "z003", "linlibertine_i", "_rz", "_dr", "biolinum_k", "tamil", "[")
TOO_FAINT_OR_FAT = (
    "thin",
    "hairline",
    "extralight",
    "ultralight",
    "black",
    "heavy",
    "extrabold",
    "bolditalic",
)
SLANTED = ("italic", "oblique", "-i.", "it.", "ita.", "slanted", "anonymous pro i", "anonymous pro bi", "_ri")
SLANTED_PARATYPE = ("ptf56f", "ptf76f", "pts56f", "pts76f")


def is_readable(path: Path) -> bool:
    """Whether a font is upright, of ordinary weight and without ornaments, judging by the file's name."""
    name = path.name.lower()
    return not any(part in name for part in TOO_FANCY + TOO_FAINT_OR_FAT + SLANTED + SLANTED_PARATYPE)


def split_of(path: Path) -> str:
    """The split that a font file belongs to, according to the family that its name begins with."""
    name = path.name.lower().replace(" ", "").replace("-", "")
    if name.startswith(HELD_BACK_FAMILIES):
        return "held_back"
    return "validation" if name.startswith(VALIDATION_FAMILIES) else "train"


def find_fonts(split: str, directories: list[str] | None = None) -> list[list[str]]:
    """Families of `split`, each the paths of its readable fonts; the built-in one is held back."""
    found = {}
    for directory in directories or [FONT_ROOT]:
        for path in sorted(Path(directory).rglob("*.[ot]tf")):
            if is_readable(path) and split_of(path) == split:
                found.setdefault(path.name, str(path))
    families = {}
    for name in sorted(found):
        families.setdefault(re.split(r"[-. \d]", name)[0], []).append(found[name])
    if not families and split != "held_back":
        raise ValueError(
            f"no fonts for {split} under {directories or [FONT_ROOT]}; docs/nano.md lists packages to install"
        )
    return list(families.values()) + ([[BUILT_IN]] if split == "held_back" else [])


@functools.lru_cache(maxsize=4096)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """The font at `path` with an em of `size` pixels."""
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
