"""The modules that engines wrap: log-probs of a policy, values and scores of a scorer.

Everything that touches weights happens inside `forward`, head included, because sharded weights are whole only there.
Padding may stand on either side: positions are counted over real tokens, and nothing is found by looking for pad ids.

Two paths give the same numbers. The packed one lays all real tokens in one flat row, common beginnings once, and lets
the head see nothing but the positions that are asked about. The plain one calls the model as transformers would.
`prove` compares them on the model at hand before the first is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.errors import CheckpointError
from rlhf.models.attention import Step, install, laid_out
from rlhf.models.cpu_decoder import CpuDecoder, has_cpu_decoder
from rlhf.models.decoding import decoding_weights
from rlhf.models.head import NO_EXTRAS, Extras, Question, TokenHead, adopt, in_pieces
from rlhf.models.linear import hasten
from rlhf.models.packing import pack
from rlhf.recipe.schema import SamplingBlock

# The model's own distribution: what SFT and preference losses are about.
UNCHANGED = SamplingBlock(temperature=1.0, top_k=0, top_p=1.0)

# How far the numbers of the two paths may be apart, by the type they are computed in. A model that does something
# between its layers and its head that we do not know of is off by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


class RoleModule(nn.Module):
    """A Hugging Face model in one role. Its weights are named `model.*`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        hasten(model)
        self.model = model
        self.packs = False
        self._takes_positions = "position_ids" in inspect.signature(self.core.forward).parameters

    @property
    def core(self) -> nn.Module:
        """The Hugging Face model itself; adapters live inside its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def decoder(self) -> nn.Module:
        """The model without its head."""
        return getattr(self.core, self.core.base_model_prefix)

    def inputs(self, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Arguments of the Hugging Face forward for ids padded on either side.

        attention: (B, T); ids: its last columns, all of them or those that a cache does not hold yet.
        """
        attention = attention.long()
        inputs = {"input_ids": ids, "attention_mask": attention}
        if self._takes_positions:
            inputs["position_ids"] = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return inputs

    def states(self, ids: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (N, H) of the real tokens, and where among them those of each column stand, (B, T)."""
        if not self.packs:
            hidden = self.decoder(**self.inputs(ids, attention), use_cache=False).last_hidden_state  # (B, T, H)
            return hidden.flatten(0, 1), torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        packed = pack(ids, attention)
        hidden = self.decoder(
            input_ids=packed.ids,
            position_ids=packed.positions,
            attention_mask=packed.ids.new_zeros(1, 1, 1, 1),  # four axes: transformers makes no mask of its own
            use_cache=False,
            layout=packed.layout,
        ).last_hidden_state
        return hidden[0], packed.place

    def can_pack(self) -> bool:
        """Whether the model's code would take the packed path; whether it gives the same numbers, `prove` finds out."""
        config = self.core.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        arguments = inspect.signature(self.decoder.forward).parameters.values()
        return (
            kinds <= {"full_attention", "sliding_attention"}
            and getattr(config, "attn_logit_softcapping", None) is None
            and self._takes_positions
            and any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments)
            and install(self.core)
        )

    @contextmanager
    def decoding(self, dtype: torch.dtype | None) -> Iterator[Step | None]:
        """Inside, the weights are those to sample with (None: in their own dtype), see `decoding_weights`.

        Gives the forward pass that takes a layout, None where the model cannot. Nothing may train while it lasts.
        """
        core, takes_layouts = self.core, self.can_pack()
        on_cpu = takes_layouts and has_cpu_decoder(core, core.dtype if dtype is None else dtype)
        with decoding_weights(core, dtype, pack=not on_cpu):
            yield CpuDecoder(core) if on_cpu else partial(laid_out, core) if takes_layouts else None

    def prove(self, call: Callable[..., Tensor]) -> str:
        """Choose the packed path where it gives the plain one's numbers. Returns the choice in words.

        call: this module, through its engine if it has one.
        """
        if not self.can_pack():
            return "padded rows (the model's code takes no flat ones)"
        vocabulary = self.core.get_input_embeddings().num_embeddings
        device = next(self.parameters()).device
        ids = (torch.arange(1, 27, device=device) * 37 % vocabulary).view(2, 13)
        ids[1, :8] = ids[0, :8]
        attention = torch.ones_like(ids, dtype=torch.bool)
        attention[1, -2:] = False
        mask = attention[:, -6:]
        with evaluating(self), torch.no_grad():
            plain = call(ids, attention, mask)[mask].float()
            self.packs = True
            try:
                gap = float((call(ids, attention, mask)[mask].float() - plain).abs().max())
            except RuntimeError as error:
                self.packs = False
                return f"padded rows (flat ones fail with: {str(error).splitlines()[0]})"
        self.packs = gap <= _TOLERANCE[self.core.dtype]
        if self.packs:
            return "packed rows"
        return f"padded rows (flat ones change this model's numbers by {gap:.2g})"

    def padding_gap(self, call: Callable[..., Tensor]) -> float:
        """Mean absolute difference between a row's numbers alone and with padding on both sides beside a longer row.

        Log-probs, values or scores of four tokens, relative to those above 1. call: as for `prove`, which comes first.
        """
        vocabulary = self.core.get_input_embeddings().num_embeddings
        device = next(self.parameters()).device
        ids = (torch.arange(1, 33, device=device) * 37 % vocabulary).view(2, 16)
        attention = torch.ones_like(ids, dtype=torch.bool)
        attention[1, :3] = attention[1, -2:] = False
        mask = attention[:, -6:]
        with evaluating(self), torch.no_grad():
            padded = call(ids, attention, mask)[1, :4].float()
            alone = call(ids[1:, 3:14], attention[1:, 3:14], mask[1:, :4])[0].float()
        return float(((padded - alone).abs() / alone.abs().clamp(min=1)).mean())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside (in train mode a checkpointing layer drops the cache); every submodule's mode is restored."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class PolicyModule(RoleModule):
    """Log-probs of given tokens under a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if "logits_to_keep" not in inspect.signature(self.core.forward).parameters:
            raise CheckpointError(
                f"expected a model that can compute logits of chosen positions, found a {type(self.core).__name__}",
                fix="Use an architecture whose transformers class takes logits_to_keep.",
            )
        adopt(self.core.get_output_embeddings())

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        sampling: SamplingBlock = UNCHANGED,
        extras: Extras = NO_EXTRAS,
    ) -> Tensor | tuple[Tensor, ...]:
        """Log-probs of the tokens under the mask, under `sampling`'s distribution: (B, R) float32 in nats, else 0.

        ids, attention: (B, T); mask: (B, R) bool, of the last R columns. A token under it has a token before it.
        Behind the log-probs, of the same shape, the extras in their order; `whole` is (M, V) alone, of the M tokens
        under the mask.
        """
        _check_mask(ids, mask)
        question = Question(ids[:, -mask.shape[1] :][mask], sampling, extras)
        answers = (
            self._packed(ids, attention, mask, question) if self.packs else self._plain(ids, attention, mask, question)
        )
        if extras.whole:
            return answers[0]
        spread = [answer.new_zeros(mask.shape).masked_scatter(mask, answer) for answer in answers]
        return spread[0] if len(spread) == 1 else tuple(spread)

    def _packed(self, ids: Tensor, attention: Tensor, mask: Tensor, question: Question) -> tuple[Tensor, ...]:
        hidden, place = self.states(ids, attention)
        asked = hidden[_before(place, mask)]  # (M, H)
        head = self.core.get_output_embeddings()
        if isinstance(head, TokenHead):
            answers: tuple[Tensor, ...] = head(asked, question)
            return answers
        return in_pieces(head, asked, question, self.core.config.get_text_config().vocab_size)

    def _plain(self, ids: Tensor, attention: Tensor, mask: Tensor, question: Question) -> tuple[Tensor, ...]:
        length, responses = ids.shape[1], mask.shape[1]
        columns = torch.arange(length - responses - 1, length - 1, device=ids.device)
        logits = self.core(**self.inputs(ids, attention), use_cache=False, logits_to_keep=columns).logits  # (B, R, V)
        return question.answer(logits[mask])

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, a LoRA policy is its own base: the reference, for free. No parameter's `requires_grad` changes.

        For use without gradients: with checkpointing the recomputation would run after the adapter is on again.
        """
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        assert layers, "only a LoRA policy has a base to fall back on"
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was


class ScorerModule(RoleModule):
    """Scores of whole sequences, or values of each state, under a model with a scalar head."""

    def __init__(self, model: nn.Module) -> None:
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        if not hasattr(core, "score") or not hasattr(core, core.base_model_prefix):
            raise CheckpointError(
                f"expected a decoder with a `score` head, found a {type(core).__name__}",
                fix="Use an architecture whose transformers class for sequence classification has one.",
            )
        super().__init__(model)

    def forward(self, ids: Tensor, attention: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask None: the score at each row's last attended token, (B,) float32.

        Else the values (B, R) float32 of the states before the tokens under the mask (B, R), which is of the last R
        columns; 0 elsewhere.
        """
        return read_scores(self.core.score, *self.states(ids, attention), attention, mask)


def read_scores(head: nn.Module, hidden: Tensor, place: Tensor, attention: Tensor, mask: Tensor | None) -> Tensor:
    """Scores (B,) or values (B, R) of `RoleModule.states`; see `ScorerModule.forward`."""
    if mask is not None:
        _check_mask(place, mask)
        values = _head(head, hidden[_before(place, mask)])
        return values.new_zeros(mask.shape).masked_scatter(mask, values)
    columns = torch.arange(place.shape[1], device=place.device)
    last = (columns * attention.long()).argmax(-1, keepdim=True)
    return _head(head, hidden[place.gather(1, last).squeeze(-1)])


def _head(head: nn.Module, hidden: Tensor) -> Tensor:
    """(..., H) -> (...,) float32. Called as a module, which is what makes a sharded head whole."""
    return head(hidden.to(next(head.parameters()).dtype)).float().squeeze(-1)


def _before(place: Tensor, mask: Tensor) -> Tensor:
    """Where the states stand that predict the tokens under the mask, (M,)."""
    return place[:, -mask.shape[1] - 1 : -1][mask]


def _check_mask(ids: Tensor, mask: Tensor) -> None:
    rows, length = ids.shape
    assert mask.dtype == torch.bool and len(mask) == rows and 1 <= mask.shape[1] < length, (
        f"mask: expected bool ({rows}, 1..{length - 1}), found {mask.dtype} {tuple(mask.shape)}"
    )
