"""Compares `eval --tasks` with lm_eval's own adapter of transformers, on tasks in local files.

pip install 'colonnade[eval]'; python tests/harness.py

It is no test of the suite, whose environment lacks lm_eval and its 34 packages: there,
test_scoring.py compares the same functions with transformers.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS), str(TESTS / "models"), str(TESTS / "launcher")]
os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{generated}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path, generated: list[str]) -> None:
    """Writes 12 examples and three tasks; `generated` are right answers of the third."""
    records = []
    for number in range(12):
        records.append(
            {
                "question": f"What is {number} plus {number * 7 % 5}?" * (1 + number % 2),
                "choices": [f" {number}", " more than that", f" it is {number * 3}"],
                "answer": number % 3,
                "text": f"The number {number} is written in a text. " * (1 + number % 4),
                "generated": generated[number] if number % 2 and generated else "none",
            }
        )
    (folder / "choice.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for name, text in (("a", CHOICE), ("b", PERPLEXITY), ("c", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))


def compare(folder: Path) -> int:
    """Evaluates with both; returns 0 if all metrics are equal."""
    import oracle
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from trained import byte_tokenizer, llama_folder

    from colonnade.launcher.cli import main

    model, names = folder / "hf", ["local_choice", "local_perplexity", "local_generation"]
    llama_folder(model)
    byte_tokenizer(model)
    write_tasks(folder, [])
    report = folder / "report.json"
    command = ["eval", str(model), "--tasks", ",".join(names), "--include-path", str(folder)]

    def theirs(samples: bool = False) -> dict[str, Any]:
        with oracle.fp64():
            lm = HFLM(str(model), dtype=torch.float64, device="cpu", batch_size=3)
            return simple_evaluate(
                lm, tasks=names, task_manager=TaskManager(include_path=str(folder)),
                log_samples=samples,
            )  # fmt: skip

    answers = theirs(samples=True)["samples"]["local_generation"]
    answers.sort(key=lambda sample: sample["doc_id"])
    write_tasks(folder, [sample["resps"][0][0] for sample in answers])
    expected = theirs()["results"]
    assert 0 < expected["local_generation"]["exact_match,none"] < 1
    equal = True
    for options in ([], ["--nproc", "2"]):
        assert main([*command, "--json", str(report), *options]) == 0
        found = json.loads(report.read_text())["results"]
        for task in names:
            for metric, value in expected[task].items():
                if not isinstance(value, float):
                    continue
                ours = found[task][metric]
                same = abs(ours - value) <= 1e-9 * abs(value)
                equal = equal and same
                print(f"{task:<18}{metric:<26}{ours:<22.15g}{value:<22.15g}{same}  {options}")
    return 0 if equal else 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        sys.exit(compare(Path(name)))
