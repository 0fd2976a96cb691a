r"""Hand-written rows of every bundled benchmark, written as files in the releases' layouts.

`RESPONSES` has what the tests' model says to each question: mostly the right answer, in the format
that the task asks for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from axolotl_skd.evaluation.benchmarks import SUBJECTS

GSM_PLUS_TYPES = (
    "numerical substitution",
    "digit expansion",
    "integer-decimal-fraction conversion",
    "adding operation",
    "reversing operation",
    "problem understanding",
    "distraction insertion",
    "critical thinking",
)
GSM_PLUS = [
    {
        "question": f"Nia has {n} boxes of 6 pens. How many pens? ({kind})",
        "answer": "None" if kind == "critical thinking" else str(6 * n),
        "solution": f"#### {6 * n}",
        "perturbation_type": kind,
        "seed_question": "",
    }
    for n, kind in enumerate(GSM_PLUS_TYPES, start=2)
]
# One problem of each subject; the release writes one file for each.
MATH = {
    subject: {
        "problem": f"Simplify $\\frac{{{n}}}{{{2 * n}}}$. ({subject})",
        "level": f"Level {1 + n % 5}",
        "type": subject.replace("_and_", " & ").replace("_", " ").title(),
        "solution": f"It is ${n} \\cdot \\frac{{1}}{{{2 * n}}} = \\boxed{{\\frac{{1}}{{2}}}}$.",
    }
    for n, subject in enumerate(SUBJECTS, start=3)
}
MATH["geometry"]["solution"] = "The half is $\\boxed 5$."
MATH500 = [
    {
        "problem": "What is $2^5$?",
        "solution": "$2^5 = \\boxed{32}$.",
        "answer": "32",
        "subject": "Number Theory",
        "level": 2,
        "unique_id": "test/number_theory/1.json",
    }
]
ASDIV = [
    ("Ola has 4 (big) kites.", "She gets 3. How many?", "Addition", "7 (kites)"),
    (
        "Two sisters are 3 years apart.",
        "Their ages sum to 17.",
        "Algebra-2",
        "7 (years); 10 (years)",
    ),
    ("Pia had 9 figs.", "She ate 4 of them. How many are left?", "Substraction", "5 (figs)"),
    ("Minus one is cut in three parts.", "What is a part?", "UnitTrans", "-(1/3)"),
]
SVAMP = [
    ("Raj had 8 stamps", "How many are left after 3 are gone?", 5.0, "Subtraction"),
    ("Each of 4 nets has 2 balls.", "How many balls are there?", 8.0, "Multiplication"),
    ("Half of 5 litres is gone.", "How many litres are left?", 2.5, "Common-Divison"),
]
GSM8K = [
    {
        "question": "Tom has 600 nails and gets 650. How many?",
        "answer": "600+650=<<1>>\n#### 1,250",
    },
    {"question": "Uma has 3 hats and loses 1. How many?", "answer": "3-1=2\n#### 2"},
]
DIALOGSUM = [
    {
        "fname": f"test_{n}",
        "dialogue": f"#Person1#: Is train {n} late?\n#Person2#: Yes.",
        "summary1": f"Train {n} is late.",
        "topic1": "train",
        "summary2": f"#Person1# asks about train {n}.",
        "topic2": "train",
        "summary3": "A train has a delay.",
        "topic3": "delay",
    }
    for n in (1, 2)
]
FLORES = {
    "asm_Beng": ["আজি বতৰ ভাল।", "তেওঁ কিতাপ পঢ়ে।"],
    "eng_Latn": ["The weather is fine today.", "She reads a book."],
}

RESPONSES = {
    # Right but for the second and the last: the unanswerable one has only a literal None.
    **{row["question"]: rf"so \boxed{{{row['answer']}}}" for row in GSM_PLUS},
    GSM_PLUS[1]["question"]: r"\boxed{5}",
    GSM_PLUS[7]["question"]: r"\boxed{54}",
    **{row["problem"]: r"First \boxed{7}. No, \boxed{0.5}." for row in MATH.values()},
    MATH["algebra"]["problem"]: r"One half is \boxed{\frac{1}{2",
    MATH["geometry"]["problem"]: r"\boxed{5}",
    MATH500[0]["problem"]: r"\boxed{2^5}",
    "Ola has 4 (big) kites. She gets 3. How many?": r"\boxed{7 \text{ kites}}",
    "Two sisters are 3 years apart. Their ages sum to 17.": r"\boxed{10, 7}",
    "Pia had 9 figs. She ate 4 of them. How many are left?": "Five figs.",
    "Minus one is cut in three parts. What is a part?": r"\boxed{-\frac13}",
    "Raj had 8 stamps. How many are left after 3 are gone?": r"\boxed{5}",
    "Each of 4 nets has 2 balls. How many balls are there?": r"\boxed{6}",
    "Half of 5 litres is gone. How many litres are left?": r"\boxed{\frac{5}{2}\text{ litres}}",
    GSM8K[0]["question"]: "600+650\n#### $1250.",
    GSM8K[1]["question"]: "It is 2.",
    DIALOGSUM[0]["dialogue"]: "Train 1 is late.",
    DIALOGSUM[1]["dialogue"]: "",
    FLORES["asm_Beng"][0]: "The weather is fine today.",
    FLORES["asm_Beng"][1]: "He buys a car.",
}


def write_releases(folder: Path) -> Path:
    """All benchmarks as their authors released them, for `SKD_DATA_DIR`."""
    write_jsonl(folder / "gsm_plus" / "test.jsonl", GSM_PLUS)
    write_jsonl(folder / "gsm_plus" / "testmini.jsonl", GSM_PLUS[:2])
    for subject, problem in MATH.items():
        write(folder / "math" / "test" / subject / "1.json", json.dumps(problem))
    write_jsonl(folder / "math500" / "test.jsonl", MATH500)
    problems = "".join(
        f'<Problem ID="{n}" Grade="1"><Body>{body}</Body>\n<Question>{question} </Question>'
        f"<Solution-Type>{kind}</Solution-Type><Answer>{answer}</Answer><Formula>?</Formula></Problem>"
        for n, (body, question, kind, answer) in enumerate(ASDIV)
    )
    write(
        folder / "asdiv" / "ASDiv.xml",
        '<?xml version="1.0" encoding="UTF-8" ?>\n<Machine-Reading-Corpus-File><ProblemSet>'
        f"{problems}</ProblemSet></Machine-Reading-Corpus-File>",
    )
    write(folder / "svamp" / "SVAMP.json", json.dumps(svamp_rows()))
    write_jsonl(folder / "gsm8k" / "test.jsonl", GSM8K)
    write_jsonl(folder / "dialogsum" / "dialogsum.test.jsonl", DIALOGSUM)
    for language, sentences in FLORES.items():
        write(folder / "flores" / "devtest" / f"{language}.devtest", "\n".join(sentences) + "\n")
    return folder


def svamp_rows() -> list[dict[str, Any]]:
    names = ("Body", "Question", "Answer", "Type")
    return [dict(zip(names, row, strict=True)) for row in SVAMP]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
