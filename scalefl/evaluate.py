"""Every level's every exit on held-out examples: rank or generate, then accuracy, kappa, error, loss.

Shapes: B rows, A answers, M exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from scalefl.batches import Batcher, Candidates
from scalefl.config.options import RunConfig
from scalefl.contracts import State
from scalefl.engine.launch import Engine
from scalefl.models.store import Store

UNPARSABLE = -1
TOKENS_BEYOND = 2
"""Generated tokens beyond the longest answer, so that a longer one shows."""


@dataclass(frozen=True, kw_only=True)
class ExitMetrics:
    """One exit of one level. Closed answer sets only: all but `loss`, `exact_match` and `count`."""

    count: int
    loss: float | None
    """Nats per answer token; None where it is not finite."""
    exact_match: float | None = None
    accuracy: float | None = None
    balanced_accuracy: float | None = None
    """Recall averaged over the classes present."""
    kappa: float | None = None
    """Quadratic weighted; None where it is undefined."""
    mae: float | None = None
    """Mean absolute error of the grade."""
    unparsable: int = 0
    """Generated answers outside the answer set: wrong, with the largest error their grade allows."""


class Evaluator:
    """Evaluates sub-models of the current global state; shares the examples over the ranks."""

    def __init__(
        self,
        *,
        run: RunConfig,
        engine: Engine,
        store: Store,
        batcher: Batcher,
        answers: tuple[str, ...] | None,
        processor: Any,
    ) -> None:
        self._run, self._engine, self._store, self._batcher = run, engine, store, batcher
        self._answers, self._processor = answers, processor
        self._candidates = (
            None
            if answers is None
            else Candidates(ids=tuple(tuple(processor.encode_answer(a)) for a in answers))
        )

    def level(
        self,
        level: int,
        state: State,
        ids: Sequence[int],
        check_stop: Callable[[], None] = lambda: None,
    ) -> list[dict[str, Any]]:
        """Metrics of every exit of a level on these examples, shallowest first; the same on every rank.

        `check_stop` is called before every batch, equally often on every rank.
        """
        rows = self._rows(level, state, ids, check_stop)
        self._engine.sweep()
        rows = self._engine.gather(rows)
        num_exits = self._store.models.slices[level].spec.depth
        return [
            asdict(self._summary(ids, [(p[e], n[e], t[e]) for p, n, t in rows])) for e in range(num_exits)
        ]

    def _rows(
        self, level: int, state: State, ids: Sequence[int], check_stop: Callable[[], None]
    ) -> list[Any]:
        """This rank's examples."""
        engine, rows = self._engine, []
        model = self._store.submodel(level, state, own=False, place=engine.place).eval()
        share, score = engine.share(ids), self._open if self._answers is None else self._closed
        with torch.no_grad(), engine.evaluating(model), engine.autocast():
            for start in range(0, engine.largest_share(len(ids)), self._run.eval_batch_size):
                check_stop()
                if part := share[start : start + self._run.eval_batch_size]:
                    rows += score(model, part)
                elif engine.shards_weights:  # the other ranks need this one's part of the weights
                    score(model, ids[:1])
        return rows

    def _closed(self, model: Any, ids: Sequence[int]) -> list[Any]:
        """Per example: (predicted label, summed nats of the true answer, its tokens) at every exit."""
        assert self._candidates is not None
        inputs = self._batcher.scoring(ids, self._candidates)
        scores_mba = torch.stack(
            [
                self._candidates.log_likelihoods(logits.unflatten(0, (len(ids), -1)))
                for logits in model(**inputs).exit_logits
            ]
        )
        labels = torch.tensor([self._batcher.examples[i].label for i in ids], device=scores_mba.device)
        nats_mb = -scores_mba.gather(2, labels.view(1, -1, 1).expand(len(scores_mba), -1, 1)).squeeze(2)
        predicted = (
            scores_mba.argmax(-1).tolist()
            if self._run.scoring == "rank"
            else self._generated_labels(model, ids)
        )
        tokens = [len(self._candidates.ids[label]) for label in labels.tolist()]
        return _by_example(predicted, nats_mb.tolist(), tokens)

    def _open(self, model: Any, ids: Sequence[int]) -> list[Any]:
        """As `_closed`, with 1 for an exact match and 0 for anything else in place of a label."""
        batch = self._batcher.training(ids)
        lengths = [self._batcher.num_answer_tokens([i]) for i in ids]
        nats = []
        for logits in model(**batch.inputs).exit_logits:
            token_nats = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
            nats.append([float(part.sum()) for part in token_nats.split(lengths)])
        wanted = [self._batcher.examples[i].answer.strip() for i in ids]
        texts = self._generated_texts(model, ids)
        matches = [[int(text == answer) for text, answer in zip(row, wanted, strict=True)] for row in texts]
        return _by_example(matches, nats, lengths)

    def _generated_labels(self, model: Any, ids: Sequence[int]) -> list[list[int]]:
        assert self._answers is not None
        known = {answer: label for label, answer in enumerate(self._answers)}
        return [[known.get(text, UNPARSABLE) for text in row] for row in self._generated_texts(model, ids)]

    def _generated_texts(self, model: Any, ids: Sequence[int]) -> list[list[str]]:
        """Greedy answers (M, B)."""
        longest = max(self._batcher.num_answer_tokens([i]) for i in ids)
        if self._candidates is not None:
            longest = max(map(len, self._candidates.ids))
        inputs = self._batcher.prompts(ids)
        width, texts = inputs["input_ids"].shape[1], []
        for exit in range(1, len(model.config.exit_layers) + 1):
            out = model.generate(
                **inputs,
                exit=exit,
                max_new_tokens=longest + TOKENS_BEYOND,
                do_sample=False,
                synced_gpus=self._engine.shards_weights,
            )
            texts.append([self._processor.decode_answer(row) for row in out[:, width:].tolist()])
        return texts

    def _summary(self, ids: Sequence[int], rows: list[tuple[int, float, int]]) -> ExitMetrics:
        predicted = torch.tensor([row[0] for row in rows])
        nats = sum(row[1] for row in rows) / max(sum(row[2] for row in rows), 1)
        loss = nats if math.isfinite(nats) else None
        if self._answers is None:
            return ExitMetrics(count=len(ids), loss=loss, exact_match=float(predicted.float().mean()))
        labels = torch.tensor([self._batcher.examples[i].label for i in ids])
        return grade_metrics(predicted, labels, len(self._answers), loss)


def _by_example(predicted: list[list[int]], nats: list[list[float]], tokens: list[int]) -> list[Any]:
    exits = range(len(predicted))
    return [
        ([predicted[e][b] for e in exits], [nats[e][b] for e in exits], [tokens[b]] * len(exits))
        for b in range(len(tokens))
    ]


def grade_metrics(predicted_b: Tensor, labels_b: Tensor, num_classes: int, loss: float | None) -> ExitMetrics:
    """Metrics of predicted against true labels; `UNPARSABLE` counts as the label farthest from the truth."""
    # Imported late: it takes a second, which processes that only train need not wait for.
    from torchmetrics.functional.classification import multiclass_cohen_kappa, multiclass_confusion_matrix

    unparsable = predicted_b == UNPARSABLE
    farthest = torch.where(labels_b * 2 < num_classes - 1, num_classes - 1, 0)
    predicted_b = torch.where(unparsable, farthest, predicted_b)
    confusion = multiclass_confusion_matrix(predicted_b, labels_b, num_classes).double()
    present = confusion.sum(1) > 0
    recall = confusion.diagonal()[present] / confusion.sum(1)[present]
    kappa = float(multiclass_cohen_kappa(predicted_b, labels_b, num_classes, weights="quadratic"))
    return ExitMetrics(
        count=len(labels_b),
        loss=loss,
        accuracy=float((predicted_b == labels_b).double().mean()),
        balanced_accuracy=float(recall.mean()),
        kappa=None if math.isnan(kappa) else kappa,
        mae=float((predicted_b - labels_b).abs().double().mean()),
        unparsable=int(unparsable.sum()),
    )
