"""Trained models in folders, for tests that run them forward."""

import json
from pathlib import Path
from typing import Any

import oracle
import tokenizers
from small import config_of, model_of
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.launcher.checkpoint import Saver, step_folder
from colonnade.launcher.checkpoint.tensors import named_tensors
from colonnade.launcher.recipe.load import dump_recipe
from colonnade.launcher.recipe.tables import DataConfig, Recipe, TrainConfig
from colonnade.launcher.run_files import CHECKPOINTS, RECIPE

VOCAB = 260


def llama_folder(folder: Path, seed: int = 1) -> LlamaForCausalLM:
    """Saves a small Llama in fp64, whose tokens are bytes, as transformers does; returns it."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    with oracle.fp64():
        model = LlamaForCausalLM(config)
    oracle.randomise(model, seed)
    model.save_pretrained(folder)
    return model.eval()


def run_folder(folder: Path, pattern: str, seed: int = 1, train: Any = None, **fields: Any) -> Path:
    """Writes a run's folder with a checkpoint of a model with random weights; its tokens are bytes.

    `train` are fields of [train], besides fp64 on a CPU.
    """
    config = config_of(pattern, **{"vocab": VOCAB, **fields})
    table = {"precision": "fp64", "seq_len": 40, "device": "cpu", **(train or {})}
    recipe = Recipe(
        name="small",
        model=config,
        train=TrainConfig.model_validate(table),
        data=DataConfig(tokenizer="bytes"),
    )
    (folder / CHECKPOINTS).mkdir(parents=True)
    (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    with Saver(asynchronous=False) as saver:
        tensors = named_tensors(model_of(config, seed), None)
        saver.begin(step_folder(folder / CHECKPOINTS, 1), tensors, {"step": 1})
        saver.finish()
    return folder


def byte_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of bytes as Hugging Face has them, with a token for the end of a text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "</s>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
