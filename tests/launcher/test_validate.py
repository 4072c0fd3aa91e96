"""Validation: every rule reports its fault, and its remedy removes it."""

import random
from collections.abc import Callable

import pytest

from colonnade.launcher.errors import Fault
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import RULES, validate

Faults = Callable[..., list[Fault]]


# Rules: name, overrides, ranks, the reported field, an override from the remedy ({f}: that field)

RULE_CASES: list[tuple[str, str, int | None, str, str]] = [
    ("symbols", "model.pattern=*Z-", None, "model.pattern", "{f}=*-"),
    ("symbols", "model.mtp=1 model.mtp_pattern=Z", None, "model.mtp_pattern", "{f}=M"),
    ("row_length", f"model.pattern={'*-' * 4} model.repeat=4096", None,
     "model.repeat", "{f}=2048"),
    ("ladder_length", "model.residual=ladder model.ladder_last=3", None,
     "model.ladder_last", "{f}=2"),
    ("ladder_length", "model.residual=ladder model.ladder_last=3", None,
     "model.ladder_last", "{f}="),
    ("mtp_modules", "model.norm=pre_rms model.mtp=1", None, "model.mtp", "model.norm=layer"),
    ("mtp_modules", "model.mtp=1 model.mtp_pattern=*T", None,
     "model.mtp_pattern", "model.pattern=*T"),
    ("mup_conflicts", "model.mup_base.hidden=128 model.sigma_reparam=true", None,
     "model.sigma_reparam", "{f}=false"),
    ("mup_conflicts", "model.mup_base.hidden=128 model.mup_zero_init=true model.qk_norm=head",
     None, "model.mup_zero_init", "{f}=false"),
    ("mup_conflicts", "model.mup_base.hidden=128 model.attention_gate=head", None,
     "model.attention_gate", "{f}=channel"),
    ("centred_stream", "model.norm=pre_rms model.norm_position=both", None,
     "model.norm_position", "{f}=before"),
    ("centred_stream", "model.norm=pre_rms model.norm_position=after", None,
     "model.norm_position", "model.norm=layer"),
    ("centred_stream", "model.pattern=*-M model.norm=pre_rms model.norm_after=*", None,
     "model.norm_after", "{f}="),
    ("centred_stream", "model.pattern=*-M model.norm=pre_rms model.norm_after=*", None,
     "model.norm_after", "model.norm=layer"),
    ("norms_after", "model.pattern=*-M model.norm_after=-", None, "model.norm_after", "{f}=M"),
    ("norms_after", "model.pattern=*-M model.norm_after=MM", None, "model.norm_after", "{f}=M"),
    ("norms_after", "model.pattern=*-M model.norm_after=*D", None, "model.norm_after", "{f}="),
    ("norms_after", "model.norm_after=*", None, "model.norm_after", "{f}="),
    ("norm_bias", "model.norm=crms model.norm_bias=true", None,
     "model.norm_bias", "model.norm=pre_rms"),
    ("norm_bias", "model.norm=crms model.norm_bias=true", None,
     "model.norm_bias", "{f}=false"),
    ("mtp_length", "train.seq_len=4 model.mtp=4", None, "model.mtp", "{f}=3"),
    ("group_divisors", "model.heads=8 model.kv_heads=3", None, "model.kv_heads", "{f}=4"),
    ("group_divisors", "model.heads=4 model.kv_heads=8", None, "model.kv_heads", "{f}=4"),
    ("integer_quotients", "model.hidden=96 model.heads=5", None, "model.heads", "{f}=6"),
    ("integer_quotients", "model.attention=mla model.hidden=81 model.heads=5", None,
     "model.heads", "{f}=3"),
    ("gate_slices", "model.hidden=96 model.heads=5 model.head_dim=16 model.attention_gate=head",
     None, "model.heads", "{f}=6"),
    ("gate_slices", "model.hidden=96 model.heads=5 model.head_dim=16 model.attention_gate=head",
     None, "model.heads", "model.attention_gate=channel"),
    ("full_attention", "model.repeat=2 model.window=8 model.full_attention=[2]", None,
     "model.full_attention", "{f}=[1]"),
    ("full_attention", "model.repeat=2 model.window=8 model.full_attention=[-1]", None,
     "model.full_attention", "{f}=[0]"),
    ("full_attention", "model.repeat=2 model.window=8 model.full_attention=[1,1]", None,
     "model.full_attention", "{f}=[1]"),
    ("full_attention", "model.repeat=2 model.window=8 model.full_attention=[1,0]", None,
     "model.full_attention", "{f}=[0]"),
    ("full_attention", "model.pattern=- model.mtp=1 model.window=8 model.full_attention=[0]", None,
     "model.full_attention", "{f}="),
    ("unrotated", "model.repeat=2 model.unrotated=[2]", None, "model.unrotated", "{f}=[1]"),
    ("unrotated", "model.repeat=2 model.unrotated=[1,1]", None, "model.unrotated", "{f}=[1]"),
    ("unrotated", "model.repeat=2 model.unrotated=[1,0]", None, "model.unrotated", "{f}=[0]"),
    ("unrotated", "model.pattern=- model.mtp=1 model.unrotated=[0]", None,
     "model.unrotated", "{f}="),
    ("rotated_pairs", "model.head_dim=15", None, "model.head_dim", "{f}=16"),
    ("rotated_pairs", "model.hidden=12", None, "model.head_dim", "model.positions=none"),
    ("rotated_pairs", "model.rope_fraction=0.3", None, "model.rope_fraction", "{f}=0.3125"),
    ("rotated_pairs", "model.rope_fraction=0.001", None, "model.rope_fraction", "{f}=0.03125"),
    ("rotated_pairs", "model.head_dim=1 model.rope_fraction=0.3", None,
     "model.rope_fraction", "model.head_dim=8"),
    ("rotated_pairs", "model.attention=mla model.rope_dim=33", None, "model.rope_dim", "{f}=34"),
    ("rotated_pairs", "model.attention=mla model.rope_dim=33", None,
     "model.rope_dim", "model.positions=none"),
    *(
        ("rope_scaling", f"model.rope_scaling={kind}", None, "model.rope_factor", "{f}=2")
        for kind in ("linear", "ntk", "yarn", "llama3")
    ),
    ("rope_scaling", "model.rope_scaling=yarn", None,
     "model.rope_factor", "model.rope_scaling=none"),
    ("rope_scaling", "model.rope_scaling=ntk model.rope_factor=2 model.head_dim=2", None,
     "model.rope_scaling", "{f}=linear"),
    ("rope_scaling", "model.rope_scaling=yarn model.rope_factor=2 model.rope_theta=1", None,
     "model.rope_theta", "{f}=1.5"),
    ("rope_scaling", "model.rope_scaling=yarn model.rope_factor=2 model.window=8 "
     "model.window_rope_theta=1", None, "model.window_rope_theta", "{f}=1.5"),
    ("rope_scaling", "model.rope_scaling=yarn model.rope_factor=2 model.rope_slow=32", None,
     "model.rope_slow", "{f}=31"),
    ("rope_scaling", "model.rope_scaling=llama3 model.rope_factor=2 model.rope_high=0.5", None,
     "model.rope_low", "model.rope_high=4"),
    ("integer_quotients", "model.pattern=M model.mamba_head_dim=48", None,
     "model.mamba_head_dim", "{f}=32"),
    ("group_divisors", "model.pattern=M model.mamba_groups=3", None,
     "model.mamba_groups", "{f}=4"),
    ("group_divisors", "model.pattern=M model.mamba_heads=6 model.mamba_groups=4", None,
     "model.mamba_groups", "{f}=3"),
    ("integer_quotients", "model.pattern=D model.delta_key_dim=48", None,
     "model.delta_key_dim", "{f}=32"),
    ("integer_quotients", "model.pattern=D model.delta_key_dim=48", None,
     "model.delta_key_dim", "model.delta_heads=3"),
    ("group_divisors", "model.pattern=G model.delta_key_heads=3", None,
     "model.delta_key_heads", "{f}=2"),
    ("group_divisors",
     "model.mtp=1 model.mtp_pattern=G model.delta_heads=6 model.delta_key_heads=4",
     None, "model.delta_key_heads", "{f}=3"),
    ("routing", "model.pattern=E model.experts=4 model.top_k=5", None, "model.top_k", "{f}=4"),
    ("expert_groups", "model.pattern=E model.router_groups=3 model.router_top_groups=1", None,
     "model.router_groups", "{f}=4"),
    ("expert_groups", "model.pattern=E model.router_groups=8 model.router_top_groups=4 "
     "model.router_score=sigmoid", None, "model.router_groups", "{f}=4"),
    ("expert_groups", "model.pattern=E model.router_groups=4 model.router_top_groups=5", None,
     "model.router_top_groups", "{f}=4"),
    ("expert_groups", "model.pattern=E model.router_groups=4 model.router_top_groups=1 "
     "model.top_k=3", None, "model.router_top_groups", "{f}=2"),
    ("balance_groups", "model.pattern=E model.balance_samples=3", None,
     "model.balance_samples", "{f}=4"),
    ("balance_groups", "model.pattern=E model.balance=0 model.capacity=1 model.balance_samples=3",
     None, "model.balance_samples", "{f}=4"),
    ("balance_groups", "model.pattern=T model.balance_samples=3", None,
     "model.balance_samples", "{f}=8"),
    ("base_sizes", "model.mup_base={}", None, "model.mup_base", "{f}="),
    ("base_sizes", "model.mup_base={hidden=128,vocab=9}", None, "model.mup_base.vocab", "{f}="),
    ("base_sizes", "model.mup_base={hidden=128,hiden=9}", None, "model.mup_base.hiden", "{f}="),
    ("base_sizes", "model.mup_base={hidden=0}", None, "model.mup_base.hidden", "{f}=128"),
    ("base_sizes", "model.attention=mla model.mup_base={hidden=128,q_rank=8}", None,
     "model.mup_base.q_rank", "model.q_rank=16"),
    ("base_sizes", "model.pattern=E model.mup_base={hidden=128,shared_ffn=8}", None,
     "model.mup_base.shared_ffn", "{f}="),
    ("base_model", "model.mup_base={hidden=130}", None, "model.mup_base", "{f}.heads=5"),
    ("base_model", "model.attention=mla model.mup_base={rope_dim=1}", None,
     "model.mup_base", "{f}.rope_dim=2"),
    ("base_model", "model.pattern=D model.mup_base={hidden=100}", None,
     "model.mup_base", "{f}.hidden=128"),
    ("ranks", "train.global_batch=32 parallel.dp_replicate=3", 4,
     "parallel.dp_replicate", "{f}=2"),
    ("ranks", "train.global_batch=32 parallel.dp_replicate=8", 4,
     "parallel.dp_replicate", "{f}=4"),
    ("ranks", "parallel.dp_shard=2", 1, "parallel.dp_shard", "{f}=1"),
    ("ranks", "parallel.tp=8 model.heads=8 model.vocab=264", 4, "parallel.tp", "{f}=4"),
    ("ranks", "parallel.tp=2 model.vocab=264 parallel.dp_replicate=4", 4,
     "parallel.dp_replicate", "{f}=2"),
    ("ranks", "parallel.tp=2 model.vocab=264 parallel.dp_shard=4", 4,
     "parallel.dp_shard", "{f}=2"),
    ("ranks", "parallel.cp=3 train.seq_len=240", 4, "parallel.cp", "{f}=2"),
    ("ranks", "parallel.tp=2 model.vocab=264 parallel.cp=4", 4, "parallel.cp", "{f}=2"),
    ("ranks", "parallel.cp=2 parallel.dp_shard=4", 4, "parallel.dp_shard", "{f}=2"),
    ("stage_count", "parallel.pp=4 train.micro_batch=1", 4, "parallel.pp", "{f}=2"),
    ("stage_count", "parallel.pp=2 parallel.schedule=zbv", 2, "parallel.pp",
     "parallel.schedule=gpipe"),
    ("stage_count", "parallel.pp=2 model.repeat=2 parallel.schedule=bfs parallel.stages_per_rank=3",
     2, "parallel.stages_per_rank", "{f}=2"),
    ("stage_sizes", "parallel.pp=2 model.repeat=2 parallel.stages=[1,1]", None,
     "parallel.stages", "{f}=[2,2]"),
    ("stage_sizes", "parallel.pp=2 model.repeat=2 parallel.stages=[1,1,2]", None,
     "parallel.stages", "{f}="),
    ("micro_batches", "parallel.pp=2 train.global_batch=8", 2, "train.micro_batch", "{f}=4"),
    ("micro_batches", "parallel.pp=2 train.global_batch=8", 2,
     "train.micro_batch", "parallel.schedule=gpipe"),
    ("micro_batches", "parallel.pp=2 parallel.schedule=dualpipev model.repeat=2", 4,
     "train.micro_batch", "{f}=2"),
    ("micro_batches", "parallel.pp=2 parallel.schedule=zb1p train.global_batch=40", 2,
     "train.micro_batch", "{f}=10"),
    ("micro_batches", "parallel.pp=2 train.ramp_batch=8 train.ramp_steps=2", 2,
     "train.micro_batch", "{f}=4"),
    ("compiled_split", "parallel.pp=2 parallel.schedule=zb1p train.compile=true", 2,
     "train.compile", "{f}=false"),
    ("compiled_split", "parallel.pp=2 parallel.schedule=zb1p train.compile=true", 2,
     "train.compile", "parallel.schedule=1f1b"),
    ("capacity", "model.pattern=*E model.capacity=0.01", None, "model.capacity", "{f}=0.016"),
    ("expert_shards", "model.pattern=*E parallel.ep=3", None, "parallel.ep", "{f}=4"),
    ("expert_shards", "model.pattern=*T parallel.ep=16", None, "parallel.ep", "{f}=8"),
    ("expert_shards", "model.pattern=E parallel.etp=3", None, "parallel.etp", "{f}=4"),
    ("expert_ranks", "model.pattern=E parallel.ep=4", 2, "parallel.ep", "{f}=2"),
    ("expert_ranks", "model.pattern=E parallel.ep=2 parallel.dp_replicate=2", 2,
     "parallel.ep", "{f}=1"),
    ("expert_ranks", "model.pattern=E parallel.etp=4", 2, "parallel.etp", "{f}=2"),
    ("expert_ranks", "model.pattern=*E parallel.ep=4 parallel.etp=3 model.expert_ffn=12 "
     "train.global_batch=32", 4,
     "parallel.etp", "{f}=1"),
    ("expert_ranks", "model.pattern=E parallel.tp=2 parallel.ep=2 model.vocab=264", 2,
     "parallel.ep", "{f}=1"),
    ("expert_ranks", "model.pattern=E parallel.tp=2 parallel.ep=2 model.vocab=264", 2,
     "parallel.ep", "parallel.etp=1"),
    ("expert_ranks", "model.pattern=E parallel.ep=2 parallel.cp=3 train.seq_len=252 "
     "train.global_batch=16", 3, "parallel.ep", "{f}=1"),
    ("tensor_parallel", "parallel.tp=8 model.vocab=264", None, "parallel.tp", "{f}=4"),
    ("tensor_parallel", "parallel.tp=8 model.vocab=264", None, "parallel.tp", "model.heads=8"),
    ("tensor_parallel", "parallel.tp=2", None, "parallel.tp", "model.vocab=258"),
    ("tensor_parallel", "parallel.tp=2 model.vocab=264 model.pattern=*E model.expert_ffn=7", None,
     "parallel.tp", "parallel.etp=1"),
    ("tensor_parallel", "parallel.tp=4 model.pattern=M- model.vocab=264 model.mamba_groups=2 "
     "model.ffn=702", None, "parallel.tp", "{f}=2"),
    ("sequence_shards", "parallel.tp=2 model.vocab=264 train.seq_len=255", None,
     "train.seq_len", "{f}=254"),
    ("sequence_shards", "parallel.tp=2 model.vocab=264 train.seq_len=255", None,
     "train.seq_len", "parallel.sequence=false"),
    ("sequence_shards", "parallel.cp=4 train.seq_len=252", None, "train.seq_len", "{f}=248"),
    ("sequence_shards", "model.pattern=M- parallel.cp=3 parallel.zigzag=false", None,
     "train.seq_len", "{f}=255"),
    ("sequence_shards", "parallel.tp=4 parallel.cp=2 model.vocab=264 train.seq_len=252", None,
     "train.seq_len", "{f}=248"),
    ("sequence_shards", "parallel.tp=4 parallel.cp=2 model.vocab=264 train.seq_len=252", None,
     "train.seq_len", "parallel.sequence=false"),
    ("convolutions", "model.pattern=M- parallel.cp=8 train.seq_len=32", None,
     "train.seq_len", "{f}=48"),
    ("convolutions", "model.pattern=M- parallel.cp=8 train.seq_len=32", None,
     "train.seq_len", "parallel.cp=4"),
    ("convolutions", "model.pattern=m parallel.cp=2 parallel.zigzag=false train.seq_len=4", None,
     "train.seq_len", "{f}=6"),
    *(
        ("convolutions", f"{model} parallel.cp=2 train.seq_len=16", None, "train.seq_len", remedy)
        for model in ("model.attention_conv=6", "model.pattern=*G model.delta_conv=6",
                      "model.mtp=1 model.mtp_pattern=D model.delta_conv=6")
        for remedy in ("{f}=20", "parallel.cp=1")
    ),
    *(
        ("ulysses", f"{given} parallel.context=ulysses", None, "parallel.cp", remedy)
        for given, remedy in (
            ("parallel.cp=8", "{f}=4"),
            ("parallel.cp=8", "parallel.context=ring"),
            ("parallel.cp=8", "parallel.context=allgather"),
            ("parallel.cp=8", "parallel.context=ring+ulysses"),
            ("parallel.cp=8", "model.heads=8"),
            ("parallel.cp=8 model.attention=mla", "{f}=4"),
            ("parallel.cp=4 model.hidden=384 model.heads=12 model.kv_heads=6", "{f}=2"),
            ("parallel.cp=4 parallel.tp=2 model.vocab=264", "{f}=2"),
            ("parallel.cp=8 model.pattern=M- model.mtp=1", "{f}=4"),
        )
    ),
    *(
        ("ulysses_in_ring", f"{given} parallel.context=ring+ulysses", None, field, remedy)
        for given, field, remedy in (
            ("parallel.cp=2 model.hidden=96 model.heads=3", "parallel.context", "{f}=ring"),
            ("parallel.cp=4 model.hidden=96 model.heads=3", "parallel.context", "{f}=allgather"),
            ("parallel.cp=8 model.hidden=384 model.heads=12 model.kv_heads=6", "parallel.context",
             "parallel.ulysses=2"),
            ("parallel.cp=8 parallel.ulysses=3", "parallel.ulysses", "{f}=4"),
            ("parallel.cp=4 parallel.ulysses=4", "parallel.ulysses", "{f}=2"),
            ("parallel.cp=8 parallel.ulysses=4 model.hidden=192 model.heads=6", "parallel.ulysses",
             "{f}=2"),
        )
    ),
    *(
        ("recurrent_heads", f"{given} parallel.recurrence=heads", None, "parallel.cp", remedy)
        for given, remedy in (
            ("parallel.cp=16 model.pattern=M-", "{f}=8"),
            ("parallel.cp=16 model.pattern=M-", "parallel.recurrence=states"),
            ("parallel.cp=8 parallel.tp=2 model.pattern=M- model.vocab=264", "{f}=4"),
            ("parallel.cp=4 model.pattern=M- model.mamba_heads=12 model.mamba_groups=6", "{f}=2"),
            ("parallel.cp=4 model.pattern=m- model.mamba1_inner=66", "{f}=2"),
            ("parallel.cp=8 model.pattern=D", "{f}=4"),
            ("parallel.cp=8 model.mtp=1 model.mtp_pattern=D", "{f}=4"),
            ("parallel.cp=4 model.pattern=*G model.delta_heads=12 model.delta_key_heads=6",
             "{f}=2"),
            ("parallel.cp=2 model.pattern=D model.delta_heads=3", "parallel.recurrence=states"),
        )
    ),
    ("equal_work", "parallel.cp=2 parallel.zigzag=false", None, "parallel.zigzag", "{f}=true"),
    ("equal_work", "parallel.cp=2 parallel.zigzag=false", None,
     "parallel.zigzag", "parallel.context=ulysses"),
    ("batch", "train.global_batch=20", None, "train.global_batch", "{f}=24"),
    ("batch", "train.global_batch=40", 2, "train.global_batch", "{f}=48"),
    ("batch", "train.global_batch=40", 2, "train.global_batch", "train.micro_batch=10"),
    ("ramp", "train.ramp_steps=5", None, "train.ramp_batch", "train.ramp_steps=0"),
    ("ramp", "train.ramp_batch=8", None, "train.ramp_steps", "train.ramp_steps=5"),
    ("ramp", "train.global_batch=64 train.ramp_batch=24 train.ramp_steps=5", 1,
     "train.ramp_batch", "{f}=32"),
    ("ramp", "train.global_batch=64 train.ramp_batch=8 train.ramp_steps=5", 2,
     "train.ramp_batch", "{f}=16"),
    ("ramp", "train.ramp_batch=16 train.ramp_steps=5", 1, "train.ramp_batch", "{f}=8"),
    ("ramp_length", "train.steps=9 train.ramp_batch=8 train.ramp_steps=10", 1,
     "train.ramp_steps", "{f}=9"),
    ("checkpoints_to_go_back_to", "guard.spike=6", None, "guard.spike", "checkpoint.every=10"),
    ("checkpoints_to_go_back_to", "guard.spike=6", None, "guard.spike", "{f}=0"),
    ("checkpoints_before_what_is_skipped", "guard.spike=6 guard.skip=4 checkpoint.every=2", None,
     "guard.skip", "{f}=3"),
    ("checkpoints_before_what_is_skipped", "guard.spike=6 guard.skip=4 checkpoint.every=2", None,
     "guard.skip", "checkpoint.keep=3"),
    ("replay_compares_bits", "guard.replay_every=9", None, "guard.replay_every",
     "train.deterministic=true"),
    ("replay_needs_replicas", "guard.replay_every=9 train.deterministic=true parallel.tp=2 "
     "model.vocab=264", 2, "guard.replay_every", "{f}=0"),
    ("replay_needs_replicas", "guard.replay_every=9 train.deterministic=true parallel.ep=2 "
     "model.pattern=*E model.experts=4", 2, "guard.replay_every", "parallel.ep=1"),
    ("schedule", "train.steps=9 optimizer.warmup=10", None, "optimizer.warmup", "{f}=9"),
    ("schedule", "optimizer.schedule=wsd", None, "optimizer.decay", "{f}=100"),
    ("schedule", "optimizer.schedule=wsd optimizer.warmup=60 optimizer.decay=41", None,
     "optimizer.decay", "{f}=40"),
    ("offloaded_optimizer", "optimizer.name=muon optimizer.offload=host", None,
     "optimizer.offload", "optimizer.name=adamw"),
    ("mup_optimizer", "optimizer.name=muon model.mup_base.hidden=128", None,
     "optimizer.name", "{f}=adamw"),
    ("decayed_rate", "optimizer.lr=1e-3 optimizer.min_lr=2e-3", None,
     "optimizer.min_lr", "{f}=0.001"),
    ("offset", "model.norm=rms_offset model.norm_weight=false", None, "model.norm", "{f}=rms"),
    ("offset", "model.norm=rms_offset model.norm_weight=false", None, "model.norm",
     "model.norm_weight=true"),
    ("learned_positions", "model.learned_positions=16", None, "model.learned_positions",
     "{f}=256"),
    ("learned_positions", "model.learned_positions=16", None, "model.learned_positions",
     "train.seq_len=16"),
    ("learned_positions", "model.learned_positions=256 model.mtp=1", None, "model.mtp", "{f}=0"),
    ("frozen", "train.freeze=['blocks.0.qq']", None, "train.freeze", "{f}=['blocks.0.q']"),
    ("frozen", "train.freeze=['*']", None, "train.freeze", "{f}=['blocks.*']"),
    ("source_paths", "data.sources.0.format=jsonl", None, "data.sources.0.path", "{f}=a.jsonl"),
    ("vocabulary", "model.vocab=256", None, "model.vocab", "{f}=257"),
    ("vocabulary", "model.vocab=128256", None, "data.tokenizer", "{f}=bytes"),
    ("packing", "data.packing=whole data.sources.0.path=a data.sources.0.stream=true", None,
     "data.packing", "{f}=stream"),
    ("sampling", "data.sources.0.format=tokens data.sources.0.path=a model.vocab=1000 "
     "train.sample=9", None, "train.sample", "data.tokenizer=tokenizer.json"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "ranks", "field", "remedy"), RULE_CASES)
def test_a_rule(
    faults: Faults, name: str, overrides: str, ranks: int | None, field: str, remedy: str
) -> None:
    (fault,) = faults(*overrides.split(), world_size=ranks)
    assert fault.field == field
    remedy = remedy.format(f=field)
    assert remedy.partition("=")[0] in fault.remedy or field == remedy.partition("=")[0]
    assert faults(*overrides.split(), remedy, world_size=ranks) == []


def test_every_rule_has_a_case() -> None:
    assert {check.__name__ for _, check in RULES} == {case[0] for case in RULE_CASES}


@pytest.mark.parametrize(
    ("overrides", "ranks", "words"),
    [
        ("model.heads=8 model.kv_heads=3", None, "one of 1, 2, 4, 8"),
        ("model.pattern=*Z-Q", None, "`Z` at position 2, `Q` at position 4"),
        ("model.window=8 model.full_attention=[0,3,2]", None, "1 attentions, 0..0; take out 2, 3"),
        ("model.rope_fraction=0.3", None, "of 64 channels it rotates 19"),
        ("model.pattern=E model.router_groups=4 model.router_top_groups=1 model.top_k=3", None,
         "hold 1 x 2 = 2 experts"),
        ("model.mup_base={hidden=130}", None, "in the base model.heads = 4: model.hidden = 130"),
        ("parallel.dp_shard=3", 4, "(1, 4), (2, 2), (4, 1)"),
        ("parallel.tp=2 model.vocab=264 parallel.dp_shard=4", 4, "4 x 2 = 8, but there are 4"),
        ("parallel.tp=8 model.vocab=264", None,
         "does not divide model.heads = 4; set parallel.tp to one of 1, 2, 4"),
        ("parallel.tp=2 model.vocab=264 parallel.cp=2 parallel.dp_shard=4", 8,
         "dp_replicate x dp_shard x tp x cp = 1 x 4 x 2 x 2 = 16, but there are 8 ranks"),
        ("parallel.tp=2 model.vocab=264 parallel.cp=2 parallel.dp_replicate=3", 8,
         "the 2 groups of parallel.tp x parallel.cp = 2 x 2 ranks"),
        ("parallel.cp=4 train.seq_len=252", None,
         "4 ranks share it in 8 segments; set it to 248 or 256"),
        ("parallel.tp=4 parallel.cp=2 model.vocab=264 train.seq_len=252", None,
         "shards each rank's tokens over parallel.tp = 4 ranks; set it to 248 or 256, or"),
        ("model.pattern=M- parallel.cp=8 train.seq_len=32", None,
         "model.mamba_conv = 4 taps read 3 tokens of the segment before, and one of 16 segments "
         "has 2; set train.seq_len to at least 48, or parallel.cp to at most 4"),
        ("parallel.cp=8 parallel.context=ulysses", None,
         "does not divide model.heads = 4, and parallel.context = ulysses exchanges heads; set "
         "parallel.cp to one of 2, 4, or parallel.context to ring or allgather or ring+ulysses"),
        ("parallel.cp=4 parallel.tp=2 model.vocab=264 parallel.context=ulysses", None,
         "model.heads / parallel.tp = 4 / 2 = 2"),
        ("parallel.cp=3 train.seq_len=252 model.heads=12 model.hidden=384 train.micro_batch=1 "
         "parallel.context=ulysses model.kv_heads=2", 12, "set parallel.cp to one of 2, 4, 6, 12"),
        ("parallel.cp=4 model.heads=12 model.hidden=384 model.kv_heads=6 "
         "parallel.context=ulysses", 4, "model.kv_heads = 6, and parallel.context = ulysses "
         "exchanges heads; set parallel.cp to 2, or"),
        ("parallel.cp=3 train.seq_len=252 parallel.context=ring+ulysses", None,
         "a degree of 3 does not divide model.heads = 4; set parallel.context to ring or"),
        ("parallel.cp=8 parallel.context=ring+ulysses parallel.ulysses=3", None,
         "must divide parallel.cp = 8 and be less; set parallel.ulysses to one of 2, 4, or "
         "parallel.context to ring or allgather without parallel.ulysses"),
        ("parallel.cp=8 parallel.context=ulysses parallel.zigzag=false", None,
         "ring+ulysses with parallel.zigzag = true"),
        ("parallel.cp=2 parallel.zigzag=false model.hidden=96 model.heads=3", None,
         "more work in attention; set it to true"),
        ("train.global_batch=40", 2, "8 x 2 = 16; set train.global_batch to 32 or 48"),
    ],
)  # fmt: skip
def test_a_remedy_contains_the_numbers(
    faults: Faults, overrides: str, ranks: int | None, words: str
) -> None:
    (fault,) = faults(*overrides.split(), world_size=ranks)
    assert words in fault.remedy


@pytest.mark.parametrize(
    "overrides",
    [
        "model.pattern=D model.delta_key_dim=48 model.delta_heads=5",
        "model.attention=mla model.head_dim=15",  # its own channels are not rotated
        "model.positions=none model.head_dim=15",
        "model.head_dim=15 model.rope_fraction=0.4",
        "model.mtp=1 model.window=8 model.full_attention=[0]",  # the window is the module's
        "model.pattern=T model.top_k= train.global_batch=24 train.micro_batch=6",
        "model.pattern=E model.balance=0 model.router_z=0.1 train.micro_batch=1",
        "model.mup_base={hidden=64,ffn=176}",
        "parallel.cp=4",
        "parallel.cp=2 parallel.context=ring+ulysses",  # all of a prime degree
        "model.kv_heads=2 parallel.cp=4 parallel.context=ulysses",  # two ranks share a head
        "model.heads=6 model.hidden=192 parallel.cp=8 parallel.context=ring+ulysses",
        "parallel.cp=2 parallel.zigzag=false parallel.context=ulysses",
        "model.pattern=M- parallel.cp=2 parallel.zigzag=false",
        "model.attention=mla model.pattern=*- parallel.cp=4 train.seq_len=8",
        "model.pattern=M- parallel.cp=8 train.seq_len=48",
        "model.pattern=M- parallel.cp=8 parallel.recurrence=heads model.mamba_groups=2",
    ],
)
def test_recipes_that_the_rules_accept(faults: Faults, overrides: str) -> None:
    assert faults(*overrides.split()) == []


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ("model.heads=5 model.mup_base.hidden=128", "model.heads"),  # not of the base as well
        ("model.heads=5 model.hidden=81 model.attention_gate=head", "model.heads"),
        ("model.heads=5 model.hidden=81 model.attention=mla", "model.heads"),
        ("model.pattern=E model.experts=4 model.top_k=5 model.router_groups=2 "
         "model.router_top_groups=1", "model.top_k"),
        ("model.mup_base={hidden=128,q_rank=8}", "model.mup_base.q_rank"),
        ("model.pattern=*Z model.mup_base={hidden=128}", "model.pattern"),
    ],
)  # fmt: skip
def test_one_mistake_is_reported_once(faults: Faults, overrides: str, field: str) -> None:
    assert [fault.field for fault in faults(*overrides.split())] == [field]


def test_without_ranks_the_rules_about_them_are_skipped(faults: Faults) -> None:
    given = ("parallel.dp_replicate=3", "train.global_batch=8")
    assert faults(*given) == []
    assert {f.field for f in faults(*given, world_size=6)} == {"train.global_batch"}
    assert {f.field for f in faults(*given, world_size=4)} == {"parallel.dp_replicate"}


def test_layouts_and_batches_are_valid_exactly_when_they_divide() -> None:
    generator = random.Random(0)
    for _ in range(500):
        world, replicate, shard = (generator.choice((1, 2, 3, 4, 6, 8)) for _ in range(3))
        rows = generator.choice((4, 8, 12, 16, 24, 48))
        micro = generator.choice((1, 2, 3, 4))
        recipe = Recipe.model_validate(
            {
                "parallel": {
                    "dp_replicate": replicate,
                    "dp_shard": generator.choice((shard, None)),
                },
                "train": {"global_batch": rows, "micro_batch": micro},
            }
        )
        fixed = recipe.parallel.dp_shard
        fits = any(replicate * s == world for s in ([fixed] if fixed else range(1, world + 1)))
        divides = any(micro * (world if fits else 1) * n == rows for n in range(1, rows + 1))
        tables = {fault.field.partition(".")[0] for fault in validate(recipe, world)}
        expected = {"parallel"} if not fits else set()
        assert tables == expected | ({"train"} if not divides else set())
