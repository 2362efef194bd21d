"""TR-DPO of an adapter on a base in 4 bits: python examples/lora.py [MODEL [ROWS [FOLDER]]]"""

import sys

from peft import LoraConfig
from transformers import BitsAndBytesConfig

from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data import load_rows

defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", "runs/lora"]
model, rows, folder = sys.argv[1:] + defaults[len(sys.argv) - 1 :]

trainer = TRTrainer(
    model,
    args=TRConfig(
        output_dir=folder,
        ref_model_sync_steps=0.25,  # the reference keeps past adapters, no second model
        model_init_kwargs={"dtype": "bfloat16"},
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        max_steps=8,
        logging_steps=2,
        report_to="none",
    ),
    train_dataset=load_rows(rows),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
)
trainer.train()
trainer.save_model()
