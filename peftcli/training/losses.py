"""The causal language-model loss, computed without ever holding [tokens x vocabulary].

Only positions whose next token is a label reach the head, a few rows at a time: for each chunk the logits, their loss
and their gradient are computed and dropped before the next one (Cut Your Losses, arXiv:2411.09009, has the idea; here
it is plain PyTorch, any head module). The loss is a sum; the loop divides it by the labels of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253

from peftcli.adapters.engine import user_model
from peftcli.data.collate import IGNORED
from peftcli.errors import InputError
from peftcli.training.objectives.base import Objective, token_metrics
from peftcli.training.unpadded import Unpadded, unpadded

Head = Callable[[Tensor], Tensor]
"""Hidden states [N, D] to logits [N, V]."""

After = Callable[[Tensor], Tensor]
"""What a model does with its logits; elementwise."""


def chunk_rows(device: torch.device) -> int:
    """Rows of logits held at once: enough to keep the matrix product busy, measured on CPU."""
    return 128 if device.type == "cpu" else 512


class LinearCrossEntropy(torch.autograd.Function):
    """Sum over rows of cross entropy(head(hidden), labels), forward and backward in one pass over chunks of rows.

    The head may be anything differentiable (adapted, scaled, soft-capped). `leaves` are the parameters it trains; they
    are inputs of this function so that their gradients arrive the ordinary way, at DDP's hooks too.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, head: Head, rows: int, leaves: Sequence[Tensor], *_: Tensor
    ) -> Tensor:
        """Hidden [N, D], labels [N] -> the loss sum (). The last arguments are `leaves` once more, for autograd."""
        total = torch.zeros((), dtype=_wide(hidden.dtype), device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        # Many small terms are added: a 16-bit sum would lose them.
        leaf_gradients = [torch.zeros_like(leaf, dtype=_wide(leaf.dtype)) for leaf in leaves]
        for start in range(0, len(labels), rows):
            part, target = hidden[start : start + rows].detach().requires_grad_(), labels[start : start + rows]
            with torch.enable_grad():
                logits = head(part)
            loss, slope = _loss_and_slope(logits.detach(), target)
            total += loss
            gradients = torch.autograd.grad(logits, [part, *leaves], slope, allow_unused=True)
            hidden_gradient[start : start + rows] = gradients[0]
            for gradient, piece in zip(leaf_gradients, gradients[1:], strict=True):
                if piece is not None:
                    gradient += piece
        ctx.save_for_backward(hidden_gradient, *leaf_gradients)
        ctx.leaf_dtypes = [leaf.dtype for leaf in leaves]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0]
        hidden_gradient, *leaf_gradients = ctx.saved_tensors
        scaled = [(g * scale).to(dtype) for g, dtype in zip(leaf_gradients, ctx.leaf_dtypes, strict=True)]
        return hidden_gradient * scale.to(hidden_gradient.dtype), None, None, None, None, *scaled


def linear_cross_entropy(
    hidden: Tensor, labels: Tensor, head: Head, *, rows: int | None = None, leaves: Sequence[Tensor] = ()
) -> Tensor:
    """Sum of the cross entropy of `head(hidden)` [N, V] at `labels` [N], at most `rows` rows of logits at a time.

    Args:
        hidden: [N, D].
        labels: [N], the token each row predicts.
        head: gives logits.
        rows: rows at a time; a default by device.
        leaves: parameters that get their gradient through the head.
    """
    return LinearCrossEntropy.apply(hidden, labels, head, rows or chunk_rows(hidden.device), tuple(leaves), *leaves)


@torch.no_grad()
def linear_scores(hidden: Tensor, labels: Tensor, head: Head, *, rows: int | None = None) -> Tensor:
    """[loss sum, labels the head ranks first, labels] over `labels` [N], chunk by chunk."""
    rows = rows or chunk_rows(hidden.device)
    scores = torch.zeros(3, dtype=_wide(hidden.dtype), device=hidden.device)
    for part, target in zip(hidden.split(rows), labels.split(rows), strict=True):
        scores += _scores(head(part), target)
    return scores


def _wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32."""
    return torch.promote_types(dtype, torch.float32)


def _loss_and_slope(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss sum and its gradient [N, V] by the logits, of one `exp`, which is more exact than CPU `log_softmax`."""
    wide, index = logits.to(_wide(logits.dtype)), target.unsqueeze(-1)
    largest = wide.amax(-1, keepdim=True)
    likely = (wide - largest).exp_()
    total = likely.sum(-1, keepdim=True)
    loss = (total.log() + largest - wide.gather(-1, index)).sum()
    slope = likely.div_(total).scatter_add_(-1, index, torch.full_like(total, -1.0))
    return loss, slope.to(logits.dtype)


def _scores(logits: Tensor, target: Tensor) -> Tensor:
    wide = logits.to(_wide(logits.dtype))
    loss = (wide.logsumexp(-1) - wide.gather(-1, target.unsqueeze(-1)).squeeze(-1)).sum()
    correct = (wide.argmax(-1) == target).sum()
    return torch.stack([loss, correct.to(loss.dtype), loss.new_tensor(float(len(target)))])


# -- a whole model --------------------------------------------------------------------------------------------------


class CausalLMLoss(Objective):
    """A causal language model that returns its loss: the module the loop trains, so that DDP and FSDP wrap it whole.

    The model runs as its author wrote it, except that its head hands over the hidden states instead of multiplying
    them. That holds for prompt tuning and every other wrapper that ends in the same head. What the model does with
    logits afterwards (scaling, soft-capping) is found by trying, once, at the first batch. A model that does something
    we don't recognise computes its own logits: correct, only not sparing. In the same way padding is left out where the
    model gives the same without it (`unpadded.py`).

    Args:
        model: any module that takes `input_ids` and `attention_mask` and returns an object with `logits` [B, T, V].
        bf16: run under bfloat16 autocast.
        rows: rows of logits held at once.
        packed: batches are as many samples as fill some rows, and must be run without padding.
    """

    def __init__(self, model: nn.Module, *, bf16: bool = False, rows: int | None = None, packed: bool = False) -> None:
        super().__init__(model, bf16=bf16)
        self.rows, self.packed = rows, packed
        self._tail: _Tail | None = None
        self._probed = self._lays_out = False
        self.unpadded = Unpadded(model)

    def forward(self, batch: dict[str, Tensor], score: bool = False) -> Tensor:
        """The loss sum () of a batch, or with `score` [loss sum, correct labels, labels].

        Args:
            batch: `input_ids`, `attention_mask`, `labels` [B, T] as `collate` makes them (labels[b, t] is predicted by
                the tokens before t), and whatever else the model takes.
            score: evaluate instead of training.

        Raises:
            InputError: the batch is packed, and the model can't keep its samples apart.
        """
        with self.autocast(batch["labels"].device):
            if not self._probed:
                self._probe(batch)
            if self._lays_out and self.unpadded.fits(batch):
                with self.unpadded.switched():
                    return self._score(*unpadded(batch), score)
            if self.packed and self.model.training:
                raise cannot_pack(user_model(self.model))
            self.unpadded.release()
            return self._score(_inputs(batch), batch["labels"], score)

    def _probe(self, batch: dict[str, Tensor]) -> None:
        """Find out what can be spared with this model, once."""
        self._tail, self._probed = find_tail(self.model, _inputs(batch)), True
        if (tail := self._tail) is not None:
            self._lays_out = self.unpadded.prove(batch, lambda inputs: self._hidden(tail, inputs))

    def _hidden(self, tail: _Tail, inputs: dict[str, Any]) -> Tensor:
        """What the head is given, [B, T, D]."""
        with tapped(tail.head, lambda hidden: hidden[..., :1]) as seen:
            self.model(**inputs, use_cache=False)
        return seen[0]

    def _score(self, inputs: dict[str, Any], labels: Tensor, score: bool) -> Tensor:
        """The loss sum () of `labels` [B, T], or the scores [3]."""
        labels = labels[:, 1:]
        keep = labels != IGNORED
        if self._tail is None:
            logits = self.model(**inputs, use_cache=False).logits
            logits = _text(logits, labels)[keep]
            if score:
                return _scores(logits, labels[keep])
            return nn.functional.cross_entropy(logits.to(_wide(logits.dtype)), labels[keep], reduction="sum")
        hidden = _text(self._hidden(self._tail, inputs), labels)[keep]
        if score:
            return linear_scores(hidden, labels[keep], self._tail, rows=self.rows)
        return linear_cross_entropy(hidden, labels[keep], self._tail, rows=self.rows, leaves=self._tail.leaves)

    @property
    def spares_logits(self) -> bool:
        """Whether the loss is computed in chunks (known after the first batch)."""
        return self._tail is not None

    @property
    def spares_padding(self) -> bool:
        """Whether batches are run without their padding (known after the first batch)."""
        return self._lays_out

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        loss, correct, count = sums
        return token_metrics(loss, correct, count)

    def release(self) -> None:
        self.unpadded.release()


def cannot_pack(model: Any) -> InputError:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return InputError(
        f"bfd packs several samples into a row, and this base ({kind}) can't keep them from seeing each other: its "
        "attention is none that knows where a sample ends, or reaches less far than the longest one",
        field="data.packing",
        fix="set it to none",
    )


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _text(outputs: Tensor, labels: Tensor) -> Tensor:
    """The outputs [B, L, *] that predict `labels` [B, T - 1]. Prompt learning puts virtual tokens in front: L >= T."""
    return outputs[:, -labels.shape[1] - 1 : -1]


class _Tail:
    """What follows the hidden states: the head, then an elementwise function of its logits."""

    def __init__(self, head: nn.Module, after: After, hidden: Tensor) -> None:
        self.head, self.after = head, after
        with torch.enable_grad():
            self.leaves = list(_leaves(self(hidden)))

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.after(self.head(hidden))


@contextmanager
def tapped(head: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """While open, `head(hidden)` returns `answer(hidden)` and hidden is appended to the list this gives."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return answer(hidden)

    before = vars(head).get("forward")  # accelerate's device hooks set one on the instance
    vars(head)["forward"] = forward
    try:
        yield seen
    finally:
        if before is None:
            del vars(head)["forward"]
        else:
            vars(head)["forward"] = before


@torch.no_grad()
def find_tail(model: nn.Module, inputs: dict[str, Tensor]) -> _Tail | None:
    """The tail of `model`, proved on two tokens of `inputs`, or None where it is none we know."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    if not isinstance(head, nn.Module):
        return None
    few = {name: value[:1, :2] if value.dim() > 1 else value[:1] for name, value in inputs.items()}
    device = next(iter(inputs.values())).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a probe must not shift the run's dropout
        raw = []  # what the head gives, before the model goes on with it
        original = head.forward

        def watched(hidden: Tensor) -> Tensor:
            raw.append(original(hidden))
            return raw[-1].clone()

        with tapped(head, watched) as seen:
            logits = model(**few, use_cache=False).logits
        if len(seen) != 1 or seen[0].dim() != 3 or raw[0].shape != logits.shape:
            return None
        # Logits far from zero tell a soft cap from the identity, which a fresh model's own small ones do not.
        wide = torch.linspace(-90, 90, raw[0].numel(), device=raw[0].device).to(raw[0].dtype).view_as(raw[0])
        with tapped(head, lambda hidden: wide.clone()):
            capped = model(**few, use_cache=False).logits
        for after in _tails(getattr(model, "config", None)):
            if _close(after(raw[0]), logits) and _close(after(wide), capped):
                return _Tail(head, after, seen[0][0])
    return None


def _tails(config: Any) -> Iterator[After]:
    """What models are known to do with logits, judged by their config."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    yield _as_they_are
    for name in ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier"):
        value = getattr(text, name, None)
        if isinstance(value, (int, float)) and value:
            yield from (partial(_soft_cap, value), partial(_multiply, value), partial(_divide, value))


def _as_they_are(logits: Tensor) -> Tensor:
    return logits


def _multiply(factor: float, logits: Tensor) -> Tensor:
    return logits * factor


def _soft_cap(cap: float, logits: Tensor) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _divide(divisor: float, logits: Tensor) -> Tensor:
    return logits / divisor


def _close(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if ours.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())


def _leaves(output: Tensor) -> Iterator[Tensor]:
    """The parameters that get a gradient through `output`, wherever they are kept."""
    waiting, known = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting.extend(parent for parent, _ in node.next_functions)
