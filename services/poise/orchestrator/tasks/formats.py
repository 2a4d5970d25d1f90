"""Recognises files that are not JSON Lines by their first bytes, and names a command that converts them."""

from __future__ import annotations

import re
import shlex

HEAD_BYTES = 4096
"""Bytes needed from the start of a file."""

_DECOMPRESS = "decompress it: {command} {shell}"
_CONVERT = (
    "convert it: python -c \"import pandas; pandas.{reader}('{path}').to_json('{path}.jsonl', orient='records', "
    'lines=True)"'
)
_EXPORT = "export its rows as JSON Lines"

_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", _DECOMPRESS.replace("{command}", "gunzip -k")),
    (b"\x28\xb5\x2f\xfd", "zstd", _DECOMPRESS.replace("{command}", "unzstd")),
    (b"\xfd7zXZ\x00", "xz", _DECOMPRESS.replace("{command}", "unxz -k")),
    (b"\x5d\x00\x00", "lzma", _DECOMPRESS.replace("{command}", "unlzma -k")),
    (b"BZh", "bzip2", _DECOMPRESS.replace("{command}", "bunzip2 -k")),
    (b"\x04\x22\x4d\x18", "lz4", _DECOMPRESS.replace("{command}", "unlz4")),
    (b"\x1f\x9d", "compress (.Z)", _DECOMPRESS.replace("{command}", "uncompress -k")),
    (b"LZIP", "lzip", _DECOMPRESS.replace("{command}", "lzip -dk")),
    (b"\x89LZO", "lzop", _DECOMPRESS.replace("{command}", "lzop -d")),
    (b"\xff\x06\x00\x00sNaPpY", "snappy", "decompress it"),
    (b"\x78\x01", "zlib", "decompress it"),
    (b"\x78\x9c", "zlib", "decompress it"),
    (b"\x78\xda", "zlib", "decompress it"),
    (b"PK\x03\x04", "zip", "unpack it: unzip {shell}"),
    (b"PK\x05\x06", "zip", "unpack it: unzip {shell}"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "unpack it: 7z x {shell}"),
    (b"Rar!\x1a\x07", "rar", "unpack it: unrar x {shell}"),
    (b"PAR1", "Parquet", _CONVERT.replace("{reader}", "read_parquet")),
    (b"PARE", "encrypted Parquet", _EXPORT),
    (b"ARROW1", "Arrow", _CONVERT.replace("{reader}", "read_feather")),
    (b"FEA1", "Feather", _CONVERT.replace("{reader}", "read_feather")),
    (b"\xff\xff\xff\xff", "Arrow stream", "convert it: datasets.Dataset.from_file('{path}').to_json('{path}.jsonl')"),
    (b"ORC", "ORC", _CONVERT.replace("{reader}", "read_orc")),
    (b"Obj\x01", "Avro", _EXPORT),
    (b"\x89HDF\r\n\x1a\n", "HDF5", _EXPORT),
    (b"\x93NUMPY", "NumPy", _EXPORT),
    (b"SQLite format 3\x00", "SQLite", _EXPORT),
    (b"\x80\x02", "pickle", _EXPORT),
    (b"\x80\x03", "pickle", _EXPORT),
    (b"\x80\x04", "pickle", _EXPORT),
    (b"\x80\x05", "pickle", _EXPORT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel (.xls)", _EXPORT),
    (b"%PDF-", "PDF", _EXPORT),
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 {shell}"),
    (b"\x00\x00\xfe\xff", "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 {shell}"),
    (b"\xff\xfe", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 {shell}"),
    (b"\xfe\xff", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 {shell}"),
    (b"version https://git-lfs.github.com/spec/", "Git LFS pointer", "fetch the file: git lfs pull"),
)
"""First bytes, name, and remedy. Longer prefixes come before shorter ones."""

_BINARY = "is binary; name a JSON Lines file in UTF-8"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_HEADER = re.compile(rb'"?[A-Za-z_][\w .-]*"?(?:[,\t]"?[A-Za-z_][\w .-]*"?)+')
"""A row of column names."""
_AT_OFFSET = ((257, b"ustar", "tar", "unpack it: tar xf {shell}"), (8, b"DUCK", "DuckDB", _EXPORT))


def foreign_format(head: bytes, path: str) -> str | None:
    """Return the format of a file that starts with `head`, with a remedy; None if it may be JSON Lines."""
    for magic, name, remedy in _FORMATS:
        if head.startswith(magic):
            return _message(name, remedy, path)
    for offset, magic, name, remedy in _AT_OFFSET:
        if head[offset:].startswith(magic):
            return _message(name, remedy, path)
    return _binary(head, path) or _text(head, path)


def _binary(head: bytes, path: str) -> str | None:
    sample = head[:256]
    if b"\x00" not in sample:
        is_text = _CONTROL.search(sample) is None or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        return None if is_text else _BINARY
    for start, name in ((b"{\0\0\0", "UTF-32LE"), (b"\0\0\0{", "UTF-32BE")):
        if head.startswith(start):
            return _message(name, f"convert it: iconv -f {name} -t UTF-8 {{shell}}", path)
    for zeros, others, name in (
        (sample[1::2], sample[::2], "UTF-16LE"),
        (sample[::2], sample[1::2], "UTF-16BE"),
    ):
        if zeros.count(0) > len(zeros) * 0.7 and others.count(0) < len(others) * 0.3:
            return _message(name, f"convert it: iconv -f {name} -t UTF-8 {{shell}}", path)
    return None if sample.lstrip().startswith(b"{") else _BINARY


def _text(head: bytes, path: str) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first, _, rest = text.partition(b"\n")
    first = first.strip()
    if text.startswith(b"["):
        return _message("JSON array", "write one object on each line: jq -c '.[]' {shell}", path)
    if first == b"{" and rest:
        return _message("JSON object over several lines", "write one object on each line: jq -c . {shell}", path)
    if text[:14].lower() == b"<!doctype html" or text[:5].lower() == b"<html":
        return _message("HTML page", "download the file itself", path)
    if text[:5].lower() == b"<?xml":
        return _message("XML", _EXPORT, path)
    if (b"prompt" in first.lower() and b"{" not in first) or _HEADER.fullmatch(first):
        if b"," in first:
            return _message("CSV", _CONVERT.replace("{reader}", "read_csv"), path)
        if b"\t" in first:
            return _message("TSV", _CONVERT.replace("{reader}", "read_table"), path)
    return None


def _message(name: str, remedy: str, path: str) -> str:
    remedy = remedy.replace("{shell}", shlex.quote(path)).replace("{path}", path)
    return f"is not JSON Lines but {name}; {remedy}"
