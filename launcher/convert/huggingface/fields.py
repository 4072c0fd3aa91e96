"""Reads the fields of a Hugging Face config and refuses those that were not read."""

from collections.abc import Callable, Mapping
from typing import Any

REQUIRED: Any = object()
Notify = Callable[[str], object]  # is called with one sentence

# Fields of any config.json that do not alter the logits: they describe the folder, name special
# tokens, or set how transformers runs, trains, generates and classifies.
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
# Fields of features that a family lacks if it does not read them, and the values that switch the
# feature off. An empty tuple: no code of the family reads the field, whatever its value.
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
    """A config field or tensor that the target cannot represent: its name, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        """Pickles the exception by its arguments, so that processes can send it to each other."""
        return Unsupported, (self.field, self.value, self.remedy)


def silent(sentence: str) -> None:
    """Ignores a sentence."""


def same(value: object, known: object) -> bool:
    """Whether two JSON values are equal; unlike in Python, true is not 1."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


class Fields:
    """The fields of a Hugging Face config, each of which has to be read or known to be harmless.

    A null is read as transformers reads it: a null boolean is false, a null that stands for the
    default is the default; any other null is refused.

    Args:
        values: the config, or a table in it.
        prefix: is put before field names in errors.
        notify: is called with a sentence on fields that were accepted and are not used.
    """

    def __init__(
        self, values: Mapping[str, Any], prefix: str = "", notify: Notify = silent
    ) -> None:
        self.values, self.prefix, self.notify = values, prefix, notify
        self.read: set[str] = set()

    def get(self, *names: str, default: Any = REQUIRED, null: Any = REQUIRED) -> Any:
        """Returns the value under one of these names; all of them count as read.

        Args:
            names: alternative names of the field, whose values must not contradict each other.
            default: the value if the field is absent.
            null: the value that transformers uses for a null. Without it a null is refused, unless
                the default is null, too, or a boolean.

        Raises:
            Unsupported: the field is missing, a null that is refused, or given with two values.
        """
        self.read.update(names)
        given = [name for name in names if self.values.get(name) is not None]
        for name in given[1:]:
            if not same(self.values[name], self.values[given[0]]):
                remedy = f"but {given[0]} = {self.values[given[0]]!r}; remove one of both"
                raise Unsupported(self.prefix + name, self.values[name], remedy)
        if given:
            return self.values[given[0]]
        if default is REQUIRED and null is REQUIRED:
            raise Unsupported(self.prefix + names[0], None, "missing from config.json")
        if not any(name in self.values for name in names):
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
        """As `get`, for an integer of at least `least`."""
        value = self.get(*names, default=default, null=null)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            remedy = f"must be a whole number, at least {least}"
            raise Unsupported(self.prefix + names[0], value, remedy)
        return value

    def truth(self, *names: str, default: Any = REQUIRED) -> bool:
        """As `get`, for true or false."""
        value = self.get(*names, default=default)
        if not isinstance(value, bool):
            raise Unsupported(self.prefix + names[0], value, "must be true or false")
        return value

    def number(self, *names: str, default: Any = REQUIRED) -> float:
        """As `get`, for any number above 0."""
        value = self.get(*names, default=default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise Unsupported(self.prefix + names[0], value, "must be a number above 0")
        return value

    def entries(self, *names: str, of: type, default: Any = None) -> list[Any] | None:
        """As `get`, for a list whose entries have the type `of`; a null counts as absent."""
        value = self.get(*names, default=default, null=default)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(type(entry) is of for entry in value):
            raise Unsupported(self.prefix + names[0], value, f"must be a list of {of.__name__}")
        return list(value)

    def table(self, name: str) -> dict[str, Any]:
        """As `get`, for a table; an absent one and a null are an empty table."""
        value = self.get(name, default={}, null={})
        if not isinstance(value, Mapping):
            raise Unsupported(self.prefix + name, value, "must be a table of fields")
        return dict(value)

    def only(
        self, name: str, default: Any, *allowed: Any, null: Any = REQUIRED, remedy: str = ""
    ) -> Any:
        """As `get`, for a field that must have the default or one of the allowed values."""
        value, known = self.get(name, default=default, null=null), (default, *allowed)
        if not any(same(value, k) for k in known):
            listed = " or ".join(repr(k) for k in known)
            remedy = remedy or f"only {listed} can be represented"
            raise Unsupported(self.prefix + name, value, remedy)
        return value

    def finish(self, harmless: frozenset[str] = frozenset(), inert: Inert | None = None) -> None:
        """Raises Unsupported if a field is neither read nor known to leave the model unchanged."""
        unused = []
        for name, value in self.values.items():
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
            self.notify(f"left out, for it alters nothing in this family: {', '.join(unused)}")
