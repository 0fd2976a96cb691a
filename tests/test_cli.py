"""`axolotl skd ...`: bundled paths and the conversion to chat rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from axolotl_skd.chat_rows import ConversionError, chat_row, convert_file
from axolotl_skd.cli import skd


def write_rows(path: Path, count: int) -> Path:
    rows = [
        {
            "question": f"How many? {i}\u2028",
            "answer": f"1+{i}=<<1+{i}={i + 1}>>{i + 1}\n#### {i + 1}",
        }
        for i in range(count)
    ]
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def test_chat_row_fills_templates_and_removes_marks() -> None:
    row = {"question": "Why?", "answer": "2<<1+1=2>>\n#### 2"}
    assert chat_row(row, "Q: {question} \n\nA:", "{answer}", ["<<.*?>>"]) == {
        "messages": [
            {"role": "user", "content": "Q: Why? \n\nA:"},
            {"role": "assistant", "content": "2\n#### 2"},
        ]
    }


def test_unknown_field_is_named_with_those_there_are() -> None:
    with pytest.raises(ConversionError, match="no field 'text'.*question, answer"):
        chat_row({"question": "", "answer": ""}, "{text}", "{answer}")


def test_convert_file_keeps_order_and_text(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", 5)
    target = tmp_path / "new" / "b.jsonl"
    assert convert_file(source, target, "{question}", "{answer}") == 5
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n") if line]
    assert [row["messages"][0]["content"] for row in rows] == [
        f"How many? {i}\u2028" for i in range(5)
    ]


def test_sample_is_seeded_and_without_repetition(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", 50)
    texts = []
    for name, seed in (("b", 1), ("c", 1), ("d", 2)):
        convert_file(source, tmp_path / name, "{question}", "{answer}", sample=20, seed=seed)
        texts.append((tmp_path / name).read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0].split("\n")) - {""}) == 20


@pytest.mark.parametrize(
    ("line", "message"), [("{not json", "row 2"), ('{"other": 1}', "row 2: there is no field")]
)
def test_bad_rows_are_named(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"question": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(ConversionError, match=message):
        convert_file(source, tmp_path / "b", "{question}", "{answer}")
    assert not (tmp_path / "b").exists()


def test_command_line(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", 3)
    arguments = ["to-chat", str(source), str(tmp_path / "b.jsonl"), "--user", "{question}"]
    result = CliRunner().invoke(skd, [*arguments, "--assistant", "{answer}", "--sample", "2"])
    assert result.exit_code == 0, result.output
    assert "2 rows written" in result.output
    result = CliRunner().invoke(skd, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().strip().split("\n")]
    assert [[turn["role"] for turn in row["messages"]] for row in rows] == [["user"]] * 3
    result = CliRunner().invoke(skd, [*arguments, "--assistant", "{nothing}"])
    assert result.exit_code == 1
    assert "no field 'nothing'" in result.output


@pytest.mark.parametrize("name", ["evals", "examples"])
def test_bundled_paths(name: str) -> None:
    result = CliRunner().invoke(skd, ["path", name])
    assert Path(result.output.strip()).is_dir()


def test_the_readme_has_the_key_table_of_the_schema() -> None:
    table = CliRunner().invoke(skd, ["keys"]).output.strip()
    assert table.startswith("| key |")
    readme = Path(__file__).parents[1] / "README.md"
    assert table in readme.read_text(encoding="utf-8")


def test_the_last_line_of_the_real_command_is_the_path() -> None:
    """Axolotl prints its logo on the standard output first; the README takes the last line."""
    command = [str(Path(sys.executable).parent / "axolotl"), "skd", "path", "examples"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (Path(output.splitlines()[-1]) / "skd_tiny.yml").exists()


def test_a_broken_expression_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="'[(][(]' is no regular expression"):
        chat_row({"a": "b"}, "{a}", "{a}", ["(("])
