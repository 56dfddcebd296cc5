"""The decoder: from z_cell to the expected share of each gene in the counts of a cell."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spatialvae._product import Linear, product

FEW = -4.0  # logit of an additional zero (2 %) at initialisation; the prior of the parameters is centred on it


class Decoder(nn.Module):
    """logits of shares = b + effect_s + W (z_cell + o_s, s) + MLP(z_cell + o_s); s, the batch, is one-hot.

    A batch multiplies the shares of genes by the same factors in all cells, so that z_cell has the same meaning in all
    batches; o_s, 0 before ``SpatialModule.align``, is what remains. W is initialised with the ``loadings`` (gene, dim)
    for z_cell and zeros for s, since the prior of the parameters is centred on zero; b with the log mean shares, and
    the last layer of the MLP with zeros. ``effect`` (batch, gene) is the first estimate of the effects, not trained. If
    ``hidden`` is None there is no MLP (LDVAE, Svensson et al. 2020). With ``zero_inflation``, logits of additional
    zeros are linear in (z_cell, s): on STARmap this fits better than one logit per gene and than an output of the MLP.
    """

    effect: Tensor
    origin: Tensor

    def __init__(
        self, loadings: Tensor, effect: Tensor, log_share: Tensor, hidden: int | None, zero_inflation: bool
    ) -> None:
        super().__init__()
        n_genes, n_cell = loadings.shape
        n_batch = len(effect)
        self.n_batch, self.n_cell = n_batch if n_batch > 1 else 0, n_cell
        n_inputs, width = n_cell + self.n_batch, hidden or 0
        self.register_buffer("effect", effect)
        self.register_buffer("origin", torch.zeros(n_batch, n_cell))
        self.hidden = nn.Linear(n_cell, width) if width else None
        self.norm = nn.LayerNorm(width) if width else None
        self.out = Linear(n_inputs + width, n_genes)  # W beside the MLP's last layer: one matrix product
        self.zero = Linear(n_inputs, n_genes) if zero_inflation else None
        with torch.no_grad():
            self.out.weight.zero_()
            self.out.weight[:, :n_cell] = loadings
            self.out.bias.copy_(log_share)
            for parameter in [] if self.zero is None else self.zero.parameters():
                parameter.zero_()

    @property
    def loadings(self) -> Tensor:
        """The columns of W that multiply z_cell, (gene, dim)."""
        return self.out.weight[:, : self.n_cell]

    def inputs(self, z_cell: Tensor, batch: Tensor) -> Tensor:
        """(z_cell + o_s, s), (..., dim + batch)."""
        if not self.n_batch:
            return z_cell
        return torch.cat(
            [z_cell + F.embedding(batch, self.origin), F.one_hot(batch, self.n_batch).to(z_cell.dtype)], -1
        )

    def forward(self, z_cell: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """z_cell (..., dim) and batch int64 (...,) to logits (..., gene), and logits of additional zeros or None."""
        inputs = self.inputs(z_cell, batch)
        if self.hidden is None or self.norm is None:
            logits = self.out(inputs)
        else:
            features = F.relu(self.norm(self.hidden(inputs[..., : self.n_cell])))
            logits = self.out(torch.cat([inputs, features], -1))
        if self.n_batch:
            logits = logits + F.embedding(batch, self.effect)
        if self.zero is None:
            return logits, None
        return logits, product(inputs, self.zero.weight, self.zero.bias + FEW)

    def slopes(self, z_cell: Tensor, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Derivatives of the outputs of ``forward`` with respect to z_cell (cell, dim): (cell, gene, dim) each."""
        n, dim = z_cell.shape
        slopes, inputs = self.loadings.expand(n, -1, -1), self.inputs(z_cell, batch)
        if self.hidden is not None and self.norm is not None:
            hidden = self.hidden(inputs[..., :dim])
            sd = (hidden.var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
            normal = (hidden - hidden.mean(-1, keepdim=True)) / sd
            step = self.hidden.weight
            step = step - step.mean(0) - normal[..., None] * (normal @ step / normal.shape[-1])[:, None]
            kept = (normal * self.norm.weight + self.norm.bias > 0) * self.norm.weight / sd
            slopes = self.loadings + self.out.weight[:, inputs.shape[1] :] @ (kept[..., None] * step)
        if self.zero is None:
            return slopes, None
        return slopes, self.zero.weight[:, :dim].expand(n, -1, -1)
