"""A stranger's walk: the wheel alone in a fresh venv, from installing it to a merged model.

`python .ci/walk.py [FOLDER]` (or `make walk`) builds the wheel, installs it as the README says and
runs what README and quickstart show, on a tiny model. It ends at the first thing that fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the README's blocks are given, and nothing else
GIVEN = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("tiny")
tokenizer = AutoTokenizer.from_pretrained("tiny")
rows = load_dataset("json", data_files="rows.jsonl", split="train")
"""
BUILD = """
import json, torch
from tests.conftest import make_small_tokenizer, make_tiny_llama, words
tokenizer = make_small_tokenizer()
for name in ("tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"):
    make_tiny_llama(tokenizer).save_pretrained(name)
    tokenizer.save_pretrained(name)
generator = torch.Generator().manual_seed(0)
with open("rows.jsonl", "w") as file:
    for _ in range(64):
        row = {key: words(6, generator) for key in ("prompt", "chosen", "rejected")}
        print(json.dumps(row), file=file)
"""


class Walk:
    """A folder with a venv, in which commands are run as a newcomer runs them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = f"{self.bin}:{outside['PATH']}"
        self.env = {**outside, "PATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}

    def say(self, what: str) -> None:
        print(f"\n=== {what}", flush=True)

    def run(self, *command: str, code: int = 0, **more: str) -> str:
        """Runs a command; returns what it wrote."""
        print("$", " ".join(command)[:200], flush=True)
        started = time.time()
        out = subprocess.run(
            command, cwd=self.folder, env={**self.env, **more}, capture_output=True, text=True
        )
        text = out.stdout + out.stderr
        if out.returncode != code:
            raise SystemExit(f"{text[-6000:]}\nexit code {out.returncode}, expected {code}")
        print(f"  {time.time() - started:.0f} s")
        return text

    def pip(self, *arguments: str) -> None:
        constraints = str(ROOT / "constraints.txt")
        self.run("python", "-m", "pip", "install", "-q", "-c", constraints, *arguments)

    def refused(self, *command: str, says: str) -> None:
        """A mistake is one line, code 2, and no traceback."""
        text = self.run(*command, code=2)
        if says not in text or "Traceback" in text:
            raise SystemExit(f"expected {says!r}, got:\n{text}")


def install(walk: Walk) -> None:
    walk.say("the wheel, in a fresh venv")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(walk.folder / "venv")], check=True)
    walk.pip("build", "hatchling")
    walk.run("python", "-m", "build", "-n", "-w", "-o", str(walk.folder / "dist"), str(ROOT))
    (wheel,) = (walk.folder / "dist").glob("*.whl")

    walk.say("PyTorch alone")
    walk.pip(str(wheel))
    walk.run("tralign-fast", "--help")
    walk.run("python", "-c", "from tralign_fast import dpo_loss, linear_logprobs, ema_update_")
    walk.refused("tralign-fast", "train", says="pip install 'tralign-fast[train]'")

    walk.say("the extras")
    walk.pip(f"{wheel}[train,peft,trl,liger]", "pytest")  # the last for tests/conftest.py
    walk.run("python", "-c", BUILD, PYTHONPATH=str(ROOT))


def train_kill_resume(walk: Walk) -> None:
    walk.say("plan, train with LoRA, kill, resume")
    planned = walk.run(
        "tralign-fast", "plan", "--model", "tiny", "--gpu-memory", "24GiB", "--dataset",
        "rows.jsonl", "--lora_rank", "4", "--tokens", "256", "--json", "--no_alternatives",
    )  # fmt: skip
    command = json.loads(planned[planned.index("{") : planned.rindex("}") + 1])["command"]
    words = shlex.split(command.replace("\\\n", " "))
    words[words.index("--output_dir") + 1] = "planned"
    walk.run(*words, "--use_cpu", "true", "--max_steps", "2")
    train = [
        "tralign-fast", "train", "--model", "tiny", "--dataset", "rows.jsonl", "--use_cpu", "true",
        "--output_dir", "run", "--use_peft", "--lora_r", "4", "--per_device_train_batch_size", "2",
        "--max_steps", "400", "--save_steps", "10", "--ref_model_sync_steps", "5",
    ]  # fmt: skip
    print("$", " ".join(train), flush=True)
    process = subprocess.Popen(
        train, cwd=walk.folder, env=walk.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.time() + 300
    while not list((walk.folder / "run").glob("checkpoint-*")) and time.time() < deadline:
        if process.poll() is not None:
            raise SystemExit(process.stdout.read().decode() if process.stdout else "train ended")
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    walk.refused(*train, says="holds another run")
    newest = max(int(f.name.split("-")[1]) for f in (walk.folder / "run").glob("checkpoint-*"))
    again = [*train, "--resume"]
    again[again.index("--max_steps") + 1] = str(newest + 10)
    walk.run(*again)
    if not (walk.folder / "run" / "adapter_model.safetensors").is_file():
        raise SystemExit("the resumed run has left no adapter")
    walk.refused("tralign-fast", "train", "--modle", "tiny", says="did you mean --model?")
    walk.refused("tralign-fast", "plan", "--model", "no/model", says="--model no/model")


def verbs(walk: Walk) -> None:
    walk.say("report, eval, merge, generate, recipes, env")
    for name in ("report.html", "summary.json", "config.yaml", "README.md"):
        if not (walk.folder / "run" / name).is_file():
            raise SystemExit(f"the run has left no {name}")
    walk.run("tralign-fast", "report", "run", "planned")
    walk.run("tralign-fast", "eval", "run", "--dataset", "rows.jsonl", "--limit", "8")
    walk.run("tralign-fast", "merge", "run", "--output", "merged")
    words = ["--max_new_tokens", "4", "--prompt", "a"]
    walk.run("tralign-fast", "generate", "run", *words)
    walk.run("tralign-fast", "generate", "tiny", "merged", *words)
    walk.run("tralign-fast", "recipes", "ls")
    walk.run("tralign-fast", "env")
    walk.refused("tralign-fast", "report", "nowhere", says="nowhere")
    walk.refused("tralign-fast", "merge", "tiny", "--output", "again", says="no adapter")
    walk.refused("tralign-fast", "eval", "run", "--dataset", "none.jsonl", says="none.jsonl")


def readme(walk: Walk) -> None:
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S), 1
    ):
        walk.say(f"block {number} of the README")
        given = "" if number == 1 else GIVEN
        block = block.replace('DPOConfig("out")', 'DPOConfig("out", use_cpu=True)')  # as it says
        walk.run("python", "-c", given + block, CUDA_VISIBLE_DEVICES="")
        walk.run("rm", "-rf", "out")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        walk = Walk(folder)
        install(walk)
        train_kill_resume(walk)
        verbs(walk)
        readme(walk)
    print("\nThe walk has come to its end.")


if __name__ == "__main__":
    main()
