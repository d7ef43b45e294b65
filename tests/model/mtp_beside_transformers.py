"""Multi-token prediction beside transformers' MtpLayer, and beside a model without it.

Argument: JSON, a list of settings such as ["model.num_mtp_layers=2"]; prints a list of results.
The reference cuts sequences short where no further token is known, instead of masking the rest.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import MtpLayer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RMSNorm,
)

from megatron_kanana import device
from megatron_kanana.config import Environment, Settings
from megatron_kanana.config.schema import ModelSettings
from megatron_kanana.device.compatibility import prediction_layer_name
from megatron_kanana.kernels.backend import REFERENCE
from tests.model.beside_transformers import (
    Tensors,
    hugging_face_config,
    hugging_face_layer_names,
    hugging_face_names,
    randomize,
    relative_error,
    small_settings,
)

LENGTH = 40


@dataclass
class Batch:
    """Two sequences; all tensors are [2, LENGTH]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor


class Reference(torch.nn.Module):
    """transformers' model with multi-token prediction layers behind it."""

    def __init__(self, model: ModelSettings) -> None:
        super().__init__()
        self.main = transformers.DeepseekV3ForCausalLM(hugging_face_config(model))
        self.layers = torch.nn.ModuleList(
            MtpLayer(self.main.config, DeepseekV3DecoderLayer, DeepseekV3RMSNorm, index)
            for index in range(model.num_layers, model.num_layers + model.num_mtp_layers)
        )

    def forward(self, batch: Batch) -> list[torch.Tensor]:
        """Mean losses of the next token and of those after it."""
        decoder, head = self.main.model, self.main.lm_head
        hidden_states = decoder(batch.tokens).last_hidden_state
        losses = [masked_mean(head(hidden_states), batch.labels, batch.mask)]
        for depth, layer in enumerate(self.layers, 1):
            hidden_states = hidden_states[:, :-1]
            positions = torch.arange(hidden_states.shape[1]).unsqueeze(0)
            hidden_states = layer(
                inputs_embeds=decoder.embed_tokens(batch.tokens[:, depth:]),
                previous_hidden_state=hidden_states,
                position_embeddings=decoder.rotary_emb(hidden_states, positions),
                attention_mask=create_causal_mask(
                    config=self.main.config,
                    inputs_embeds=hidden_states,
                    attention_mask=None,
                    past_key_values=None,
                    position_ids=positions,
                ),
                position_ids=positions,
                past_key_values=None,
            )
            logits = head(hidden_states)
            losses.append(masked_mean(logits, batch.labels[:, depth:], batch.mask[:, depth:]))
        return losses


def masked_mean(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, mean over the labels that count."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * mask.flatten()).sum() / mask.sum()


def reference_names(ours: Tensors, model: ModelSettings) -> Tensors:
    """Our tensors under the reference's names."""
    theirs = {f"main.{name}": value for name, value in hugging_face_names(ours, model).items()}
    for index in range(model.num_mtp_layers):
        source, target = f"mtp.layers.{index}", f"layers.{index}"
        for name, other in {"final_layernorm": "post_norm"}.items() | {
            (name, name) for name in ("enorm", "hnorm", "eh_proj")
        }:
            theirs[f"{target}.{other}.weight"] = ours[f"{source}.{name}.weight"]
        block = (f"{source}.{prediction_layer_name()}", f"{target}.mtp_block")
        theirs |= hugging_face_layer_names(ours, *block, model, is_moe=True)
    return theirs


def random_batch(vocab_size: int) -> Batch:
    """Random tokens; a third of the labels does not count."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(vocab_size, (2, LENGTH + 1), generator=generator)
    mask = (torch.rand(2, LENGTH, generator=generator) > 1 / 3).float()
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def our_losses(model: Any, batch: Batch) -> list[torch.Tensor]:
    """Mean losses; the backward pass of the first brings the gradients of the others along."""
    from megatron_kanana.model.multi_token import take_mtp_losses

    positions = torch.arange(LENGTH).expand(2, -1)
    options = {"labels": batch.labels, "loss_mask": batch.mask}
    losses = model(batch.tokens, positions, None, **options)
    mtp_losses = take_mtp_losses(1)
    further = [] if mtp_losses is None else list(mtp_losses)
    return [(losses * batch.mask).sum() / batch.mask.sum(), *further]


def compare(settings: Settings, where: device.Device) -> dict[str, Any]:
    """Errors of losses and gradients, and what the layers change outside of training."""
    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.megatron_config import transformer_config

    model = settings.model
    ours = gpt_model(settings, transformer_config(settings, where), REFERENCE)
    randomize(ours)
    weights = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    theirs = Reference(model)
    theirs.load_state_dict(reference_names(weights, model), strict=True)
    batch = random_batch(model.vocab_size)

    losses = our_losses(ours, batch)
    losses[0].backward()
    expected = theirs(batch)
    objective = expected[0]
    for further in expected[1:]:
        objective = objective + model.mtp_loss_coefficient / model.num_mtp_layers * further
    objective.backward()
    gradients = {name: value.grad for name, value in ours.named_parameters()}
    expected_gradients = {
        name: value.grad for name, value in theirs.named_parameters() if value.grad is not None
    }
    mapped = reference_names(gradients, model)
    errors = {
        name: relative_error(mapped[name], gradient)
        for name, gradient in expected_gradients.items()
        if gradient.numel()
    }
    measured = torch.stack(losses).detach()
    return {
        "losses": measured.tolist(),
        "loss_error": float((measured / torch.stack(expected).detach() - 1).abs().max()),
        "gradient_error": max(errors.values()),
        "gradients": len(errors),
        "mtp_gradients": sum(name.startswith("layers.") for name in errors),
        **without_labels(ours, batch),
        **outside_training(settings, where, ours, batch),
    }


def without_labels(ours: Any, batch: Batch) -> dict[str, Any]:
    """What is learned from a microbatch in which only the very first label counts."""
    ours.zero_grad()
    mask = torch.zeros_like(batch.mask)
    mask[0, 0] = 1.0
    our_losses(ours, replace(batch, mask=mask))[0].backward()
    norms = {name: float(value.grad.norm()) for name, value in ours.named_parameters()}
    return {
        "unlabelled_mtp_gradient": max(n for name, n in norms.items() if name.startswith("mtp.")),
        "unlabelled_head_gradient": norms["output_layer.weight"],
    }


def outside_training(
    settings: Settings, where: device.Device, ours: Any, batch: Batch
) -> dict[str, Any]:
    """Whether losses and logits are those of a model without the layers, and whether these run."""
    from megatron_kanana.model.builder import gpt_model
    from megatron_kanana.model.megatron_config import transformer_config

    bare_settings = replace(settings, model=replace(settings.model, num_mtp_layers=0))
    bare = gpt_model(bare_settings, transformer_config(bare_settings, where), REFERENCE)
    unexpected = bare.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
    assert all(name.startswith("mtp.") for name in unexpected)
    same_training_loss = torch.equal(our_losses(ours, batch)[0], our_losses(bare, batch)[0])
    runs: list[int] = []
    ours.mtp.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    positions = torch.arange(LENGTH).expand(2, -1)
    with torch.no_grad():
        same_logits = torch.equal(*(m(batch.tokens, positions, None) for m in (ours, bare)))
        ours.eval()
        bare.eval()
        same_loss = torch.equal(our_losses(ours, batch)[0], our_losses(bare, batch)[0])
        same_logits &= torch.equal(*(m(batch.tokens, positions, None) for m in (ours, bare)))
    return {
        "same_training_loss": same_training_loss,
        "same_evaluation": same_loss and same_logits,
        "runs_in_evaluation": len(runs),
    }


if __name__ == "__main__":
    cases = [small_settings(overrides) for overrides in json.loads(sys.argv[1])]
    here = device.prepare_device(cases[0], Environment())
    device.initialize_process_groups(cases[0], here)
    print(json.dumps([compare(settings, here) for settings in cases]))
    device.destroy_process_groups()
