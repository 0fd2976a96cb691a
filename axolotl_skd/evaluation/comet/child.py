"""Scores with unbabel-comet. Runs in a Python of the user's, knows nothing of this package.

    python child.py REQUEST SCORES

REQUEST is a JSON file `{"checkpoint": path, "samples": [{"src", "mt", "ref"}, ...], "batch_size",
"device"}`; to SCORES goes the JSON list of scores. Not by standard output, where Lightning prints.
"""

import json
import sys


def main(request_file: str, scores_file: str) -> None:
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    try:
        import comet
    except ImportError as error:
        sys.exit(f"unbabel-comet cannot be imported in {sys.executable}: {error}")
    import torch

    device = request["device"]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    model = comet.load_from_checkpoint(request["checkpoint"])
    prediction = model.predict(
        request["samples"],
        batch_size=request["batch_size"],
        gpus=int(kind != "cpu"),
        devices=[int(index)] if index else None,
        progress_bar=False,
    )
    with open(scores_file, "w", encoding="utf-8") as file:
        json.dump([float(score) for score in prediction["scores"]], file)


if __name__ == "__main__":
    main(*sys.argv[1:])
