"""Log-likelihoods and completions as tasks ask for them equal transformers', text by text."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import oracle
import pytest
import torch
from equal import assert_equal
from ranks import Ranks
from test_evaluate import EVEN
from trained import byte_tokenizer, llama_folder, run_folder
from transformers import AutoTokenizer

from colonnade.launcher.cli import main
from colonnade.launcher.data.tokenizer import ByteTokenizer
from colonnade.launcher.errors import UserError
from colonnade.launcher.evaluate import tasks
from colonnade.launcher.evaluate.scoring import (
    Request,
    complete,
    encode_pair,
    has_stop,
    score,
    score_texts,
    windows,
)
from colonnade.launcher.generate.opening import Trained, load, opened, recipe_for
from colonnade.parallel.world import World

PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is ", "Rome, I think"),
    ("", "no context"),
    ("x", "y"),
    ("a context that is longer than all that the model sees, which is " * 2, " four"),
    ("short", " and a continuation that is longer than the model sees: " * 2),
    ("Ω", "≈ç√"),
]


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Any, Any]:
    """A folder, and what transformers reads from it."""
    model = llama_folder(tmp_path / "hf")
    byte_tokenizer(tmp_path / "hf")
    return tmp_path / "hf", model, AutoTokenizer.from_pretrained(tmp_path / "hf")


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    with oracle.fp64(), torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_scores_are_those_of_transformers(llama: tuple[Path, Any, Any]) -> None:
    folder, model, theirs = llama
    expected = []
    for context, continuation in PAIRS:
        whole = theirs.encode(context + continuation)
        count = len(theirs.encode(context.rstrip()))
        if not context:
            whole, count = [theirs.eos_token_id, *whole], 1
        seen = whole[-65:]  # the model sees 64 tokens, and is asked for the one behind them
        scored = min(len(whole) - count, 64)
        rows = log_probabilities(model, seen[:-1])[-scored:]
        chosen = torch.tensor(seen[-scored:])
        total = rows.gather(-1, chosen[:, None]).sum()
        expected.append((total.item(), bool((rows.argmax(-1) == chosen).all())))
    with opened(folder) as trained:
        assert trained.tokenizer is not None
        pairs = [encode_pair(trained.tokenizer, *pair) for pair in PAIRS]
        found = {batch: score(trained, pairs, batch) for batch in (1, 3, 8)}
    for scores in found.values():
        assert [s.greedy for s in scores] == [greedy for _, greedy in expected]
        assert_equal(
            {str(i): torch.tensor(s.log_likelihood).double() for i, s in enumerate(scores)},
            {str(i): torch.tensor(total).double() for i, (total, _) in enumerate(expected)},
        )


def test_a_greedy_continuation_is_found(llama: tuple[Path, Any, Any]) -> None:
    folder, model, theirs = llama
    ids = torch.tensor([theirs.encode("greedy")])
    with oracle.fp64():
        following = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    tokens = following[0, ids.shape[1] :].tolist()
    with opened(folder) as trained:
        pairs = [(ids[0].tolist(), tokens), (ids[0].tolist(), [*tokens[:-1], tokens[-1] ^ 1])]
        assert [scored.greedy for scored in score(trained, pairs)] == [True, False]


def test_windows_score_each_token_once_with_the_longest_context() -> None:
    tokens = list(range(10))
    assert list(windows(tokens, 99, 4)) == [
        ([99], [0, 1, 2, 3]),
        ([3], [4, 5, 6, 7]),
        ([5, 6, 7], [8, 9]),
    ]
    assert list(windows(tokens[:3], 99, 4)) == [([99], [0, 1, 2])]
    assert list(windows([], 99, 4)) == []


def test_whole_texts(llama: tuple[Path, Any, Any]) -> None:
    folder, model, theirs = llama
    texts = ["short", "a text that does not fit into what the model sees " * 4, ""]
    expected = []
    for text in texts:
        tokens, total = theirs.encode(text), 0.0
        for context, continuation in windows(tokens, theirs.eos_token_id, 64):
            rows = log_probabilities(model, (context + continuation)[:-1])[-len(continuation) :]
            total += rows.gather(-1, torch.tensor(continuation)[:, None]).sum().item()
        expected.append(total)
    with opened(folder) as trained:
        assert score_texts(trained, texts, 2) == pytest.approx(expected, rel=1e-9)


def test_completions_are_those_of_transformers(llama: tuple[Path, Any, Any]) -> None:
    """Up to a stop, which may be within a token's text or over several tokens."""
    folder, model, theirs = llama
    contexts = ["one", "a longer context", "x " * 50]
    free = []
    for context in contexts:
        ids = torch.tensor([theirs.encode(context)[-54:]])
        with oracle.fp64():
            out = model.generate(
                ids, max_new_tokens=10, do_sample=False, pad_token_id=0,
                eos_token_id=theirs.eos_token_id,
            )  # fmt: skip
        free.append(theirs.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    with opened(folder) as trained:
        options = {"max_gen_toks": 10, "until": [], "do_sample": False}
        found = complete(trained, [Request.of(c, options) for c in contexts], 2)
        assert found == free
        stop = free[0][2:4]
        options["until"] = [stop]
        found = complete(trained, [Request.of(c, options) for c in contexts], 3)
        assert found == [text.partition(stop)[0] for text in free]


@pytest.mark.parametrize(
    ("options", "temperature", "limit"),
    [
        ({}, 0.0, 256),
        ({"do_sample": True}, 1.0, 256),
        ({"temperature": 0.7, "max_new_tokens": 3}, 0.7, 3),
        ({"do_sample": False, "temperature": 0.7, "max_gen_toks": 5}, 0.0, 5),
    ],
)
def test_options_of_tasks(options: dict[str, Any], temperature: float, limit: int) -> None:
    request = Request.of("a", {**options, "until": "\n"})
    assert (request.sampling.temperature, request.limit) == (temperature, limit)
    assert request.until == ("\n",)


def test_faults_of_tasks(llama: tuple[Path, Any, Any]) -> None:
    with pytest.raises(UserError, match="generates with num_beams, which is not known"):
        Request.of("a", {"num_beams": 3})
    with (
        opened(llama[0]) as trained,
        pytest.raises(UserError, match="generates 64 tokens, and the model sees 64"),
    ):
        complete(trained, [Request.of("a", {"max_gen_toks": 64})])


def results_of(trained: Trained) -> list[Any]:
    assert trained.tokenizer is not None
    pairs = [encode_pair(trained.tokenizer, *pair) for pair in PAIRS[:4]]
    requests = [Request.of(context, {"max_gen_toks": 5}) for context, _ in PAIRS[:3]]
    texts = complete(trained, requests, 2)
    return [*score(trained, pairs, 3), *score_texts(trained, ["text " * 12], 2), *texts]


def results_as_rank(rank: int, size: int, model: Path, overrides: list[str]) -> list[Any]:
    world = World(rank, size, torch.device("cpu"))
    return results_of(load(model, recipe_for(model, overrides, size), world.device, world))


@pytest.mark.parametrize("overrides", [["parallel.tp=2"], ["parallel.pp=2"], []], ids=str)
def test_ranks_score_as_one_process(overrides: list[str], tmp_path: Path, ranks2: Ranks) -> None:
    run = run_folder(tmp_path / "run", "M*T-G*E", residual="ladder", **EVEN)
    with opened(run) as trained:
        expected = results_of(trained)
    for found in ranks2.run(results_as_rank, run, overrides):
        for one, other in zip(found, expected, strict=True):
            if isinstance(other, str):
                assert one == other
            else:
                assert one == pytest.approx(other, rel=1e-9)


def test_random_experts_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", "*T", **EVEN)
    with opened(run) as trained:
        pairs = [([1, 2, 3], [4, 5]), ([6, 7], [8]), ([9], [1, 2, 3, 4])]
        together, alone = score(trained, pairs, 8), score(trained, pairs, 1)
    for one, other in zip(together, alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-9)


def test_a_tokenizer_beyond_the_vocabulary_is_named(llama: tuple[Path, Any, Any]) -> None:
    with opened(llama[0]) as trained, pytest.raises(UserError, match="has the token 9999"):
        score(trained, [([1], [9999])])


def test_a_stop_ends_a_text() -> None:
    tokenizer = ByteTokenizer()
    assert has_stop(tokenizer, list(b"some text.\n"), ["\n"])
    assert not has_stop(tokenizer, list(b"some text."), ["\n"])
    assert not has_stop(tokenizer, list(b"some\ntext."), [])


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter over lm_eval's `LM`, or, where that is not installed, over what it calls of it.

    `python tests/harness.py` compares with lm_eval itself.
    """
    if importlib.util.find_spec("lm_eval") is None:

        class LM:
            def __init__(self) -> None:
                self.cache_hook = SimpleNamespace(add_partial=lambda *given: None)

        module = ModuleType("lm_eval.api.model")
        module.LM = LM  # type: ignore[attr-defined]
        for name in ("lm_eval", "lm_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    name = "colonnade.launcher.evaluate.harness"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name, None)


def test_the_adapter(llama: tuple[Path, Any, Any], harness: Any) -> None:
    with opened(llama[0]) as trained:
        model = harness.HarnessModel(trained, batch=3)
        recorded = []
        model.cache_hook.add_partial = lambda *given: recorded.append(given)
        pairs = [SimpleNamespace(args=pair) for pair in PAIRS]
        assert trained.tokenizer is not None
        expected = score(trained, [encode_pair(trained.tokenizer, *pair) for pair in PAIRS])
        found = model.loglikelihood(pairs)
        assert [greedy for _, greedy in found] == [scored.greedy for scored in expected]
        likelihoods = [scored.log_likelihood for scored in expected]
        assert [total for total, _ in found] == pytest.approx(likelihoods, rel=1e-9)
        assert len(recorded) == len(PAIRS)
        assert recorded[0][:2] == ("loglikelihood", PAIRS[0])
        texts = [SimpleNamespace(args=(text,)) for text in ("one", "another one")]
        expected_texts = score_texts(trained, ["one", "another one"])
        assert model.loglikelihood_rolling(texts) == pytest.approx(expected_texts)
        options = {"max_gen_toks": 4, "until": ["\n"]}
        asked = [SimpleNamespace(args=("one", options))]
        assert model.generate_until(asked) == complete(trained, [Request.of("one", options)])


def test_faults_of_the_command(
    llama: tuple[Path, Any, Any], monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder = str(llama[0])
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main(["eval", folder, "--tasks", "mine"]) == 2
    assert "pip install 'colonnade[eval]'" in capfd.readouterr().err
    assert main(["eval", folder, "--include-path", "x"]) == 2
    assert "--include-path is for --tasks" in capfd.readouterr().err
    assert main(["eval", folder, "data.txt", "--tasks", "mine"]) == 2
    assert "leave out 'data.txt'" in capfd.readouterr().err
    stand_in = ModuleType("lm_eval.tasks")
    stand_in.TaskManager = lambda include_path: SimpleNamespace(  # type: ignore[attr-defined]
        all_tasks=["hellaswag"]
    )
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", stand_in)
    assert main(["eval", folder, "--tasks", "helaswag"]) == 2
    assert "did you mean hellaswag?" in capfd.readouterr().err
    with pytest.raises(UserError, match="there is no such folder"):
        tasks.task_manager(tasks.Order(folder, ["hellaswag"], "nowhere"))
