"""Reads Hugging Face's config fields so that none is overlooked."""

from collections.abc import Callable, Mapping
from typing import Any

REQUIRED: Any = object()
Tell = Callable[[str], object]  # gets one sentence

# Fields of any config.json that do not alter the function of tokens and weights: what the folder
# is, which tokens it marks, how transformers runs, trains, generates, classifies.
_HARMLESS = """
    architectures model_type _name_or_path name_or_path auto_map transformers_version _commit_hash
    torch_dtype dtype tokenizer_class prefix unsloth_version
    bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id
    decoder_start_token_id max_position_embeddings
    pretraining_tp return_dict output_hidden_states output_attentions torchscript tf_legacy_loss
    use_bfloat16 use_cache chunk_size_feed_forward attn_implementation _attn_implementation
    _attn_implementation_autoset _flash_attn_2_enabled experts_implementation
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux rescale_prenorm_residual
    is_decoder is_encoder_decoder tie_encoder_decoder
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups
    num_beams num_return_sequences output_scores remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p"""
HARMLESS = frozenset(_HARMLESS.split())
# Features that no family has which does not read these fields, and the values that say so. An
# empty tuple: whatever the value, nothing in the family reads it.
Inert = Mapping[str, tuple[Any, ...]]
INERT: Inert = {
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "use_sliding_window": (False,),
    "qkv_bias": (False,),
    "use_qk_norm": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "shared_expert_intermediate_size": (0,),
}
UNKNOWN = "an unknown field, which may alter the model; remove it if it does not"
FP8 = (
    "weights in 8 bits are not read; write a 16-bit folder with transformers and read that: "
    "AutoModelForCausalLM.from_pretrained(folder, dtype='bfloat16', "
    "quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(new)"
)
QUANTIZED = (
    "quantized weights are not read; fetch the model's unquantized folder, or write one with "
    "transformers: from_pretrained(folder, dtype='bfloat16').dequantize().save_pretrained(new)"
)


class Unsupported(ValueError):  # noqa: N818
    """A field or tensor that one side cannot represent: its name, its value, and the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Processes send it to each other: it is made anew from its parts."""
        return Unsupported, (self.field, self.value, self.remedy)


def silent(sentence: str) -> None:
    """Nobody is told."""


def same(value: object, known: object) -> bool:
    """Whether two values of JSON are equal, where true is not 1."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


class Fields:
    """Their config, of which every field must be read, or be known to alter nothing.

    A null that transformers takes for a value is that value: a null boolean is false, a null that
    stands for the default is the default; any other null is refused. `prefix` names the table in
    errors, `tell` gets a sentence on what was accepted and is not used.
    """

    def __init__(self, theirs: Mapping[str, Any], prefix: str = "", tell: Tell = silent) -> None:
        self.theirs, self.prefix, self.tell = theirs, prefix, tell
        self.read: set[str] = set()

    def get(self, *names: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """The value under one of these spellings; all of them count as read.

        Args:
            names: spellings, which must not contradict each other.
            default: what holds where none is given.
            null: what transformers takes a null for. By default none of it: a null is refused,
                unless the default is null, too, or a boolean.
        """
        self.read.update(names)
        given = [name for name in names if self.theirs.get(name) is not None]
        for name in given[1:]:
            if not same(self.theirs[name], self.theirs[given[0]]):
                remedy = f"but {given[0]} = {self.theirs[given[0]]!r}; remove one of both"
                raise Unsupported(self.prefix + name, self.theirs[name], remedy)
        if given:
            return self.theirs[given[0]]
        if default is REQUIRED and null is REQUIRED:
            raise Unsupported(self.prefix + names[0], None, "missing from config.json")
        if not any(name in self.theirs for name in names):
            if default is REQUIRED:
                raise Unsupported(self.prefix + names[0], None, "missing from config.json")
            return default
        if null is not REQUIRED:
            return null
        if default is None or isinstance(default, bool):
            return False if isinstance(default, bool) else None
        raise Unsupported(self.prefix + names[0], None, "null is no value of it; give one")

    def integer(
        self, *names: str, default: Any = REQUIRED, null: Any = REQUIRED, least: int = 0
    ) -> int:
        """As `get`, for a number that is counted with."""
        value = self.get(*names, default=default, null=null)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            remedy = f"must be a whole number, at least {least}"
            raise Unsupported(self.prefix + names[0], value, remedy)
        return value

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        """As `get`, for any number above 0."""
        value = self.get(*names, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise Unsupported(self.prefix + names[0], value, "must be a number above 0")
        return value

    def entries(self, *names: str, of: type, default: Any = None) -> list[Any] | None:
        """As `get`, for a list of `of`; a null counts as absent."""
        value = self.get(*names, default=default, null=default)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(type(entry) is of for entry in value):
            raise Unsupported(self.prefix + names[0], value, f"must be a list of {of.__name__}")
        return list(value)

    def table(self, name: str) -> dict[str, Any]:
        """As `get`, for a table; absent and null are an empty one."""
        value = self.get(name, default={}, null={})
        if not isinstance(value, Mapping):
            raise Unsupported(self.prefix + name, value, "must be a table of fields")
        return dict(value)

    def only(
        self, name: str, default: Any, *allowed: Any, null: Any = REQUIRED, remedy: str = ""
    ) -> Any:
        """A field that may have the default or one of these values; the value."""
        value, known = self.get(name, default=default, null=null), (default, *allowed)
        if not any(same(value, k) for k in known):
            listed = " or ".join(repr(k) for k in known)
            remedy = remedy or f"only {listed} can be represented"
            raise Unsupported(self.prefix + name, value, remedy)
        return value

    def finish(self, harmless: frozenset[str] = frozenset(), inert: Inert | None = None) -> None:
        """No field may be left that is neither read nor known to alter nothing."""
        unused = []
        for name, value in self.theirs.items():
            if name in self.read | harmless or value is None:
                continue
            if name == "quantization_config":
                method = value.get("quant_method") if isinstance(value, Mapping) else None
                raise Unsupported(name, value, FP8 if method == "fp8" else QUANTIZED)
            allowed = (inert or {}).get(name)
            if allowed is None:
                raise Unsupported(self.prefix + name, value, UNKNOWN)
            if allowed and not any(same(value, k) for k in allowed):
                listed = " or ".join(repr(k) for k in allowed)
                raise Unsupported(self.prefix + name, value, f"only {listed} can be represented")
            unused.append(f"{self.prefix}{name} = {value!r}")
        if unused:
            self.tell(f"left out, for it alters nothing in this family: {', '.join(unused)}")
