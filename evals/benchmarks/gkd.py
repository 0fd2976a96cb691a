"""TRL's GKDTrainer, on-policy (lmbda = 1), forward KL (its beta = 0), as shipped and with its cache on.

As it ships, gradient checkpointing is on and generation therefore runs without a KV cache (it sets
`use_cache: False` in its generation config), although it switches checkpointing off while generating.
`force_cache` overwrites that one flag.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from models import Pair, left_padded, tiny_tokenizer
from torch import Tensor
from trl.models.utils import unwrap_model_for_generation

from axolotl_skd.rollout.types import Prompts

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: E402  (reads the variable above)


@contextmanager
def gkd_trainer(
    pair: Pair, max_new_tokens: int, batch_size: int, force_cache: bool
) -> Iterator[GKDTrainer]:
    """A trainer of the pair's own models, in a folder that goes away."""
    with TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=str(Path(folder)),
            lmbda=1.0,
            beta=0.0,
            max_new_tokens=max_new_tokens,
            per_device_train_batch_size=batch_size,
            gradient_checkpointing=True,
            bf16=False,  # no autocast: the models compute in their own dtype
            report_to=[],
            use_cpu=pair.device.type == "cpu",
        )
        trainer = GKDTrainer(
            model=pair.student,
            teacher_model=pair.teacher,
            args=config,
            processing_class=tiny_tokenizer(),  # it only lends a pad token,
            train_dataset=Dataset.from_dict({"messages": [[]]}),
        )
        trainer.current_gradient_accumulation_steps = 1  # as its training loop would set it
        if force_cache:
            trainer.generation_config.use_cache = True
        yield trainer


def gkd_inputs(prompts: Prompts, device: torch.device) -> dict[str, Tensor]:
    """A batch as its collator makes it, as far as on-policy steps read it."""
    ids, mask = left_padded(prompts.ids, device)
    return {"prompts": ids, "prompt_attention_mask": mask}


@torch.no_grad()
def gkd_generate(trainer: GKDTrainer, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Its on-policy samples, made as its training step makes them: ids and mask int64 [B, L]."""
    with unwrap_model_for_generation(trainer.model, trainer.accelerator) as model:
        ids, mask, _ = trainer.generate_on_policy_outputs(
            model, gkd_inputs(prompts, model.device), trainer.generation_config
        )
    return ids, mask
