"""Loads shipped recipes and recipe files, applies overrides, and writes recipes back."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from colonnade.launcher.errors import Fault, RecipeError, UserError
from colonnade.launcher.recipe.load import dump_recipe, load_recipe, recipe_names
from colonnade.launcher.recipe.tables import Recipe
from colonnade.launcher.recipe.validate import validate
from colonnade.models.config import ModelConfig

Write = Callable[[str], Path]
Faults = Callable[..., list[Fault]]


# Shipped recipes


def test_the_names_of_the_shipped_recipes() -> None:
    large = {"llama-1b", "mixtral-8x1b", "mamba2-hybrid-8b", "ladder-1b"}
    tiny = {"tiny-dense", "tiny-mixture", "tiny-hybrid", "tiny-hybrid-mixture"}
    assert set(recipe_names()) == {"quickstart"} | large | tiny


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_on_several_world_sizes(name: str) -> None:
    for world_size in (None, 1, 2) if name == "quickstart" else (None, 8, 64):
        recipe = load_recipe(name, world_size=world_size)
        assert recipe.name == name
        assert validate(recipe, world_size) == []


def test_the_rows_of_the_shipped_recipes() -> None:
    hybrid = load_recipe("mamba2-hybrid-8b").model.symbols
    assert (len(hybrid), hybrid.count("M"), hybrid.count("-")) == (56, 24, 28)
    assert [i for i, s in enumerate(hybrid) if s == "*"] == [10, 22, 33, 45]
    assert load_recipe("llama-1b").model.symbols == "*-" * 16
    assert load_recipe("mixtral-8x1b").model.symbols == "*E" * 16
    ladder = load_recipe("ladder-1b")
    assert (ladder.model.symbols, ladder.model.residual) == ("*-" * 40, "ladder")
    assert ladder.train.global_batch * ladder.train.seq_len == 2**22  # 4.19 M tokens a step


# Faults


FIVE = """
[model]
hiden = 64
heads = "eight"
residual = "lader"
[optimizer]
lr = -1.0
[train]
global_batch = 12
"""


def test_five_faults_are_reported_at_once(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(FIVE), world_size=1)
    faults = {f.field: f for f in caught.value.faults}
    assert {field: f.value for field, f in faults.items()} == {
        "model.hiden": 64,
        "model.heads": "eight",
        "model.residual": "lader",
        "optimizer.lr": -1.0,
        "train.global_batch": 12,
    }
    assert len(caught.value.faults) == 5
    assert "model.hidden" in faults["model.hiden"].remedy
    assert "whole number of at least 1, without quotes" in faults["model.heads"].remedy
    assert "standard, ladder" in faults["model.residual"].remedy
    assert "mean ladder?" in faults["model.residual"].remedy
    assert "above 0" in faults["optimizer.lr"].remedy
    assert "8 or 16" in faults["train.global_batch"].remedy
    message = str(caught.value)
    assert all(f"{f.field} = {f.value!r}: {f.remedy}" in message for f in caught.value.faults)


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("train.steps=0", "whole number of at least 1"),
        ("train.steps=1e3", "such as 1000"),
        ("train.steps=true", "whole number of at least 1"),
        ("optimizer.beta1=1.0", "at least 0 and below 1"),
        ("optimizer.lr=nan", "finite number above 0"),
        ("optimizer.eps=inf", "finite number above 0"),
        ('optimizer.lr="1e-3"', "without quotes"),
        ("train.tensorboard=1", "true or false"),
        ("train.precision=bf61", "one of fp32, bf16, fp64; did you mean bf16?"),
        ("optimizer.name=sgd", "one of adamw"),
        ("name=a b", "letters, digits, `_`, `.` and `-`"),
        ("model=3", "a table, [model]"),
        ("data.sources=[]", "[[data.sources]]"),
        ("data.sources=[3]", "[[data.sources]]"),
        ('data.sources={format = "text"}', "[[data.sources]]"),
        ("data.sources.0.weight=0", "above 0"),
        ("model.full_attention=2", "whole numbers in brackets, such as [0, 2]"),
        ("model.full_attention=0,2", "whole numbers in brackets"),
        ('model.full_attention=["a"]', "whole numbers in brackets"),
        ("model.full_attention=[0.5]", "whole numbers in brackets"),
        ("model.full_attention=[true]", "whole numbers in brackets"),
        ("model.full_attention.0=a", "whole numbers in brackets"),
        ("model.mup_base=128", "a table, [model.mup_base], a whole number for each name"),
        ("model.mup_base=[128]", "a table, [model.mup_base]"),
        ("model.mup_base.hidden=wide", "whole number, without quotes"),
        ("model.mup_base.hidden=128.0", "such as 128"),
        ("model.mup_base={hidden = true}", "whole number"),
    ],
)
def test_the_remedy_for_a_wrong_value_says_what_is_allowed(
    faults: Faults, override: str, remedy: str
) -> None:
    (fault,) = faults(override)
    inside = ("data.sources.0", "model.full_attention.0", "model.mup_base.hidden")
    assert fault.field in (override.partition("=")[0], *inside)
    assert remedy in fault.remedy


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.kv_head", "model.kv_heads"),  # the same table
        ("model.seq_len", "train.seq_len"),  # another table
        ("optimizer.steps", "train.steps"),  # another table's name beats `eps`, which is near
        ("train.warm_up", "optimizer.warmup"),  # near a name in another table
        ("seed", "train.seed"),
        ("modle", "model"),
        ("data.sources.0.pth", "data.sources.0.path"),
        ("data.column", "data.sources.0.column"),
    ],
)
def test_the_remedy_for_an_unknown_field_is_the_nearest(
    faults: Faults, given: str, meant: str
) -> None:
    table, _, name = given.rpartition(".")
    header = {"": "", "data.sources.0": "[[data.sources]]"}.get(table, f"[{table}]")
    for found in (faults(text=f"{header}\n{name} = 3"), faults(f"{given}=3")):
        (fault,) = found
        assert (fault.field, fault.value) == (given, 3)
        assert fault.remedy.endswith(f"did you mean {meant}?")


def test_the_remedy_for_an_unknown_field_without_a_similar_one_lists_all(faults: Faults) -> None:
    (fault,) = faults("checkpoint.zzz=1")
    assert "[checkpoint] are every, minutes, keep" in fault.remedy
    (fault,) = faults(text="[trian]\nsteps = 4")
    assert (fault.field, fault.value) == ("trian", {"steps": 4})
    assert "did you mean train?" in fault.remedy


def test_rules_do_not_use_a_field_that_was_refused(faults: Faults) -> None:
    # With the default pattern `*-` in place of these, mamba_state would have no effect.
    for wrong in ("pattern = 7", 'patern = "M"'):
        (fault,) = faults(text=f"[model]\n{wrong}\nmamba_state = 16")
        assert "pattern" in fault.remedy or fault.field == "model.pattern"
    (fault,) = faults("model.pattern=*X", "model.mamba_state=16")
    assert fault.field == "model.pattern"
    (fault,) = faults("data.sources.0.format=txt", "data.sources.0.path=x")
    assert fault.field == "data.sources.0.format"
    found = faults(text='[[data.sources]]\nformat = 3\n[[data.sources]]\nformat = "jsonl"')
    assert [f.field for f in found] == ["data.sources.0.format", "data.sources.1.path"]


# Overrides


def test_overrides_replace_the_values_of_the_file(write: Write) -> None:
    path = write('[model]\nhidden = 64\n[[data.sources]]\nformat = "text"\npath = "a"\n')
    overrides = (
        "model.hidden=128",
        "model.pattern=*-",
        "train.precision=bf16",
        'optimizer.schedule="constant"',
        "optimizer.lr=2",
        "parallel.dp_shard=1",
        "train.deterministic=true",
        "data.sources.0.path=c:\\x y=1.txt",
        "data.sources.1.format=tokens",
        "data.sources.1.path=2024",
        "name=7",
    )
    recipe = load_recipe(path, overrides)
    assert (recipe.model.hidden, recipe.model.pattern) == (128, "*-")
    assert (recipe.train.precision, recipe.train.deterministic) == ("bf16", True)
    assert (recipe.optimizer.schedule, recipe.optimizer.lr) == ("constant", 2.0)
    assert [s.path for s in recipe.data.sources] == ["c:\\x y=1.txt", "2024"]
    assert (recipe.parallel.dp_shard, recipe.name) == (1, "7")


def test_an_override_without_a_value_removes_the_field(write: Write) -> None:
    path = write("[model]\nhidden = 64\n[[data.sources]]\n[[data.sources]]\nweight = 2.0\n")
    recipe = load_recipe(path, ("model.hidden=", "data.sources.0=", "data.sources.0.weight="))
    assert recipe == Recipe()


def test_overrides_of_lists_and_tables_of_numbers(write: Write) -> None:
    windowed = ("model.repeat=3", "model.window=8")
    base = ("model.heads=8", "model.mup_base.hidden=128", "model.mup_base.heads=4")
    model = load_recipe(write(""), (*windowed, *base, "model.full_attention=[0, 2]")).model
    assert (model.full_attention, model.mup_base) == ((0, 2), {"hidden": 128, "heads": 4})
    path = write("[model]\nwindow = 8\nrepeat = 3\nfull_attention = [1, 2]\n"
                 "[model.mup_base]\nhidden = 64\nffn = 8\n")  # fmt: skip
    changed = ("model.full_attention.0=0", "model.mup_base.hidden=128", "model.mup_base.ffn=")
    model = load_recipe(path, changed).model
    assert (model.full_attention, model.mup_base) == ((0, 2), {"hidden": 128})
    model = load_recipe(path, ("model.full_attention.1=", "model.mup_base=")).model
    assert (model.full_attention, model.mup_base) == ((1,), None)
    assert load_recipe(write(""), ("model.mup_base.hidden=", "model.full_attention.0=")) == Recipe()


@pytest.mark.parametrize(
    ("override", "field", "words"),
    [
        ("train.steps", "override", "table.field=value"),
        ("=3", "override", "table.field=value"),
        ("train..steps=3", "override", "table.field=value"),
        ("train.steps.x=3", "train.steps.x", "train.steps"),
        ("data.sources.x.path=a", "data.sources.x.path", "data.sources"),
        ("data.sources.4.path=a", "data.sources.4.path", "1"),
        ("model.full_attention.1=3", "model.full_attention.1", "there are 0 entries"),
        ("model.full_attention.x=3", "model.full_attention.x", "model.full_attention"),
        ("model.mup_base.hidden.x=3", "model.mup_base.hidden.x", "model.mup_base.hidden"),
        ("model.exprts=", "model.exprts", "model.experts"),
        ("model.exprts.1=2", "model.exprts.1", "model.experts"),
    ],
)
def test_a_wrong_override_is_a_fault(faults: Faults, override: str, field: str, words: str) -> None:
    (fault,) = faults(override)
    assert fault.field == field
    assert words in fault.remedy


# Settings of the file that overrides leave unused


@pytest.mark.parametrize(
    ("pattern", "unused"),
    [
        ("*-*-", "experts top_k expert_ffn mamba_head_dim mamba_state mamba_chunk"),
        ("M-M-", "experts top_k expert_ffn heads kv_heads"),
        ("m-m-", "experts top_k expert_ffn heads kv_heads mamba_head_dim mamba_state mamba_chunk"),
        ("D-D-", "experts top_k expert_ffn heads kv_heads mamba_head_dim mamba_state mamba_chunk"),
        ("G-G-", "experts top_k expert_ffn heads kv_heads mamba_head_dim mamba_state mamba_chunk"),
        ("*E*E", "ffn mamba_head_dim mamba_state mamba_chunk"),
        ("*T*T", "top_k ffn mamba_head_dim mamba_state mamba_chunk"),
        ("M-*E", ""),
    ],
)
def test_quickstart_with_another_pattern(write: Write, pattern: str, unused: str) -> None:
    notified: list[str] = []
    recipe = load_recipe("quickstart", [f"model.pattern={pattern}"], 1, notified.append)
    fields = {f"model.{name}" for name in unused.split()}
    if fields:
        (line,) = notified
        start, _, names = line.partition(": ")
        assert start == "not used with these overrides"
        assert sorted(names.split(", ")) == sorted(fields)
    else:
        assert notified == []
    assert not {f"model.{f}" for f in recipe.model.model_fields_set} & fields
    assert recipe.model.hidden == load_recipe("quickstart").model.hidden  # the rest stays
    assert validate(recipe, 1) == []
    assert load_recipe(write(dump_recipe(recipe)), notify=notified.append) == recipe
    assert not fields & {f"model.{f}" for f in tomllib.loads(dump_recipe(recipe))["model"]}
    assert len(notified) == bool(fields)


def test_an_unused_override_is_a_fault(faults: Faults) -> None:
    text = '[model]\npattern = "*-E"\nheads = 8\nkv_heads = 2\nexperts = 4\n'
    assert faults("model.pattern=-", text=text) == []
    (fault,) = faults("model.pattern=-", "model.kv_heads=4", text=text)
    assert fault.field == "model.kv_heads"
    assert "without attention" in fault.remedy
    table = 'model={pattern = "-", heads = 4}'
    assert [f.field for f in faults(table, text=text)] == ["model.heads"]
    assert faults("model.pattern=-", "model.kv_heads=4", "model.kv_heads=", text=text) == []


def test_a_setting_that_is_unused_in_the_file_itself_is_a_fault(faults: Faults) -> None:
    text = '[model]\npattern = "*-"\nheads = 8\nmamba_state = 16\n'
    for overrides in ((), ("train.steps=3",), ("model.pattern=-",)):
        (fault,) = faults(*overrides, text=text)
        assert (fault.field, fault.value) == ("model.mamba_state", 16)
    assert faults("model.pattern=*M", text=text) == []


def test_removing_unused_settings_in_other_tables_and_in_several_steps(write: Write) -> None:
    notified: list[str] = []
    path = write(
        '[optimizer]\nmin_lr = 1e-4\n[[data.sources]]\nformat = "jsonl"\npath = "a"\n'
        'column = "c"\nweight = 2.0\n[[data.sources]]\n'
        "[model]\nwindow = 8\nrepeat = 2\nfull_attention = [1]\nmup_base = {hidden = 64, heads = 2}"
    )
    overrides = ("optimizer.schedule=constant", "data.sources.0.format=stdlib", "data.sources.1=")
    recipe = load_recipe(path, (*overrides, "model.pattern=-"), notify=notified.append)
    removed = "model.window, model.full_attention, model.mup_base.heads, optimizer.min_lr"
    removed += ", data.sources.0.path, data.sources.0.column, data.sources.0.weight"
    (line,) = notified
    assert sorted(line.partition(": ")[2].split(", ")) == sorted(removed.split(", "))
    assert recipe.model.mup_base == {"hidden": 64}
    assert recipe.data == Recipe().data


def test_an_invalid_recipe_notifies_of_nothing(write: Write) -> None:
    notified: list[str] = []
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", ("model.pattern=*-", "train.steps=0"), 1, notified.append)
    assert [f.field for f in caught.value.faults] == ["train.steps"]
    assert notified == []


# Files


def test_an_unreadable_recipe_is_a_user_error(tmp_path: Path, write: Write) -> None:
    with pytest.raises(UserError, match=r"did you mean quickstart\?.*ladder-1b, llama-1b"):
        load_recipe("quikstart")
    with pytest.raises(UserError, match="no such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)"):
        load_recipe(write("") / "x.toml")
    with pytest.raises(UserError, match=r"not valid TOML.*line 2"):
        load_recipe(write("[train]\nprecision = bf16\n"))
    write("").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(tmp_path / "recipe.toml")


def test_a_file_from_windows(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes("\ufeff[train]\r\nsteps = 3\r\n".encode())
    assert load_recipe(str(path)).train.steps == 3


# Writing


ESCAPED = 'a "b" \\c\td\x7f\x01é漢😀 #[x]\n'


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optimizer.eps=1e-08", "optimizer.lr=1e300", "optimizer.weight_decay=0"),
        ("optimizer.schedule=wsd", "optimizer.decay=7", "model.pattern=M", "parallel.dp_shard=2"),
        ("data.sources.0.format=hub", "data.sources.0.path=a/b", "data.sources.0.prompt=q",
         "data.sources.0.weight=0.25", "data.sources.1.format=stdlib"),
        ("model.repeat=4", "model.window=8", "model.full_attention=[1, 3]"),
        ("model.mup_base={hidden = 128, heads = 2}", "model.mup_zero_init=true"),
    ],
)  # fmt: skip
def test_a_recipe_survives_writing_and_reading(write: Write, overrides: tuple[str, ...]) -> None:
    recipe = load_recipe(write(""), overrides)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_survive_writing(write: Write, name: str) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_how_lists_and_tables_of_numbers_are_written(write: Write) -> None:
    fields = {"repeat": 4, "window": 8, "full_attention": [1, 3], "mup_base": {"hidden": 128}}
    text = dump_recipe(Recipe.model_validate({"model": fields}))
    assert "full_attention = [1, 3]\n" in text
    assert tomllib.loads(text)["model"]["mup_base"] == {"hidden": 128}
    assert load_recipe(write(text)).model.model_dump() == ModelConfig(**fields).model_dump()
    base = {'a "b".c': 3, "hidden": 8, "heads": 2}  # heads: of no attention
    odd = Recipe.model_validate({"model": {"pattern": "-", "mup_base": base}})
    written = tomllib.loads(dump_recipe(odd))["model"]["mup_base"]
    assert written == {'a "b".c': 3, "hidden": 8}


def test_text_survives_writing(write: Write) -> None:
    source = {"format": "jsonl", "path": ESCAPED, "column": ESCAPED}
    recipe = Recipe.model_validate({"data": {"sources": [source, source], "tokenizer": ESCAPED}})
    assert load_recipe(write(dump_recipe(recipe))) == recipe


def test_a_written_recipe_holds_all_used_settings_and_no_others() -> None:
    written = tomllib.loads(dump_recipe(load_recipe("quickstart", ["model.positions=none"])))
    assert written["optimizer"]["beta2"] == 0.95  # a default that is used
    assert written["data"]["sources"] == [{"format": "stdlib"}]
    assert "decay" not in written["optimizer"]
    assert "rope_theta" not in written["model"]
    assert "dp_shard" not in written["parallel"]
    everything = Recipe().model_dump()
    assert set(written) == set(everything)
    assert all(set(written[t]) <= set(everything[t]) for t in written if t != "name")
