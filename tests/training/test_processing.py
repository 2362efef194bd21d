"""Tokenizers, processors, padding tokens, and vision-language models on rows of text."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from tests.training.test_trl_parity import history, kto_rows, options, pair_rows, trl_classes
from tralign_fast import TRConfig, TRTrainer
from tralign_fast.data.packing import PreferenceCollator

TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
# as LLaVA's: it reads contents that are lists of parts, and no others
TEMPLATE = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{% for part in m['content'] %}"
    "{{ part['text'] }}{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def llava(tokenizer):
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    text = {"model_type": "llama", "vocab_size": len(tokenizer), **TEXT}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    return LlavaForConditionalGeneration(config)


def qwen(tokenizer):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 32,
        "out_hidden_size": 32, "fullatt_block_indexes": [0],
    }  # fmt: skip
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = {"vocab_size": len(tokenizer), "rope_parameters": rope, **tokens, **TEXT}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture
def processor(small_tokenizer):
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_tokens("<image>", special_tokens=True)
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(), tokenizer=tokenizer, chat_template=TEMPLATE,
        patch_size=8,
    )  # fmt: skip


def both(method, model, processing, tmp_path, rows, **extra):
    """TRL's trainer and ours of one vision-language model."""
    theirs_config, theirs_trainer = trl_classes(method)
    name = {"dpo": "sigmoid"}.get(method, method)
    theirs = theirs_trainer(
        copy.deepcopy(model), copy.deepcopy(model),
        theirs_config(**options(tmp_path / "trl", loss_type=name, **extra)),
        train_dataset=rows, processing_class=processing,
    )  # fmt: skip
    args = TRConfig(**options(tmp_path / "ours", loss_type=method, reference="resident", **extra))
    mine = TRTrainer(
        copy.deepcopy(model), args=args, train_dataset=rows, processing_class=processing
    )
    return theirs, mine


@pytest.mark.parametrize("make", [llava, qwen])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_vision_language_models_learn_from_text(make, method, small_tokenizer, tmp_path):
    rows = kto_rows() if method == "kto" else pair_rows()
    schedule = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2}
    model = make(small_tokenizer)
    theirs, mine = both(method, model, small_tokenizer, tmp_path, rows, **schedule)
    assert isinstance(mine.data_collator, PreferenceCollator)
    assert mine.data_collator.layout == "shared"
    losses = history(mine)
    assert losses == pytest.approx(history(theirs), rel=1e-4)
    assert len(set(losses)) > 2


@pytest.mark.parametrize("conversational", [True, False])
def test_a_processor_makes_trls_tokens(conversational, processor, tmp_path):
    rows = pair_rows(conversational=conversational)
    theirs, mine = both(
        "dpo", llava(processor.tokenizer), processor, tmp_path, rows, max_length=None
    )
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert mine.train_dataset[column][:] == theirs.train_dataset[column][:]
    assert mine.processing_class is processor
    assert history(mine) == pytest.approx(history(theirs), rel=1e-4)


def test_a_vision_language_model_by_name(processor, tmp_path):
    llava(processor.tokenizer).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = pair_rows(8, conversational=True)
    args = TRConfig(**options(tmp_path / "run", max_steps=2))
    trainer = TRTrainer(str(tmp_path / "model"), args=args, train_dataset=rows)
    assert type(trainer.model).__name__ == "LlavaForConditionalGeneration"
    assert type(trainer.processing_class).__name__ == "LlavaProcessor"
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "processor_config.json").is_file()
    assert trainer.evaluate(rows)["eval_loss"] > 0


def test_a_text_model_takes_a_processors_tokenizer(tiny_llama, processor, tmp_path):
    processor.tokenizer.chat_template = None
    tiny_llama.resize_token_embeddings(len(processor.tokenizer))
    args = TRConfig(**options(tmp_path, max_steps=1))
    trainer = TRTrainer(
        tiny_llama, args=args, train_dataset=pair_rows(8), processing_class=processor
    )
    assert trainer.processing_class is processor.tokenizer
    trainer.train()
    with pytest.raises(ValueError, match="processing_class: expected a tokenizer or a processor"):
        TRTrainer(tiny_llama, args=args, train_dataset=pair_rows(8), processing_class=3)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("vision", [True, False])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_images_are_refused_before_training(
    method, declared, vision, tiny_llama, small_tokenizer, tmp_path
):
    rows = list(kto_rows(4) if method == "kto" else pair_rows(4))
    text = {key: Value("bool" if key == "label" else "string") for key in rows[0]}
    if declared:
        given = Dataset.from_list(
            [{**row, "images": []} for row in rows], Features({**text, "images": List(Image())})
        )
    else:
        given = Dataset.from_list([{**row, "image": "cat.png"} for row in rows])
    model = llava(small_tokenizer) if vision else tiny_llama
    for held_out in (False, True):
        train = pair_rows(4) if held_out and method == "dpo" else kto_rows(4) if held_out else given
        with pytest.raises(ValueError, match=r"vision-related.*vision-language model") as error:
            TRTrainer(
                model, args=TRConfig(**options(tmp_path)), train_dataset=train,
                eval_dataset=given if held_out else None, processing_class=small_tokenizer,
            )  # fmt: skip
        assert "\n" not in str(error.value)
        assert "use_fast_logprobs" in str(error.value)
        assert ("eval" if held_out else "train") in str(error.value)


# --- the padding token ----------------------------------------------------------------------------


def test_pad_token_is_the_tokenizers(tiny_llama, small_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(small_tokenizer)
    args = TRConfig(**options(tmp_path, pad_token="<start>", packing=False))
    trainer = TRTrainer(
        tiny_llama, args=args, train_dataset=pair_rows(8), processing_class=tokenizer
    )
    assert tokenizer.pad_token == "<start>"
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert {*batch.input_ids[batch.attention_mask == 0].tolist()} == {tokenizer.bos_token_id}


def test_an_unknown_pad_token_is_refused(tiny_llama, small_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(small_tokenizer)
    args = TRConfig(**options(tmp_path, pad_token="<nowhere>"))
    with pytest.raises(ValueError, match="pad_token: expected a token of the vocabulary") as error:
        TRTrainer(tiny_llama, args=args, train_dataset=pair_rows(8), processing_class=tokenizer)
    assert "\n" not in str(error.value)
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == len(small_tokenizer)


def test_trls_trainer_reads_images_with_fast_logprobs(small_tokenizer, tmp_path):
    """What the refusal names."""
    import PIL.Image
    from transformers import CLIPImageProcessor, LlavaProcessor
    from trl import DPOConfig, DPOTrainer

    from tralign_fast.integrations.trl import use_fast_logprobs

    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.add_tokens("<image>", special_tokens=True)
    size = {"height": 16, "width": 16}
    template = TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] or '<image>' }}")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size), tokenizer=tokenizer,
        chat_template=template, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    model = llava(tokenizer)
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    rows = list(pair_rows(8, conversational=True))
    images = [PIL.Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 9)) for i in range(8)]
    given = Dataset.from_list([{**r, "images": [i]} for r, i in zip(rows, images, strict=True)])
    given = given.cast_column("images", List(Image()))
    losses = []
    for fast in (False, True):
        args = DPOConfig(**options(tmp_path / str(fast), max_length=None, max_steps=2))
        trainer = DPOTrainer(
            copy.deepcopy(model), copy.deepcopy(model), args, train_dataset=given,
            processing_class=processor,
        )  # fmt: skip
        if fast:
            use_fast_logprobs(trainer)
        losses.append(history(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(set(losses[0])) == 2
