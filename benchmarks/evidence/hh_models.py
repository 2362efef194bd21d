"""The policy's start and what judges it: SFT, a gold reward model, and a gold of another kind.

All of them read token ids, of prompts and answers cut as the settings say, so that people's
answers and a policy's samples are judged alike.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# No system message, which SmolLM2's own template adds to every conversation.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
_WORDS = ("weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json")
_INSTALL_WORDS = "run `pip install --no-deps wordllama`"

Ids = list[int]


def small_smollm2(layers: int, vocabulary: int) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, or the part of it that a CPU can train.

    Args:
        layers: decoder layers, the first ones and the last two; 30 is the whole model.
        vocabulary: tokens, the first ones: a BPE's tokens stand in the order of their merges, so
            the first of them are a tokenizer by themselves. 49,152 is all of them.
    """
    from tralign_fast.demo.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    depth = model.config.num_hidden_layers
    if layers < depth:
        kept = [*range(layers - 2), depth - 2, depth - 1]
        layers_: list[Any] = [model.model.layers[i] for i in kept]
        model.model.layers = torch.nn.ModuleList(layers_)
        for index, layer in enumerate(layers_):
            layer.self_attn.layer_idx = index
        model.config.num_hidden_layers = layers
        model.config.layer_types = None
    if vocabulary < model.config.vocab_size:
        model.resize_token_embeddings(vocabulary)
        tokenizer = _first_tokens(tokenizer, vocabulary)
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def _first_tokens(tokenizer: Any, vocabulary: int) -> Any:
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [tuple(m.split(" ")) if isinstance(m, str) else m for m in backend["model"]["merges"]]
    tokens = {t: i for t, i in backend["model"]["vocab"].items() if i < vocabulary}
    backend["model"]["vocab"] = tokens
    backend["model"]["merges"] = [list(m) for m in merges if "".join(m) in tokens]
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < vocabulary]
    return type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token,
        unk_token=tokenizer.unk_token, pad_token=tokenizer.pad_token,
        model_max_length=tokenizer.model_max_length, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def prompt_ids(tokenizer: Any, prompt: list[dict[str, str]], length: int) -> Ids:
    """At most `length` tokens, the last ones: the question stands at the end."""
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return list(ids[-length:])


def answer_ids(tokenizer: Any, answer: list[dict[str, str]], length: int) -> Ids:
    """At most `length` tokens; with the end of the turn where the answer is not cut."""
    ids = tokenizer(answer[0]["content"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:length]


def padded(rows: Sequence[Ids], pad: int, device: Any, left: bool = False) -> tuple[Tensor, Tensor]:
    """(rows, longest) int64 ids, and the mask of what is not padding."""
    width = max(map(len, rows))
    gaps = [[pad] * (width - len(ids)) for ids in rows]
    full = [gap + ids if left else ids + gap for gap, ids in zip(gaps, rows, strict=True)]
    marks = [[1] * len(ids) for ids in rows]
    masks = [[0] * len(g) + m if left else m + [0] * len(g)
             for g, m in zip(gaps, marks, strict=True)]  # fmt: skip
    return torch.tensor(full, device=device), torch.tensor(masks, device=device)


def autocast(device: torch.device | str, bf16: bool) -> Any:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of row numbers: all rows in a new order each time around."""
    order, generator = [], random.Random(seed)
    for _ in range(steps):
        if len(order) < size:
            fresh = list(range(count))
            generator.shuffle(fresh)
            order += fresh
        yield order[:size]
        order = order[size:]


def train(
    model: Any, loss_of: Any, count: int, *, steps: int, size: int, rate: float, seed: int,
    bf16: bool,
) -> None:  # fmt: skip
    """AdamW with a short warmup and a linear decay to 0 over `loss_of(row numbers)`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, (steps - s) / max(1, steps - warmup))
    )
    model.train()
    torch.manual_seed(seed)
    for numbers in batches(count, size, steps, seed):
        with autocast(model.device, bf16):
            loss = loss_of(numbers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def sft_loss(model: Any, rows: Sequence[tuple[Ids, Ids]], pad: int) -> Tensor:
    """Mean negative log-prob of the answers' tokens."""
    ids, mask = padded([prompt + answer for prompt, answer in rows], pad, model.device)
    labels = ids.masked_fill(mask == 0, -100)
    for index, (prompt, _) in enumerate(rows):
        labels[index, : len(prompt)] = -100
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())


class Gold:
    """A reward model: a scalar head on the last token of `[prompt | answer]`."""

    def __init__(self, model: Any, pad: int, bf16: bool, batch: int = 64) -> None:
        self.model, self.pad, self.bf16, self.batch = model, pad, bf16, batch

    @classmethod
    def untrained(cls, backbone: Any, pad: int, bf16: bool) -> Gold:
        """On a causal LM's decoder; the head starts at zero: no pair is preferred."""
        from transformers import AutoModelForSequenceClassification

        config = type(backbone.config)(**{**backbone.config.to_dict(), "num_labels": 1})
        config.pad_token_id = pad
        model: Any = AutoModelForSequenceClassification.from_config(config)
        model.model.load_state_dict(backbone.model.state_dict())
        torch.nn.init.zeros_(model.score.weight)
        return cls(model.to(backbone.device), pad, bf16)

    def rewards(self, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:  # (rows,) float32
        ids, mask = padded(
            [prompt + answer for prompt, answer in rows], self.pad, self.model.device
        )
        hidden = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        last = mask.sum(1) - 1  # not found by the padding's id: an answer may hold it
        return self.model.score(hidden[torch.arange(len(ids), device=ids.device), last]).float()[
            :, 0
        ]

    @torch.no_grad()
    def __call__(self, rows: Sequence[tuple[Ids, Ids]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), self.batch):
            with autocast(self.model.device, self.bf16):
                found += self.rewards(rows[start : start + self.batch]).tolist()
        return found

    def fit(self, pairs: Sequence[tuple[Ids, Ids, Ids]], **options: Any) -> None:
        """Bradley-Terry: `-log σ(r(chosen) - r(rejected))`."""

        def loss_of(numbers: list[int]) -> Tensor:
            chosen = [(pairs[n][0], pairs[n][1]) for n in numbers]
            rejected = [(pairs[n][0], pairs[n][2]) for n in numbers]
            first, second = self.rewards(chosen + rejected).chunk(2)
            return -F.logsigmoid(first - second).mean()

        train(self.model, loss_of, len(pairs), bf16=self.bf16, **options)


class LinearGold:
    """A logistic head on features of prompt and answer."""

    weight: Tensor  # (features,) float64

    def features(self, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:  # (rows, features) float64
        raise NotImplementedError

    def __call__(self, rows: Sequence[tuple[Ids, Ids]]) -> list[float]:
        return (self.features(rows) @ self.weight).tolist()

    def differences(self, pairs: Sequence[tuple[Ids, Ids, Ids]]) -> Tensor:
        chosen = self.features([(prompt, answer) for prompt, answer, _ in pairs])
        return chosen - self.features([(prompt, answer) for prompt, _, answer in pairs])

    def fit(self, pairs: Sequence[tuple[Ids, Ids, Ids]], penalty: float = 0.01) -> None:
        """Logistic regression on differences, `penalty·|w|²/2`."""
        self.weight = logistic(self.differences(pairs), penalty)


def logistic(x: Tensor, penalty: float) -> Tensor:  # (pairs, features) float64 -> (features,)
    """The w of the least mean `-log σ(x·w) + penalty·|w|²/2`, by Newton's method."""
    weight = x.new_zeros(x.shape[1])
    for _ in range(30):
        p = torch.sigmoid(-x @ weight)
        gradient = penalty * weight - x.T @ p / len(x)
        curvature = x.T @ (x * (p * (1 - p))[:, None]) / len(x)
        curvature += penalty * torch.eye(len(weight), dtype=torch.float64)
        move = torch.linalg.solve(curvature, gradient)
        weight = weight - move
        if move.norm() < 1e-8 * (1 + weight.norm()):
            break
    return weight


class BackboneGold(LinearGold):
    """A reward model of which the head alone is trained: on the mean hidden state of an answer.

    Args:
        decoder: of the policy's kind, its first layers (`first_layers`); nobody trains it.
        scale: (hidden,) what features are divided by; None: found by `fit`.
    """

    def __init__(
        self, decoder: Any, pad: int, bf16: bool, scale: Tensor | None = None, batch: int = 32
    ) -> None:
        self.decoder, self.pad, self.bf16, self.batch = decoder.eval(), pad, bf16, batch
        self.scale = torch.ones((), dtype=torch.float64) if scale is None else scale

    @torch.no_grad()
    def features(self, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:  # (rows, hidden) float64
        found = torch.zeros(len(rows), self.decoder.config.hidden_size, dtype=torch.float64)
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)  # little padding
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            device = self.decoder.device
            ids, mask = padded([rows[i][0] + rows[i][1] for i in part], self.pad, device)
            with autocast(device, self.bf16):
                states = self.decoder(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, i in enumerate(part):
                answer = states[row, len(rows[i][0]) : lengths[i]]
                found[i] = answer.double().mean(0) if len(answer) else 0.0
        return found / self.scale

    def fit(self, pairs: Sequence[tuple[Ids, Ids, Ids]], penalty: float = 0.1) -> None:
        x = self.differences(pairs)
        self.scale = len(x[0]) ** 0.5 * (x.std(0) + 1e-6)  # a norm of about 1
        self.weight = logistic(x / self.scale, penalty)


def first_layers(causal_lm: Any, count: int) -> Any:
    """A copy of a causal LM's decoder that ends with its layer `count`, not normalised."""
    decoder = copy.deepcopy(causal_lm.model)
    decoder.layers, decoder.norm = decoder.layers[:count], torch.nn.Identity()
    decoder.config.num_hidden_layers = len(decoder.layers)
    return decoder.requires_grad_(False)


class WordGold(LinearGold):
    """A gold of another kind: the mean of an answer's word embeddings, and a logistic head.

    The features of a pair are the difference of its answers' features: the embedding of an answer,
    and its product with that of the prompt. Embeddings are those of the PyPI package wordllama
    (MIT licence, 32,000 tokens of 256 numbers), read from its files: its code is never imported.
    """

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: of the policy, whose ids are turned to text.

        Raises:
            ValueError: wordllama is not installed.
        """
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        spec = importlib.util.find_spec("wordllama")
        folder = Path(spec.origin or "").parent if spec else Path()
        if spec is None or not all((folder / name).is_file() for name in _WORDS):
            raise ValueError(f"the second gold needs wordllama, which is missing: {_INSTALL_WORDS}")
        self.tokenizer = tokenizer
        self.embeddings = load_file(folder / _WORDS[0])["embedding.weight"].float()
        self.words = Tokenizer.from_file(str(folder / _WORDS[1]))
        self.weight = torch.zeros(2 * self.embeddings.shape[1], dtype=torch.float64)

    def _embedded(self, ids: Sequence[Ids]) -> Tensor:  # (rows, 256) float64
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        found = torch.zeros(len(texts), self.embeddings.shape[1], dtype=torch.float64)
        for index, each in enumerate(self.words.encode_batch(texts, add_special_tokens=False)):
            if each.ids:
                found[index] = self.embeddings[torch.tensor(each.ids)].double().mean(0)
        return F.normalize(found, dim=1)  # an empty answer is 0

    def features(self, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:  # (rows, 512) float64
        prompts, answers = (self._embedded([row[i] for row in rows]) for i in (0, 1))
        return torch.cat([answers, 16 * prompts * answers], 1)  # both of norm about 1


class TokenGold(LinearGold):
    """A gold of a third kind, that knows no meaning: which common tokens an answer has.

    Args:
        vocabulary: tokens of the policy.
        kept: those that have a weight: the ones that the most pairs have in one answer alone.
    """

    def __init__(self, vocabulary: int, kept: int = 512) -> None:
        self.kept = kept
        self.weight = torch.zeros(vocabulary, dtype=torch.float64)

    def features(self, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:  # (rows, vocabulary) float64
        found = torch.zeros(len(rows), len(self.weight), dtype=torch.float64)
        for index, (_, answer) in enumerate(rows):
            found[index, torch.tensor(answer, dtype=torch.long)] = 1
        return found

    def fit(self, pairs: Sequence[tuple[Ids, Ids, Ids]], penalty: float = 0.03) -> None:
        x = self.differences(pairs)
        common = self.common(x)
        self.weight[common] = logistic(x[:, common], penalty)

    def common(self, differences: Tensor) -> Tensor:
        """The ids of the tokens that have a weight."""
        return differences.abs().sum(0).topk(min(self.kept, len(self.weight))).indices


def accuracy(gold: Any, pairs: Sequence[tuple[Ids, Ids, Ids]]) -> float:
    """Share of pairs whose chosen answer has the larger reward; ties count half."""
    first = torch.tensor(gold([(p, c) for p, c, _ in pairs]))
    second = torch.tensor(gold([(p, r) for p, _, r in pairs]))
    return float(((first > second).double() + 0.5 * (first == second).double()).mean())


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[Ids], *, eos: int, pad: int, new_tokens: int, copies: int,
    batch: int, bf16: bool,
) -> list[list[Ids]]:  # fmt: skip
    """`copies` fresh answers to every prompt at temperature 1 from the whole vocabulary.

    torch's global generator is drawn from. An answer ends with `eos`, or where `new_tokens` end.
    """
    answers: list[list[Ids]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        ids, mask = padded(part, pad, model.device, left=True)
        with autocast(model.device, bf16):
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=copies,
                pad_token_id=pad, eos_token_id=eos,
            )  # fmt: skip
        found = [cut(each, eos) for each in out[:, ids.shape[1] :].tolist()]
        answers += [found[copies * i : copies * (i + 1)] for i in range(len(part))]
    return answers


def cut(ids: Ids, eos: int) -> Ids:
    """Up to and with the end of the turn."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids
