"""The ops in a loop of one's own: python examples/hand_written_loop.py [MODEL]"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM

from tralign_fast import TrustRegion, ema_update_, linear_logprobs, linear_preference_loss

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name)
reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
schedule = TrustRegion(alpha=0.6, every=2)


def scored(model, ids, prompt):  # hidden states (N, H), the head (V, H), their next tokens (N,)
    hidden = model.base_model(ids).last_hidden_state[:, prompt - 1 : -1]
    return hidden.flatten(0, 1), model.get_output_embeddings().weight, ids[:, prompt:].flatten()


generator = torch.Generator().manual_seed(0)
chosen, rejected = torch.randint(3, 100, (2, 4, 24), generator=generator)
rejected[:, :8] = chosen[:, :8]  # the same prompt of 8 tokens
ids, offsets = torch.cat([chosen, rejected]), 16 * torch.arange(9)  # 16 tokens each are scored
for step in range(1, 7):
    with torch.no_grad():
        ref_logps = linear_logprobs(*scored(reference, ids, 8)).view(8, 16).sum(1)
    result = linear_preference_loss(
        *scored(model, ids, 8), offsets, ref_logps, loss="dpo", beta=0.1
    )  # head and loss are one node: no logits in memory
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if schedule.should_sync(step):
        ema_update_([*reference.parameters()], [*model.parameters()], schedule.alpha)
    print(f"step {step}: loss {result.loss.item():.4f}")
