"""Imported price sheets: fetched or read once, kept as they came in the node's home, read again when prices are shown.

One file per source in `<home>/price-sheets/`, holding where it came from, when, that no licence is stated, and the JSON
as it was. A later import from the same source replaces it, whole or not at all.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from incentives.price_sheets import MAX_SHEET_BYTES, PriceSheet, SheetError, parse_sheet

log = logging.getLogger("tally.upstream.sheets")

FOLDER: Final = "price-sheets"
"""Where sheets are kept, inside the node's home."""

LICENCE_NOTE: Final = "none stated by the source; kept for this node's own comparison"
"""What is written beside every kept sheet."""


class KeptSheet(msgspec.Struct, frozen=True):
    """A file of FOLDER. `imported_at`: Unix seconds."""

    source: str
    imported_at: int
    licence: str
    sheet: msgspec.Raw


async def import_sheet(source: str, home: Path, now_s: int, *, allow_private: bool = False) -> PriceSheet:
    """Read a sheet from a URL (its whole address, such as https://openrouter.ai/api/v1/models) or a file, and keep it.

    Raises: SheetError (no sheet; what was kept before stays), UrlRefused, UpstreamError.
    """
    if urlsplit(source).scheme in ("http", "https"):
        data = await fetch(source, allow_private=allow_private)
    elif "://" in source:
        raise SheetError(f"{source[:200]!r}: a file, or a URL that begins with http:// or https://, is expected")
    else:
        data = await asyncio.to_thread(_read, Path(source))
        source = str(await asyncio.to_thread(Path(source).absolute))
    sheet = parse_sheet(data, source, now_s)
    await asyncio.to_thread(_keep, home, KeptSheet(source, now_s, LICENCE_NOTE, msgspec.Raw(data)))
    return sheet


async def fetch(url: str, *, key: str = "", allow_private: bool = False) -> bytes:
    """The JSON of a sheet's address. Raises: UrlRefused, UpstreamError."""
    from node.upstream.http import HttpServer  # aiohttp takes a while, and kept sheets are read without it

    async with HttpServer(url, key=key, allow_private=allow_private) as server:
        return await server.get_raw("")


def load_sheets(home: Path) -> list[PriceSheet]:
    """All kept sheets, by source. One that is damaged is logged and left out."""
    folder = home / FOLDER
    out = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            kept = msgspec.json.decode(_read(path), type=KeptSheet)
            out.append(parse_sheet(bytes(kept.sheet), kept.source, kept.imported_at))
        except (SheetError, msgspec.DecodeError, UnicodeError) as exc:
            log.warning("the kept price sheet %s is left out: %s", path, exc)
    return sorted(out, key=lambda sheet: sheet.source)


def _read(path: Path) -> bytes:
    """Raises: SheetError."""
    try:
        with path.open("rb") as file:
            return file.read(2 * MAX_SHEET_BYTES)
    except OSError as exc:
        raise SheetError(f"the price sheet {path} cannot be read: {exc.strerror}") from exc


def _keep(home: Path, kept: KeptSheet) -> None:
    """Raises: SheetError."""
    folder = home / FOLDER
    name = hashlib.sha256(kept.source.encode()).hexdigest()[:16]
    host = urlsplit(kept.source).hostname or Path(kept.source).stem
    path = folder / f"{''.join(c if c.isalnum() or c in '.-' else '_' for c in host)[:64]}-{name}.json"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with part.open("wb") as file:
            file.write(msgspec.json.encode(kept))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as exc:
        raise SheetError(f"the price sheet cannot be kept in {folder}: {exc.strerror}; the one before stays") from exc
