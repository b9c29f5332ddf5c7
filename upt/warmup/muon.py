"""The optimizers of the warm-up."""

import torch


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/): momentum whose singular values are brought close to one.

    For matrices. Updates are scaled to the size of AdamW's, so that both take the same learning rate. torch.optim.Muon
    iterates in bfloat16, which takes a CPU ten times as long as float32 for matrices of this size, one at a time.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(average, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring all singular values of each of (N, A, B) to about one, by five Newton-Schulz iterations."""
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def muon_and_adamw(model, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices; AdamW at half its rate for the rest, at a twentieth for the vision tower's first layer.

    Frozen parameters are left out.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    slow = [p for name, p in named.items() if "patch_embed" in name]
    matrices = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name]
    taken = {*slow, *matrices}
    rest = [p for p in named.values() if p not in taken]
    groups = [{"params": rest, "lr": peak / 2}, {"params": slow, "lr": peak / 20}]
    return [Muon(matrices, peak), adamw([group for group in groups if group["params"]])]


def adamw(params) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
