"""Write all configs: `python -m example_configs.make_configs`."""

from pathlib import Path

from example_configs.make_configs import all_files

for name, text in all_files().items():
    path = Path(__file__).resolve().parents[1] / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)
