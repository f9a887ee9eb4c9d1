"""Writers of small data files of every type."""

import base64
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vila.core.errors import DataError

# Distinct contents; they are never decoded.
PIXELS = b"\x89PNG-one"
OTHER_PIXELS = b"\x89PNG-two"
TEXT64 = base64.b64encode(PIXELS).decode()


def refusal(read):
    """Return the DataError that a call raises."""
    with pytest.raises(DataError) as raised:
        read()
    return raised.value


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_list(path, rows, **how):
    path.write_text(json.dumps(rows, **how), encoding="utf-8")
    return path


def write_tar(path, members):
    """members: (name, bytes, text or JSON value), in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            if not isinstance(content, (bytes, str)):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_parquet(path, rows, group=2, schema=None):
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=group)
    return path
