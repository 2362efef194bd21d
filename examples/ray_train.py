"""Ray: python examples/ray_train.py [MODEL [ROWS [FOLDER]]], or as a job of a cluster:
ray job submit --working-dir . -- python examples/ray_train.py MODEL ROWS /shared/FOLDER"""

import os
import sys

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

WORKERS = int(os.environ.get("WORKERS", "2"))
defaults = ["HuggingFaceTB/SmolLM2-135M-Instruct", "trl-lib/ultrafeedback_binarized", "runs/ray"]
places = sys.argv[1:] + defaults[len(sys.argv) - 1 :]


def train(places: list[str]) -> None:
    """Runs in every worker, which Ray has told its rank and where the first one is."""
    from tralign_fast import TRConfig, TRTrainer
    from tralign_fast.data import load_rows

    model, rows, folder = places
    config = TRConfig(
        output_dir=folder,  # one folder for all machines: checkpoints lie there
        ref_model_sync_steps=2,
        per_device_train_batch_size=2,  # in each worker
        max_steps=4,
        save_steps=2,
        logging_steps=2,
        report_to="none",
    )
    trainer = TRTrainer(model, args=config, train_dataset=load_rows(rows))
    trainer.train(resume_from_checkpoint="auto")  # where workers died and Ray starts others
    trainer.save_model()
    print(f"worker {config.process_index} of {config.world_size}: {folder}")


scaling = ScalingConfig(num_workers=WORKERS, use_gpu="ACCELERATE_USE_CPU" not in os.environ)
run = RunConfig(failure_config=FailureConfig(max_failures=3))
TorchTrainer(train, train_loop_config=places, scaling_config=scaling, run_config=run).fit()
