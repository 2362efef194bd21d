"""The ops in a loop of one's own: python examples/hand_written_loop.py [MODEL]"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM

from tralign_fast import TrustRegion, dpo_loss, ema_update_, linear_logprobs

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name)
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
schedule = TrustRegion(alpha=0.6, every=2)


def logps(model, ids, prompt):  # (B,) log-probs of what follows the prompt; no logits in memory
    hidden = model.base_model(ids).last_hidden_state[:, prompt - 1 : -1]
    targets = ids[:, prompt:]
    head = model.get_output_embeddings().weight
    return linear_logprobs(hidden.flatten(0, 1), head, targets.flatten()).view_as(targets).sum(1)


generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randint(3, 100, (2, 4, 24), generator=generator)
rejected[:, :8] = chosen[:, :8]  # the same prompt of 8 tokens
for step in range(1, 7):
    with torch.no_grad():
        of_reference = [logps(reference, ids, 8) for ids in (chosen, rejected)]
    of_policy = [logps(model, ids, 8) for ids in (chosen, rejected)]
    result = dpo_loss(*of_policy, *of_reference, beta=0.1)
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if schedule.should_sync(step):
        ema_update_([*reference.parameters()], [*model.parameters()], schedule.alpha)
    print(f"step {step}: loss {result.loss.item():.4f}")
