"""Liger's fused linear DPO loss, its call as it was: python examples/liger_drop_in.py [MODEL]"""

import sys

import torch
from transformers import AutoModelForCausalLM

from tralign_fast.integrations.liger import FusedLinearDPOLoss  # was liger_kernel's

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name)
reference = AutoModelForCausalLM.from_pretrained(name).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss_function = FusedLinearDPOLoss(beta=0.1)

generator = torch.Generator().manual_seed(0)
ids = torch.randint(3, 100, (4, 24), generator=generator)  # two chosen, two rejected
target = ids[:, 1:].clone()
target[:, :8] = -100  # the prompt
for step in range(1, 5):
    hidden = model.base_model(ids[:, :-1]).last_hidden_state
    with torch.no_grad():
        ref_hidden = reference.base_model(ids[:, :-1]).last_hidden_state
    loss, _ = loss_function(
        model.get_output_embeddings().weight, hidden, target, None,
        ref_hidden, reference.get_output_embeddings().weight,
    )  # fmt: skip
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
