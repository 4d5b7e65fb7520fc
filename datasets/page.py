"""The page to label on: query_N.html shows what query_N.csv asks, and saves it with the answers."""

import base64
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import ExifTags, Image

from errors import UserError

from .files import write_whole
from .folder import upright
from .sheets import SKIP, UNKNOWN

TEMPLATE = Path(__file__).with_name("page.html")
SHOWN = {"AVIF", "BMP", "GIF", "ICO", "JPEG", "MPO", "PNG", "WEBP"}  # browsers can show these,
TURNED = {"JPEG", "MPO"}  # and turn these as their EXIF data say
COPY = 512  # pixels, the longer side of the copy of another picture


def write_page(
    sheet: Path, table: Sequence[Sequence[str]], files: Sequence[str], classes: Sequence[str]
) -> None:
    """Write the page beside a sheet that is yet to be written.

    table: the sheet's cells, the header first. files: per row the path of its picture, relative to
    the sheet's folder, or "" if the row has none; then the page shows its cells. classes: the
    answers besides "unknown" and "skip". Raises UserError if the sheet exists, because the browser
    may hold answers to the page. A page without a sheet is from a run that was killed in between.
    """
    if os.path.lexists(sheet):
        raise UserError(f"{sheet} exists: its page is never overwritten")
    header, *rows = table
    data = {"sheet": sheet.name, "header": header, "rows": rows, "classes": classes}
    data |= {"others": (UNKNOWN, SKIP), "pictures": [_picture(sheet.parent, x) for x in files]}
    # The browser keeps the answers of all pages in one place, each under its key.
    content = f"{sheet.absolute()}{json.dumps(data)}".encode(errors="surrogatepass")
    key = hashlib.sha256(content).hexdigest()
    text = json.dumps({"key": key, **data}).replace("<", "\\u003c")  # no </script>, all ASCII
    page = TEMPLATE.read_text("utf-8").replace("@DATA@", text)
    write_whole(sheet.with_suffix(".html"), lambda file: file.write(page.encode()))


def _picture(folder: Path, file: str) -> dict[str, str] | None:
    """Where the page finds a picture, relative to itself, and what it says below it."""
    if not file:
        return None
    link = source = quote(file)
    note = ""
    try:
        with Image.open(folder / file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if image.format not in (TURNED if turned else SHOWN):
                small, content = upright(image), io.BytesIO()
                small.thumbnail((COPY, COPY))
                small.save(content, "PNG")
                source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
                note = f"A small copy, because not all browsers show this {image.format} file. "
    except Exception:  # Pillow names no common class for broken pictures
        source, note = "", "This picture cannot be shown. "
    return {"link": link, "source": source, "note": note}
