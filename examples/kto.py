"""TR-KTO of completions with a label: python examples/kto.py [MODEL [ROWS [FOLDER]]]"""

import sys

from tralign_fast import TRKTOConfig, TRKTOTrainer
from tralign_fast.data import load_rows

defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/kto-mix-14k", "runs/kto"]
model, rows, folder = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

config = TRKTOConfig(
    output_dir=folder,
    desirable_weight=1.0,
    undesirable_weight=1.0,
    ref_model_sync_steps=0.25,
    per_device_train_batch_size=4,  # at least 2: the KL term mismatches rows of a batch
    max_steps=8,
    logging_steps=2,
    report_to="none",
)
trainer = TRKTOTrainer(model, args=config, train_dataset=load_rows(rows))
trainer.train()
trainer.save_model()
