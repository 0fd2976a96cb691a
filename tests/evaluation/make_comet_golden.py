"""Scores the tiny checkpoints of `comet_tiny.py` with the real package: `comet_golden.json`.

In an environment of its own, as the package needs older libraries than this project:

    python3.11 -m venv comet-env
    comet-env/bin/pip install torch==2.13.0 unbabel-comet==2.2.7 "setuptools<81"
    comet-env/bin/python tests/evaluation/make_comet_golden.py

Without setuptools' `pkg_resources` the package would leave out its own rule for `sparsemax_patch`.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import comet
import pkg_resources  # noqa: F401
from comet_tiny import SAMPLES, VARIANTS, build_checkpoint, build_encoder

GOLDEN = Path(__file__).with_name("comet_golden.json")


def main() -> None:
    samples = [dict(zip(("src", "mt", "ref"), texts, strict=True)) for texts in SAMPLES]
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        encoder = build_encoder(Path(folder, "encoder"))
        for name in VARIANTS:
            checkpoint = build_checkpoint(Path(folder, name), encoder, name)
            model = comet.load_from_checkpoint(str(checkpoint / "checkpoints" / "model.ckpt"))
            prediction = model.predict(samples, batch_size=4, gpus=0, progress_bar=False)
            scores[name] = [float(score) for score in prediction["scores"]]
    versions = {name: version(name) for name in ("unbabel-comet", "torch", "transformers")}
    golden = {"made with": versions, "scores": scores}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
