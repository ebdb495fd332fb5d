"""Write the icons that `batchnorm study --data icons` ships with: src/batchnorm/studies/icons.npz.

Noto Emoji 2.048 (Apache License 2.0, Google) as the npm package emoji-datasource-google 16.0.0 holds them:
1,906 icons, without those that differ in the tone of skin alone. The class is Unicode's group: people,
animals, food, travel, and so on. They become 16 x 16 pixels in RGB on white. Run from anywhere:

    npm pack emoji-datasource-google@16.0.0 && python scripts/make_icons.py emoji-datasource-google-16.0.0.tgz
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TARGET = Path(__file__).parents[1] / "src" / "batchnorm" / "studies" / "icons.npz"
SHEET_SIZE, SIZE = (
    32,
    16,
)  # pixels of an icon on the sheet, which has one pixel of margin on each side, and here
ICONS, GROUPS = 1906, 9


def _icon(sheet: Image.Image, entry: dict[str, Any]) -> np.ndarray:
    left, top = (entry[axis] * (SHEET_SIZE + 2) + 1 for axis in ("sheet_x", "sheet_y"))
    icon = sheet.crop((left, top, left + SHEET_SIZE, top + SHEET_SIZE))
    on_white = Image.new("RGBA", icon.size, (255, 255, 255, 255))
    on_white.alpha_composite(icon)
    return np.asarray(on_white.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def main(archive: Path) -> None:
    with tarfile.open(archive) as opened:

        def read(name: str) -> bytes:
            member = opened.extractfile(f"package/{name}")
            assert member is not None
            return member.read()

        entries = json.loads(read("emoji.json"))
        sheet = Image.open(io.BytesIO(read("img/google/sheets/32.png"))).convert("RGBA")
    entries = [one for one in entries if one["has_img_google"] and one["category"] != "Component"]
    groups = sorted({one["category"] for one in entries})
    if (len(entries), len(groups)) != (ICONS, GROUPS):
        raise SystemExit(f"the package has changed: {len(entries)} icons in {len(groups)} groups")
    np.savez_compressed(
        TARGET,
        images=np.stack([_icon(sheet, one) for one in entries]),
        labels=np.array([groups.index(one["category"]) for one in entries], np.uint8),
        groups=np.array(groups),
    )
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
