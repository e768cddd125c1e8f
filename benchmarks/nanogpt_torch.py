"""nanoGPT's model and its step in PyTorch, for `nanogpt.py` and `gpu.py`, which import it if torch is installed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Arrays = dict[str, Any]  # Any: numpy arrays, and dicts and lists of them


class Block(nn.Module):
    """Attention and MLP before which the stream is normalised, without biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        batch, length, width = stream.shape
        qkv = self.qkv(self.ln_1(stream)).split(width, dim=2)
        query, key, value = (one.view(batch, length, self.heads, -1).transpose(1, 2) for one in qkv)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))
        return stream + self.down(F.gelu(self.up(self.ln_2(stream))))


class GPT(nn.Module):
    """nanoGPT with tied embeddings; its forward pass is the loss."""

    def __init__(self, *, layers: int, width: int, heads: int, context: int, vocabulary: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        stream = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            stream = layer(stream)
        logits = F.linear(self.ln_f(stream), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def load(self, params: Arrays) -> None:
        """Take the parameters of the model in JAX, whose matrices are `[in, out]`."""
        with torch.no_grad():
            for name in ("wte", "wpe", "ln_f"):
                getattr(self, name).weight.copy_(torch.from_numpy(params[name]))
            for layer, arrays in zip(self.layers, params["layers"], strict=True):
                for name, module in layer.named_children():
                    module.weight.copy_(torch.from_numpy(arrays[name]).T)

    def params(self) -> Arrays:
        """The parameters in the layout of JAX."""
        layers = [
            {name: module.weight.detach().cpu().numpy().T for name, module in layer.named_children()}
            for layer in self.layers
        ]
        own = {name: getattr(self, name).weight.detach().cpu().numpy() for name in ("wte", "wpe", "ln_f")}
        return {**own, "layers": layers}


def make_step(
    model: GPT,
    *,
    learning_rate: float,
    b2: float,
    epsilon: float,
    weight_decay: float,
    max_norm: float,
    compiled: bool,
    fused: bool,
    k: int = 1,
    bfloat16: bool = False,
) -> Callable[[Any, Any], tuple[Any, Any]]:  # Any: as in `measuring.Step`; the state is in the model
    """One step as nanoGPT's loop makes it: matrices and embeddings are decayed, scales are not.

    Args:
      k: the number of microbatches.
      bfloat16: whether products are computed in it.
    """
    params = list(model.parameters())
    groups = [
        {"params": [one for one in params if one.dim() >= 2], "weight_decay": weight_decay},
        {"params": [one for one in params if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, b2), eps=epsilon, fused=fused)
    forward = torch.compile(model) if compiled else model

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        value = torch.zeros((), device=params[0].device)
        for part in zip(*(one.chunk(k) for one in batch), strict=True):
            with torch.autocast(params[0].device.type, torch.bfloat16, enabled=bfloat16):
                loss = forward(*part) / k
            loss.backward()
            value += loss.detach()
        nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return state, value

    return step
