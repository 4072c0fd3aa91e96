"""Generates random valid recipes, each with a random valid layout, for `tests/fuzz.py`."""

from collections.abc import Iterator
from random import Random
from typing import Any

from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import validate
from colonnade.launcher.verify.cover import OPTIONS, factorisations, layouts_of
from colonnade.launcher.verify.layouts import Layout, write_layout
from colonnade.models.config import CARDS

# Values to draw for every field that changes the model's function or how a layout computes it.
MODEL: dict[str, tuple[Any, ...]] = {
    "repeat": (2, 3), "share": (True,), "residual": ("ladder", "ladder", "parallel"),
    "ladder_last": (0, 1, 2), "hidden": (16, 32, 48), "vocab": (40, 48, 64), "tied": (True,),
    "norm": ("rms_offset", "layer", "pre_rms", "crms"), "norm_bias": (True,),
    "norm_weight": (False,),
    "norm_position": ("after", "both"), "norm_after": ("*", "M", "G", "mS"),
    "norm_eps": (1e-6,), "sigma_reparam": (True,),
    "logit_cap": (15.0,), "logit_z": (1e-2,), "mtp": (1, 2), "mtp_weight": (1.0,),
    "mup_base": ({"hidden": 8}, {"hidden": 64}, {"ffn": 8}), "mup_zero_init": (True,),
    "attention": ("mla",), "heads": (2, 4, 8), "kv_heads": (1, 2), "head_dim": (4, 6, 8),
    "q_rank": (8,), "kv_rank": (8, 16), "rope_dim": (2, 4), "value_dim": (4, 6),
    "positions": ("none",), "rope_theta": (100.0,), "rope_fraction": (0.5,),
    "rope_scaling": ("linear", "ntk", "yarn", "llama3"), "rope_factor": (2.0, 4.0),
    "rope_original": (8,), "rope_mscale": (1.0,), "rope_mscale_all": (1.0,),
    "rope_attention_factor": (1.2,), "rope_truncate": (False,), "qk_norm": ("head", "full"),
    "embedding_multiplier": (3.0,), "residual_multiplier": (0.4,), "logit_multiplier": (0.5,),
    "attention_multiplier": (0.2,), "attention_bias": ("qkv", "all"), "mlp_bias": (True,),
    "learned_positions": (64,),
    "window": (1, 5), "full_attention": ((0,), (1,)),
    "window_rope_theta": (50.0,), "window_rope_scaled": (False,), "unrotated": ((0,), (1,)),
    "sinks": (True,),
    "attention_gate": ("head", "channel"), "attention_cap": (5.0,),
    "query_temperature": (0.3,), "query_temperature_length": (4,), "clip_low": (-0.1,),
    "clip_high": (1.1,), "position_temperature": (True,), "attention_conv": (2, 3),
    "ffn": (8, 16, 48),
    "activation": ("geglu", "geglu_tanh", "swiglu_clamped",
                   "gelu", "gelu_tanh", "relu", "relu2", "silu", "polyrelu", "polynorm"),
    "mamba_heads": (2, 4), "mamba_head_dim": (4, 8), "mamba_state": (4, 8), "mamba_groups": (1, 2),
    "mamba_conv": (2, 3), "mamba_chunk": (2, 4, 16), "mamba1_inner": (8, 16),
    "mamba1_state": (4,), "mamba1_rank": (1, 2), "mamba1_conv": (2, 3), 
    "mamba1_norm": ("plain", "weighted"), "mamba1_chunk": (2, 4, 16),
    "s4d_inner": (8, 16), "s4d_state": (4,), "s4d_chunk": (2, 4, 16),
    "delta_heads": (2, 4), "delta_key_heads": (1, 2), "delta_key_dim": (4, 8),
    "delta_value_dim": (4, 6), "delta_conv": (2, 3), "delta_chunk": (2, 4, 16),
    "delta_norm_eps": (1e-3,),
    "delta_negative": (True,), "experts": (2, 4), "top_k": (1, 2), "expert_ffn": (8, 16),
    "expert_bias": (True,), "router_offset": (True,),
    "shared_ffn": (8, 16), "shared_gate": (True,), "router_score": ("sigmoid",),
    "router_normalise": (False,), "router_scale": (2.0,), "router_groups": (2,),
    "router_top_groups": (1, 2), "router_bias": (True,), "router_bias_rate": (1e-2,),
    "router_noise": (0.1,), "capacity": (1.0, 1.5), "balance": (0.0, 0.1),
    "balance_sequence": (0.1,), "balance_samples": (2,), "router_z": (1e-2,),
    "thor_alpha": (0.0, 5.0),
}  # fmt: skip
# Values where none of the above is drawn: narrow, so that a step takes milliseconds.
NARROW: dict[str, Any] = {"hidden": 32, "ffn": 32, "mamba_head_dim": 8, "delta_key_dim": 8}
OPTIMIZER: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.0,), "clip": (0.0,), "beta1": (0.8,), "beta2": (0.99,),
}  # fmt: skip
TRAIN: dict[str, tuple[Any, ...]] = {"recompute": ("selective", "block")}
PARALLEL: dict[str, tuple[Any, ...]] = {
    "zigzag": (False,), "context": ("ulysses", "ring+ulysses", "allgather"),
    "recurrence": ("heads",),
}  # fmt: skip
LAYOUT = {name: OPTIONS[name] for name in ("etp", "sequence", "schedule")}
TOKENS = {"sources": ({"format": "tokens", "path": "none"},)}  # verify replaces the data


def random_recipe(seed: int, ranks: int, symbols: str = "") -> tuple[Recipe, Layout]:
    """Draws a recipe and a layout from the seed until they are valid on this number of ranks.

    The pattern has at least one of `symbols`, where there are any.
    """
    rng = Random(seed)
    while True:
        drawn = draw_recipe(rng, ranks, symbols)
        if drawn is not None:
            return drawn


def draw_recipe(rng: Random, ranks: int, symbols: str) -> tuple[Recipe, Layout] | None:
    """Draws a recipe and a layout; None where dropping drawn fields cannot make them valid."""
    pattern = "".join(rng.choices(list(CARDS), k=rng.randint(1, 5)))
    if symbols and not set(symbols) & set(pattern):
        return None
    model = Recipe.model_validate({"model": {"pattern": pattern, "experts": 4}})
    degrees = rng.choice(list(factorisations(ranks)))
    layout: Layout = rng.choice(list(layouts_of(model, degrees, LAYOUT)))
    given = {f"parallel.{name}": value for name, value in layout.items()}
    given |= {f"model.{name}": value for name, value in NARROW.items()}
    given |= {f"model.{name}": value for name, value in draw_fields(rng, MODEL, 0.4)}
    given |= {f"optimizer.{name}": value for name, value in draw_fields(rng, OPTIMIZER, 0.3)}
    given |= {f"train.{name}": value for name, value in draw_fields(rng, TRAIN, 0.3)}
    given |= {f"parallel.{name}": value for name, value in draw_fields(rng, PARALLEL, 0.5)}
    mtp_pattern = "".join(rng.choices(list(CARDS), k=rng.randint(1, 2)))
    given |= {"model.pattern": pattern, "model.mtp_pattern": mtp_pattern}
    given |= {"train.seed": rng.randrange(10_000), "train.seq_len": 64, "train.micro_batch": 4}
    if "train.recompute" in given and given["train.seed"] % 2:  # no further draw
        given["train.offload_inputs"] = True
    return drop_faults(given, layout, ranks)


def draw_fields(
    rng: Random, fields: dict[str, tuple[Any, ...]], probability: float
) -> Iterator[tuple[str, Any]]:
    """Draws each field with this probability, and one of its values."""
    for name, values in fields.items():
        if rng.random() < probability:
            yield name, rng.choice(values)


def drop_faults(given: dict[str, Any], layout: Layout, ranks: int) -> tuple[Recipe, Layout] | None:
    """Drops fields that faults name until none remain; None where one must not be dropped."""
    while True:
        tables: dict[str, Any] = {"data": TOKENS}
        for field, value in given.items():
            table, _, name = field.partition(".")
            tables.setdefault(table, {})[name] = value
        recipe = Recipe.model_validate(tables)
        faults = validate(recipe, ranks)
        if not faults:
            valid_layout = tables["parallel"]
            return recipe.model_copy(update={"parallel": type(recipe.parallel)()}), valid_layout
        faulty = {field for field in given for f in faults if f"{f.field}.".startswith(f"{field}.")}
        if not faulty or faulty & {f"parallel.{name}" for name in layout}:
            return None
        for field in faulty:
            del given[field]


def verify_arguments(recipe: Recipe, layout: Layout) -> str:
    """Formats a recipe and a layout as arguments of `colonnade verify`."""
    tables = recipe.model_dump(exclude_unset=True, exclude={"data", "parallel"})
    fields = [f"{t}.{name}={value}" for t, table in tables.items() for name, value in table.items()]
    return f"--layout {write_layout(layout)} {' '.join(fields)}"
