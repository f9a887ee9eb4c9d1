"""Spreadsheets for servers: one sheet, a header, text as text."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from vila.core.errors import DataError
from vila.core.optional import require

SHEET = "Sheet1"
_LONGEST = 32_767
"""Characters that a cell of a spreadsheet can hold."""
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_MADE = re.compile(rb"(<dcterms:(?:created|modified)[^>]*>)[^<]*")
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def cell_text(text: str) -> str:
    """Text as a cell can hold it: without control characters, and cut where it is longer than a cell."""
    return _FORBIDDEN.sub("", text)[:_LONGEST]


def workbook_bytes(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """An xlsx file: the columns of the first row as header, then all rows; None leaves a cell empty.

    Equal rows give equal bytes. Raises MissingExtraError without openpyxl, and DataError naming the row for text that
    no cell can hold.
    """
    openpyxl = require("openpyxl", "an xlsx file", extra="eval")
    from openpyxl.cell import WriteOnlyCell

    if not rows:
        raise DataError("a spreadsheet without rows; there is nothing to submit")
    columns = list(rows[0])
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet(SHEET)

    def cell(value: Any, number: int, column: str) -> Any:
        if not isinstance(value, str):
            return value
        if value != cell_text(value):
            raise DataError(f"row {number} column {column}: a cell cannot hold {value[:40]!r}; see `cell_text`")
        made = WriteOnlyCell(sheet, value=value)
        # A text that opens with "=" would become a formula.
        made.data_type = "s"
        return made

    sheet.append(columns)
    for number, row in enumerate(rows, start=1):
        sheet.append([cell(row[column], number, column) for column in columns])
    stream = io.BytesIO()
    book.save(stream)
    return _timeless(stream.getvalue())


def _timeless(book: bytes) -> bytes:
    """The file without the time it was made at, which stands in its properties and beside every part."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(book)) as parts, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as kept:
        for part in parts.infolist():
            content = parts.read(part)
            if part.filename == "docProps/core.xml":
                content = _MADE.sub(rb"\g<1>1980-01-01T00:00:00Z", content)
            kept.writestr(zipfile.ZipInfo(part.filename, _NO_TIME), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()
