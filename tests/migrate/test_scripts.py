"""Scripts of TRL as scripts of this library: their text, what is said of it, and their losses."""

from __future__ import annotations

import ast
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.test_trl_parity import kto_rows, pair_rows
from tralign_fast import TRDPOConfig, TRFrozenDPOConfig, TRFrozenKTOConfig, TRKTOConfig, cli
from tralign_fast.migrate.script import migrate_script

# text before -> text after
FORMS = {
    "from trl import DPOConfig, DPOTrainer\nt = DPOTrainer(m, args=DPOConfig('o'))  # why\n": (
        "from tralign_fast import TRDPOConfig, TRDPOTrainer\n"
        "t = TRDPOTrainer(m, args=TRDPOConfig('o', sync_ref_model=False))  # why\n"
    ),
    "from trl import KTOTrainer as T, KTOConfig as C, ModelConfig\nT(m, args=C())\n": (
        "from tralign_fast import TRKTOConfig as C, TRKTOTrainer as T\n"
        "from trl import ModelConfig\nT(m, args=C(sync_ref_model=False))\n"
    ),
    "import trl\na = trl.DPOConfig('o', beta=(0.1))\ntrl.DPOTrainer(m, args=a)\n": (
        "import tralign_fast\na = tralign_fast.TRDPOConfig('o', beta=(0.1), sync_ref_model=False)\n"
        "tralign_fast.TRDPOTrainer(m, args=a)\n"
    ),
    "import os, trl as t\na = t.trainer.DPOConfig(\n    'o',  # out\n    beta=1  # high\n)\n"
    "t.x\n": (
        "import tralign_fast\nimport os, trl as t\na = tralign_fast.TRDPOConfig(\n"
        "    'o',  # out\n    beta=1,  # high\n    sync_ref_model=False,\n)\nt.x\n"
    ),
    "from trl.trainer import dpo_config\nc = dpo_config.DPOConfig('o', sync_ref_model=True)\n": (
        "import tralign_fast\nc = tralign_fast.TRDPOConfig('o', sync_ref_model=True)\n"
    ),
    "from trl.trainer.kto_config import KTOConfig\nc = KTOConfig(\n    'o',\n)\n": (
        "from tralign_fast import TRKTOConfig\nc = TRKTOConfig(\n    'o',\n"
        "    sync_ref_model=False,\n)\n"
    ),
    "from trl import *\nt = DPOTrainer(m, args=DPOConfig(**o))\n": (
        "from trl import *\nfrom tralign_fast import TRDPOConfig, TRDPOTrainer\n"
        't = TRDPOTrainer(m, args=TRDPOConfig(**{"sync_ref_model": False, **o}))\n'
    ),
    "from trl import (\n    DPOConfig,\n    # kept\n    ModelConfig,\n    DPOTrainer,\n)\n"
    "P((DPOConfig, 1))\n": (
        "from tralign_fast import TRDPOTrainer, TRFrozenDPOConfig\nfrom trl import (\n"
        "    ModelConfig,\n)\nP((TRFrozenDPOConfig, 1))\n"
    ),
    "from trl import DPOConfig as D\nclass C(D):\n    x: int = 1\n"
    "def f(a: D): return isinstance(a, D)\n": (
        "from tralign_fast import TRFrozenDPOConfig as D\nclass C(D):\n    x: int = 1\n"
        "def f(a: D): return isinstance(a, D)\n"
    ),
    "from trl import DPOConfig\ndef f(a: DPOConfig | None) -> 'x':\n"
    "    return isinstance(a, (DPOConfig, int))\n": (
        "from tralign_fast import TRDPOConfig\ndef f(a: TRDPOConfig | None) -> 'x':\n"
        "    return isinstance(a, (TRDPOConfig, int))\n"
    ),
    "if 1: from trl import DPOTrainer\nDPOTrainer(m, train_dataset=r)\n": (
        "if 1: from tralign_fast import TRDPOTrainer, TRFrozenDPOConfig\n"
        'TRDPOTrainer(m, train_dataset=r, args=TRFrozenDPOConfig("tr-output"))\n'
    ),
    "try:\n    from trl import DPOTrainer\nexcept ImportError:\n    DPOTrainer = None\n": (
        "try:\n    from tralign_fast import TRDPOTrainer as DPOTrainer\n"
        "except ImportError:\n    DPOTrainer = None\n"
    ),
    "from trl import DPOTrainer\n__all__ = ['DPOTrainer']\n": (
        "from tralign_fast import TRDPOTrainer as DPOTrainer\n__all__ = ['DPOTrainer']\n"
    ),
    "from trl import DPOConfig\nc = DPOConfig('ä', max_prompt_length=3)\n": (
        "from tralign_fast import TRDPOConfig\nc = TRDPOConfig('ä', sync_ref_model=False)\n"
    ),
    "from trl import DPOConfig\nc = DPOConfig(\n    'o',\n    max_prompt_length=3,  # x\n"
    "    rpo_alpha=None,\n)\n": (
        "from tralign_fast import TRDPOConfig\nc = TRDPOConfig(\n    'o',\n"
        "    sync_ref_model=False,\n)\n"
    ),
    "from trl import DPOConfig, DPOTrainer\n"
    "DPOTrainer(m, None, a, tokenizer=t, data_collator=None)\n": (
        "from tralign_fast import TRDPOConfig, TRDPOTrainer\n"
        "TRDPOTrainer(m, None, a, processing_class=t)\n"
    ),
    "from trl import DPOConfig\r\nc = DPOConfig(\r\n    'o',\r\n)\r\n": (
        "from tralign_fast import TRDPOConfig\r\nc = TRDPOConfig(\r\n    'o',\r\n"
        "    sync_ref_model=False,\r\n)\r\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", FORMS)
def test_forms(text):
    done = migrate_script(text, "s.py", moving=False)
    assert done is not None
    assert done.text == FORMS[text]
    again = migrate_script(done.text, "s.py", moving=False)
    assert again is None, "a migrated script is one of ours"


@pytest.mark.parametrize("text", FORMS)
def test_moving(text):
    done = migrate_script(text, "s.py", moving=True)
    assert done is not None
    assert "Frozen" not in done.text
    assert done.text.count("sync_ref_model") == text.count("sync_ref_model")
    assert done.numbers[0].startswith("sync_ref_model: the reference moves")


def test_a_name_in_an_f_string():
    text = "from trl import DPOConfig\nprint(f'''\n{DPOConfig('o')}''')\n"
    done = migrate_script(text, "s.py", moving=True)
    assert done is not None
    tree = ast.parse(done.text)
    found = tree.body[0]
    assert isinstance(found, ast.ImportFrom)
    names = {alias.asname or alias.name for alias in found.names}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - {"print"}
    assert used <= names


# a line of a script -> what is said of it
SAID = {
    "DPOConfig('o', label_smoothing=0.1)": "other numbers: line 2: label_smoothing=0.1: dpo is c",
    "DPOConfig('o', label_smoothing=0.7)": "not kept: line 2: refused: label_smoothing: expected",
    "DPOConfig('o', betta=1)": "line 2: betta: TRConfig has no such option; beta is one",
    "DPOConfig('o', reference_free=True)": "line 2: reference_free: to be changed by hand; every",
    "DPOConfig('o', rpo_alpha=1.0)": 'rpo_alpha: to be changed by hand; write loss_type=["sigmoid"',
    "DPOConfig('o', max_prompt_length=5)": "line 2: max_prompt_length: left out; prompts are not",
    "DPOConfig('o', **o)": "not kept: line 2: options in a table are not looked into: **o",
    "DPOConfig('o', sync_ref_model=True)": "line 2: sync_ref_model=True: a reference in bf16",
    "DPOConfig('o', train_sampling_strategy='group_by_length')": "line 2: train_sampling_strategy:",
    "DPOConfig('o', gradient_release=True)": "refused: gradient_release",
    "DPOTrainer(m, compute_metrics=f)": "line 2: compute_metrics gets an EvalPrediction of rewards",
    "DPOTrainer(m, data_collator=f)": "line 2: data_collator: to be taken out by hand",
    "DPOTrainer(m, data_collator=DataCollatorForPreference(0))": "data_collator: left out",
    "DPOTrainer(m, beta=0.1)": "line 2: beta: to be changed by hand; it is an option of the config",
    "DPOTrainer(m, pefft_config=0)": "pefft_config: TRTrainer has no such keyword; peft_config is",
    "t = DPOTrainer(m, a); t.get_batch_logps(x)": "line 2: t.get_batch_logps: tralign_fast.logp",
    "class T(DPOTrainer):\n    def compute_loss(self): ...": "line 3: T.compute_loss overrides",
    "class T(DPOTrainer):\n    def get_batch_loss_metrics(self): ...": "entry of LOSSES",
    "class T(DPOTrainer): ...\nT(m)": "line 3: T gets no args, and its reference moves then",
    "DPOTrainer(AutoModelForImageTextToText)": "AutoModelForImageTextToText: rows of images are re",
    "getattr(trl, 'DPOTrainer')": "line 2: the word 'DPOTrainer' stays as it is",
    "from trl import SyncRefModelCallback": "line 2: SyncRefModelCallback: to be taken out by hand",
    "P(DPOConfig)": "other numbers: options of a command line keep TRL's names; --label_smoothing",
    "from trl import KTOTrainer": "other numbers: KTO, evaluation on a stream: the KL term pairs",
    "x = 1": "same numbers: losses, order of the rows, auxiliary loss of experts, num_tokens",
}  # fmt: skip


@pytest.mark.parametrize("line", SAID)
def test_what_is_said(line, tmp_path, capsys):
    script = tmp_path / "s.py"
    script.write_text(f"from trl import DPOConfig, DPOTrainer\n{line}\n")
    assert cli.main(["migrate", str(script)]) == 0
    said = capsys.readouterr().err
    assert SAID[line] in said
    if line != "x = 1":  # it is not said of every script
        script.write_text("from trl import DPOConfig, DPOTrainer\n")
        cli.main(["migrate", str(script)])
        assert SAID[line] not in capsys.readouterr().err


REFUSED = {
    "from trl import GRPOTrainer\n": "got GRPOTrainer (tralign_fast.integrations.trl.use_fast_log",
    "print(1)\n": "expected a script with TRL's DPOTrainer or KTOTrainer",
    "import os\nx = (\n": "line 2: '(' was never closed",
    "x = '\0'\n": "null bytes",
    "# -*- coding: nonsense -*-\n": "unknown encoding",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(text, tmp_path, refused):
    script = tmp_path / "s.py"
    script.write_text(text)
    (line,) = refused("migrate", str(script)).splitlines()
    assert line.startswith(f"tralign-fast: error: {script}")
    assert REFUSED[text] in line


def test_what_is_asked_for_in_vain(tmp_path, refused):
    script = tmp_path / "s.py"
    assert "No such file or directory; expected a script or a YAML" in refused(
        "migrate", str(script)
    )
    assert "expected a script (.py) or a YAML" in refused("migrate", "notes.txt")
    assert "nbconvert" in refused("migrate", "notes.ipynb")
    assert "arguments are required: file" in refused("migrate")
    script.write_text("from trl import DPOTrainer\n")
    both = refused("migrate", str(script), "--write", "--output", "x")
    assert "--output: not allowed with argument --write" in both
    assert "s.py is there; expected the name of a new" in refused(
        "migrate", str(script), "--output", str(script)
    )
    assert "cannot be written" in refused("migrate", str(script), "--output", str(tmp_path / "a/b"))
    Path(f"{script}.orig").write_text("")
    assert "s.py.orig is there from before" in refused("migrate", str(script), "--write")
    assert script.read_text() == "from trl import DPOTrainer\n"


def test_dry_run_write_and_output(tmp_path, capsys):
    before = "# coding: latin-1\nfrom trl import DPOTrainer  # caf\xe9\nDPOTrainer(m, a, b)".encode(
        "latin-1"
    )
    script, link = tmp_path / "s.py", tmp_path / "link.py"
    script.write_bytes(before)
    script.chmod(0o754)
    link.symlink_to(script)
    assert cli.main(["migrate", str(script)]) == 0
    assert script.read_bytes() == before
    assert "nothing is written" in capsys.readouterr().err
    assert cli.main(["migrate", str(script), "--output", str(tmp_path / "new.py")]) == 0
    diff = capsys.readouterr().out
    assert cli.main(["migrate", str(link), "--write"]) == 0
    after = before.replace(b"DPOTrainer", b"TRDPOTrainer").replace(b"trl", b"tralign_fast")
    assert script.read_bytes() == after == (tmp_path / "new.py").read_bytes()
    assert link.is_symlink()
    assert (tmp_path / "link.py.orig").read_bytes() == before
    assert script.stat().st_mode & 0o777 == 0o754
    capsys.readouterr()
    assert cli.main(["migrate", str(script)]) == 0
    seen = capsys.readouterr()
    assert (seen.out, "one of this library already" in seen.err) == ("", True)
    if shutil.which("patch"):  # the diff is one that other tools take
        script.write_bytes(before)
        latin = diff.encode("latin-1")
        subprocess.run(["patch", "-p0", str(script)], input=latin, check=True, capture_output=True)
        assert script.read_bytes() == after


def test_frozen_configs(tmp_path):
    for frozen, parent in ((TRFrozenDPOConfig, TRDPOConfig), (TRFrozenKTOConfig, TRKTOConfig)):
        args = frozen(str(tmp_path), use_cpu=True)
        assert isinstance(args, parent)
        assert args.trust_region.is_frozen
        assert args.loss_type == parent(str(tmp_path), use_cpu=True).loss_type
        assert not frozen(str(tmp_path), use_cpu=True, sync_ref_model=True).trust_region.is_frozen


# --- scripts of TRL -------------------------------------------------------------------------------


def run(script, argv, out, monkeypatch):
    """The losses that a script logs."""
    monkeypatch.setattr(sys, "argv", [str(script), *argv, "--output_dir", str(out)])
    monkeypatch.chdir(script.parent)
    runpy.run_path(str(script), run_name="__main__")
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    return [log[key] for log in state["log_history"] for key in ("loss", "eval_loss") if key in log]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dpo", ["--eval_strategy", "steps", "--eval_steps", "2"]),
        ("dpo", ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]),
        ("kto", ["--eval_strategy", "steps", "--eval_steps", "2"]),
        ("kto", ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]),
    ],
)
def test_scripts_of_trl_have_the_same_losses(
    name, arguments, tiny_llama, small_tokenizer, tmp_path, monkeypatch
):
    import trl.scripts

    tiny_llama.save_pretrained(tmp_path / "model")
    small_tokenizer.save_pretrained(tmp_path / "model")
    rows = kto_rows(16) if name == "kto" else pair_rows(16)
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        rows.to_json(tmp_path / "data" / f"{split}.jsonl")
    argv = [
        "--model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(tmp_path / "data"),
        "--max_steps", "3", "--report_to", "none", "--use_cpu", "--dtype", "float32", "--bf16",
        "false", "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4",
        "--learning_rate", "1e-2", "--logging_steps", "1", "--max_length", "64", *arguments,
    ]  # fmt: skip
    script = tmp_path / f"{name}.py"
    shutil.copy(Path(trl.scripts.__path__[0], f"{name}.py"), script)
    theirs = run(script, argv, tmp_path / "theirs", monkeypatch)
    assert cli.main(["migrate", str(script), "--write"]) == 0
    assert "Trainer, get_dataset" not in script.read_text()
    ours = run(script, argv, tmp_path / "ours", monkeypatch)
    assert len(ours) == len(theirs) == (5 if "--eval_strategy" in arguments else 3)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-5, rtol=0)
    assert ours[-1] != ours[0]
