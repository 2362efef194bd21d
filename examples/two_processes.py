"""Several processes: accelerate launch --multi_gpu --num_processes 2 examples/two_processes.py
[MODEL [ROWS [FOLDER]]], or tralign-fast train --num_processes 2 --parallel fsdp2 ..."""

import sys

from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data import load_rows

defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", "runs/two"]
model, rows, folder = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

config = TRConfig(
    output_dir=folder,
    ref_model_sync_steps=2,
    per_device_train_batch_size=2,  # in each process
    max_steps=4,
    logging_steps=2,
    report_to="none",
    fsdp=True,  # FSDP2: weights, gradients, states and reference in shards; without it, DDP
)
trainer = TRTrainer(model, args=config, train_dataset=load_rows(rows))
trainer.train()
trainer.save_model()
if trainer.is_world_process_zero():
    print(f"{config.world_size} processes, {folder}")
