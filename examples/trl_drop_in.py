"""TRL's own DPOTrainer with this library's head: python examples/trl_drop_in.py [MODEL [ROWS [FOLDER]]]"""  # noqa: E501

import sys

import torch
from trl import DPOConfig, DPOTrainer

from tralign_fast.data import load_rows
from tralign_fast.integrations.trl import use_fast_logprobs

defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", "runs/trl"]
model, rows, folder = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir=folder,
        sync_ref_model=True,
        ref_model_sync_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        max_steps=6,
        logging_steps=2,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=load_rows(rows),
)
use_fast_logprobs(trainer)
trainer.train()
