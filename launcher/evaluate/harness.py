"""Our models behind the interface of lm-evaluation-harness, which must be installed.

    lm_eval.simple_evaluate(model=HarnessModel(trained), tasks=["hellaswag"])

Under ranks every rank makes the same calls and gets all results: for the harness there is one.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from colonnade.launcher.evaluate.scoring import (
    Request,
    complete,
    encode_pair,
    score,
    score_texts,
    tokenizer_of,
)
from colonnade.launcher.generate.opening import Trained


class HarnessModel(LM):
    """A trained model as lm-evaluation-harness sees it."""

    def __init__(self, trained: Trained, batch: int = 8, seed: int = 0) -> None:
        """`batch` texts go forward together; `seed` is that of drawn tokens."""
        super().__init__()
        self.trained, self.batch, self.seed = trained, batch, seed
        self.tokenizer = tokenizer_of(trained)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint, by which the harness caches requests."""
        return self.tokenizer.fingerprint

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Scores (context, continuation) pairs: log-likelihoods, and whether they are greedy."""
        pairs = [encode_pair(self.tokenizer, *request.args) for request in requests]
        scores = map(tuple, score(self.trained, pairs, self.batch))
        return self.recorded("loglikelihood", requests, scores)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts."""
        texts = [request.args[0] for request in requests]
        found = score_texts(self.trained, texts, self.batch)
        return self.recorded("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts up to a stop."""
        asked = (request.args for request in requests)
        wanted = [Request.of(context, options, self.seed) for context, options in asked]
        found = complete(self.trained, wanted, self.batch)
        return self.recorded("generate_until", requests, found)

    def recorded(self, name: str, requests: Sequence[Any], results: Any) -> list[Any]:
        """Puts results into the harness's cache, if there is one; returns them."""
        results = list(results)
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(name, request.args, result)
        return results
