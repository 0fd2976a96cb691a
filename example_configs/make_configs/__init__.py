"""The example configs as data: one record per method, family, task and stage.

Axolotl's YAML has no includes, so each config is complete in itself, and what they share stands here,
each fact in one place. After an edit, in the repository's root:

    python -m example_configs.make_configs

The files are committed; `tests/test_make_configs.py` compares them with what this writes.

- `<method>_tiny.yml`: the tiny pair, one for each row of `axolotl_skd/methods.py`.
- `skd_tiny_gsm8k.yml`: the tiny pair on real questions.
- `paper/<task>_<family>_{teacher_sft,student_sft,skd}.yml`: the SKD paper. Distillation of GSM8K is
  `skd_gemma2b.yml` and `skd_qwen0.5b.yml`.
"""

from axolotl_skd.methods import METHODS
from example_configs.make_configs.paper import paper, paper_name
from example_configs.make_configs.paper_tables import FAMILIES, TASKS, Stage
from example_configs.make_configs.tiny import tiny, tiny_gsm8k


def all_files() -> dict[str, str]:
    """Path below `example_configs/` -> text."""
    files = {f"{name}_tiny.yml": tiny(name) for name in METHODS}
    files["skd_tiny_gsm8k.yml"] = tiny_gsm8k()
    for task in TASKS.values():
        for family in FAMILIES.values():
            for stage in Stage:
                files[f"{paper_name(task, family, stage)}.yml"] = paper(task, family, stage)
    return files
