"""TR-DPO: python examples/dpo.py [MODEL [ROWS [FOLDER]]]"""

import sys

from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data import load_rows

defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", "runs/dpo"]
model, rows, folder = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

config = TRConfig(
    output_dir=folder,
    loss_type="dpo",
    beta=0.1,
    ref_model_mixup_alpha=0.6,  # α: the policy's weight in the new reference
    ref_model_sync_steps=0.25,  # τ: steps between two moves, or a share of the run
    per_device_train_batch_size=4,
    max_steps=8,
    logging_steps=2,
    report_to="none",
)
trainer = TRTrainer(model, args=config, train_dataset=load_rows(rows))
trainer.train()
trainer.save_model()
