"""`TRTrainer`, its config, and what a run holds besides the loop of transformers."""
