"""Where the rows of a benchmark come from: local files if `SKD_DATA_DIR` is set, else the hub.

Local files may lie as their authors released them or as the hub has them; `evals/README.md` lists
the names. With `SKD_DATA_DIR` set nothing is ever fetched.
"""

from __future__ import annotations

import csv
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

DATA_VARIABLE = "SKD_DATA_DIR"

Row = dict[str, Any]


class DataUnavailableError(RuntimeError):
    """No rows: neither local files nor the hub; says how to get either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One benchmark's rows.

    Attributes:
        repo: the data set on the hub.
        configs: its configurations, all needed; None = the only one.
        splits: its splits, all needed, in this order.
        files: ways in which it may lie in the local folder, the first that is there counts. Each is
            one or more patterns relative to the folder, all needed, in this order.
    """

    repo: str
    splits: tuple[str, ...]
    files: tuple[tuple[str, ...], ...]
    configs: tuple[str | None, ...] = (None,)

    def load(self) -> list[Row]:
        """All rows, with the column names of wherever they come from.

        Raises:
            DataUnavailableError: naming the files and the repository that were tried.
            ValueError: if a file is broken.
        """
        folder = local_folder()
        return self._local(folder) if folder else self._hub()

    def check_local(self, folder: Path) -> None:
        """Refuse a local folder without the files that `load` would read; opens none.

        Raises:
            DataUnavailableError: as `load`.
        """
        self._local_files(folder)

    def _local(self, folder: Path) -> list[Row]:
        return [row for path in self._local_files(folder) for row in read_rows(path)]

    def _local_files(self, folder: Path) -> list[Path]:
        for patterns in self.files:
            found = [sorted(folder.glob(pattern)) for pattern in patterns]
            if all(found):
                return list(chain.from_iterable(found))
        raise DataUnavailableError(
            f"{DATA_VARIABLE} is {str(folder)!r}, and that folder has no data for {self.repo}. Put "
            f"one of these there: {self._file_names()}; or unset {DATA_VARIABLE} to load "
            f"{self.repo} from the hub."
        )

    def _hub(self) -> list[Row]:
        from datasets import load_dataset

        try:
            return [
                dict(row)
                for config in self.configs
                for split in self.splits
                for row in load_dataset(self.repo, config, split=split)
            ]
        except Exception as error:  # the hub's client has dozens
            raise DataUnavailableError(
                f"could not load {self.repo} from the hub ({type(error).__name__}: {error}). Either "
                "give access to it (network, HF_HUB_OFFLINE, for a gated data set the licence and a "
                f"token), or set {DATA_VARIABLE} to a folder with one of: {self._file_names()}."
            ) from error

    def _file_names(self) -> str:
        return ", or ".join(" and ".join(patterns) for patterns in self.files)


def local_folder() -> Path | None:
    """The folder that `SKD_DATA_DIR` names; None = data come from the hub."""
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder).expanduser() if folder else None


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, by its suffix.

    A `.json` is a list of rows or one row; `.xml` is ASDiv's; a file of any other suffix is plain
    text, one `{"text": line}` per line.

    Raises:
        ValueError: naming the file, if it cannot be read as what its suffix says.
    """
    reader = _READERS.get(path.suffix, _read_lines)
    try:
        return list(reader(path))
    except (ValueError, KeyError, OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _read_json(path: Path) -> Iterator[Row]:
    content = json.loads(path.read_text(encoding="utf-8"))
    yield from content if isinstance(content, list) else [content]


def _read_csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)


def _read_parquet(path: Path) -> Iterator[Row]:
    from pyarrow.parquet import read_table

    yield from read_table(path).to_pylist()


def _read_xml(path: Path) -> Iterator[Row]:
    """The `<Problem>` elements of ASDiv.xml, with the hub's column names."""
    for problem in ElementTree.parse(path).iter("Problem"):
        yield {child.tag.lower().replace("-", "_"): (child.text or "").strip() for child in problem}


def _read_lines(path: Path) -> Iterator[Row]:
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            yield {"text": line.strip()}


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".xml": _read_xml,
}
