"""Files of other formats are recognised, with a command that converts them to JSON Lines."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from poise.orchestrator.tasks.config import JsonlTask
from poise.orchestrator.tasks.mixture import Mixture
from poise.orchestrator.tasks.problem import TaskError

GOOD = b'{"prompt": "2+2=", "answer": "4"}\n' * 3
TEXT = GOOD.decode()


def zipped(_: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("own.jsonl", GOOD)
    return buffer.getvalue()


def tarred(_: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        about = tarfile.TarInfo("own.jsonl")
        about.size = len(GOOD)
        archive.addfile(about, io.BytesIO(GOOD))
    return buffer.getvalue()


def database(folder: Path) -> bytes:
    path = folder / "made.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table problems (prompt, answer)")
    return path.read_bytes()


def array(_: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


FOREIGN: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "gzip": (lambda _: gzip.compress(GOOD), "gunzip -k"),
    "bzip2": (lambda _: bz2.compress(GOOD), "bunzip2 -k"),
    "xz": (lambda _: lzma.compress(GOOD), "unxz -k"),
    "lzma": (lambda _: lzma.compress(GOOD, lzma.FORMAT_ALONE), "unlzma -k"),
    "zstd": (lambda _: b"\x28\xb5\x2f\xfd\x04\x00" + bytes(40), "unzstd"),
    "zlib": (lambda _: zlib.compress(GOOD), "decompress it"),
    "zip": (zipped, "unzip"),
    "tar": (tarred, "tar xf"),
    "Parquet": (lambda _: b"PAR1" + bytes(range(60)) + b"PAR1", "pandas.read_parquet("),
    "Arrow": (lambda _: b"ARROW1\x00\x00" + bytes(60), "pandas.read_feather("),
    "Arrow stream": (lambda _: b"\xff\xff\xff\xff\x10\x01" + bytes(60), "datasets.Dataset.from_file("),
    "SQLite": (database, "export its rows"),
    "NumPy": (array, "export its rows"),
    "pickle": (lambda _: pickle.dumps([{"prompt": "a"}]), "export its rows"),
    "HDF5": (lambda _: b"\x89HDF\r\n\x1a\n" + bytes(60), "export its rows"),
    "Avro": (lambda _: b"Obj\x01" + bytes(60), "export its rows"),
    "UTF-16": (lambda _: TEXT.encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    "UTF-16LE": (lambda _: TEXT.encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
    "UTF-16BE": (lambda _: TEXT.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
    "UTF-32": (lambda _: TEXT.encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
    "JSON array": (lambda _: b'\n [{"prompt": "a", "answer": "b"}]', "jq -c '.[]'"),
    "JSON object over several lines": (lambda _: b'{\n  "prompt": "a",\n  "answer": "b"\n}\n', "jq -c ."),
    "CSV": (lambda _: b"prompt,answer\n2+2=,4\n", "pandas.read_csv("),
    "TSV": (lambda _: b"\xef\xbb\xbfPrompt\tanswer\n2+2=\t4\n", "pandas.read_table("),
    "XML": (lambda _: b'<?xml version="1.0"?>\n<rows/>', "export its rows"),
    "UTF-32LE": (lambda _: TEXT.encode("utf-32-le"), "iconv -f UTF-32LE -t UTF-8"),
    "HTML page": (lambda _: b"<!DOCTYPE html>\n<html></html>", "download the file itself"),
    "Git LFS pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("role", ["path", "eval_path"])
@pytest.mark.parametrize("on_bad_row", ["stop", "skip"])
def test_other_file_formats_are_named_with_a_remedy(tmp_path: Path, name: str, role: str, on_bad_row: str) -> None:
    make, remedy = FOREIGN[name]
    paths = {"path": tmp_path / "good.jsonl", role: tmp_path / "own file.jsonl"}
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "own file.jsonl").write_bytes(make(tmp_path))
    with pytest.raises(TaskError) as caught:
        Mixture([JsonlTask.model_validate(paths | {"on_bad_row": on_bad_row})], 0)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'own file.jsonl'}: is not JSON Lines but {name}; ")
    assert remedy in said
    assert "\n" not in said


def test_csv_with_other_columns_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'"question",solution\n2+2=,4\n')
    with pytest.raises(TaskError, match=r"own\.jsonl: is not JSON Lines but CSV"):
        Mixture([JsonlTask(path=path)], 0)


@pytest.mark.parametrize("data", [b"\x17\x00\x00\x03" * 40, b"\x0b\x02\x80compressed text\x03"])
def test_an_unknown_binary_file_is_rejected(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "own.jsonl"
    path.write_bytes(data)
    with pytest.raises(TaskError, match=r"own\.jsonl: is binary; name a JSON Lines file in UTF-8"):
        Mixture([JsonlTask(path=path)], 0)


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b"\n\n", b"  ", b"\r\n"])
def test_json_lines_are_not_mistaken_for_another_format(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "own.jsonl.gz"  # whatever its name
    path.write_bytes(start + b'{"prompt": "prompt, [1]\\tPAR1", "answer": "4"}\n' + GOOD)
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text('{"prompt": "other", "answer": "4"}')
    assert len(Mixture([JsonlTask(path=path, eval_path=evaluation)], 0).problems(0, 2)) == 2
